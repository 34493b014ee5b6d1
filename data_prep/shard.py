"""Turn text into tokenized, shuffled, packed shards for training.

examples:
  FineWeb-Edu sample-10BT, from the hub:
    python data_prep/shard.py
  text that every machine has:
    python data_prep/shard.py --source stdlib --vocab-size 4096 --out data/lib
  your own:
    python data_prep/shard.py --source 'texts/*.parquet' --out data/texts
  a part of it:
    python data_prep/shard.py --source 'texts/*.parquet' --out data/chosen \\
      --where "int_score >= 3 and language = 'en'" --deduplicate

A document is a row of parquet, a line of jsonl or ndjson (an object), or a txt
file. Rows and lines have a `text`, and optionally an `id` and a `url`. Text is
UTF-8 unless its byte-order mark says otherwise. A folder is read with all its
subfolders, as by `find -L`, except for hidden names, folders whose names begin
with _ , and the output of this tool. Skipped documents and left-out files are
counted by reason at the end. A broken file ends the run. --where, --min-tokens
and --max-tokens choose from --source only: that of --valid is taken as it is.

The output holds train/ and valid/, each with shard-000000.tar ...,
index.parquet (where every document lies) and manifest.json, beside
tokenizer.json. The same source and settings give the same shards for any
number of --workers. A run that was stopped continues when it is started again.
Until packing has ended it may continue with another --chunk-length,
--chunks-per-shard or --valid-fraction. A folder made with other settings, or
from other content, is refused: source.json keeps sizes, times and hashes of
the files that were read. The tool needs disk space for almost twice the shards
while it works; --dry-run says how much, about.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from data_prep.choice import Choice
from data_prep.dropped import dropped_by_split
from data_prep.duplicates import STEPS, Deduplication
from data_prep.evidence import Evidence, Piece
from data_prep.files import file_source
from data_prep.forecast import FORECAST_BYTES, Forecast, measure
from data_prep.options import add_options, check_choices
from data_prep.output import OTHER_CONTENT, Output, OutputSettings
from data_prep.pack import chunks_per_shard
from data_prep.passes import (
    SecondPass,
    SpillPlan,
    digest_of,
    finished,
    forget_parts_of,
    framed_tokens,
    spill_all,
)
from data_prep.progress import closing_table, dropped_table, pass_bar
from data_prep.readers import naming
from data_prep.shuffle import PartSummary
from data_prep.sources import SOURCES, Part, Source, clean_file_name
from data_prep.tokenizer import (
    DEFAULT_SAMPLE_MB,
    DEFAULT_VOCABULARY,
    check_vocabulary,
    no_usable_document,
    sample_texts,
    train_tokenizer,
)
from data_prep.validation import PairOfSources
from i3dist.cli.extend import add_extend_option
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.manifest import MAX_SHARDS
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool.

    Raises:
        UserError: whatever a user can get wrong.
    """
    options = parse(arguments)
    output = Output(options.out)
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    if given:
        check_vocabulary(given, options.vocab_size)
    former = output.settings()
    source = open_sources(options, former)
    preparation = Preparation(
        settings_of(options, source, given, former), output, source, Console()
    )
    if options.dry_run:
        preparation.foresee(given, options.workers)
        return
    try:
        with output.locked():
            if output.is_complete(preparation.settings):
                preparation.check_complete()
                print(clean_file_name(f"{output.folder} is already complete"))
                return
            preparation.run(given, options.workers)
    except OSError as error:
        place = error.filename or output.folder
        raise UserError(f"cannot write to {place}: {error.strerror or error}") from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a value that makes no sense is a `UserError`."""
    description, _, more = __doc__.partition("\n\n")
    parser = ArgumentParser(prog="shard.py", description=description, epilog=more)
    add_options(parser)
    add_extend_option(parser)
    options = parser.parse_args(arguments)
    check_choices(options)
    if options.source not in SOURCES:  # after all options, as --extend adds names
        options.source = typed_path(options.source)
    if options.valid and options.valid not in SOURCES:
        options.valid = typed_path(options.valid)
    return options


def open_sources(options: argparse.Namespace, former: OutputSettings | None) -> Source:
    """The source to prepare; where the output was begun, at the revision of then."""
    source = _open(options.source)
    if former and former.source == source.name:
        source.pin(former.revision)
    if options.where:
        source = source.chosen(options.where)
    if not options.valid:
        return source
    validation = _open(options.valid)
    if former and former.valid == validation.name and former.valid_revision:
        validation.pin(former.valid_revision)
    return PairOfSources(source, validation)


def _open(spec: str | Path) -> Source:
    return SOURCES[spec]() if isinstance(spec, str) else file_source(spec)


def settings_of(
    options: argparse.Namespace,
    source: Source,
    given: Tokenizer | None,
    former: OutputSettings | None,
) -> OutputSettings:
    """What decides the bytes of the output: all options but --out and --workers.

    The source is described as it is in the `former` settings, so that they can be compared. The
    tokenizer's sample is the former one, so that work begun by an older version continues.
    """
    vocab_size = given.vocab_size if given else options.vocab_size or DEFAULT_VOCABULARY
    former_chunks = former.chunks_per_shard if former else None
    sample_mb = former.tokenizer_sample_mb if former else DEFAULT_SAMPLE_MB
    validation = source.validation if isinstance(source, PairOfSources) else None
    return OutputSettings(
        source=source.name,
        revision=source.revision if former and former.has_content_digest else source.outline,
        tokenizer=f"sha256 {given.sha256}" if given else "trained",
        tokenizer_sample_mb=0 if given else options.tokenizer_sample_mb or sample_mb,
        tokenizer_sample=former.tokenizer_sample if former else "even",
        vocab_size=vocab_size,
        chunk_length=options.chunk_length,
        chunks_per_shard=options.chunks_per_shard or former_chunks,
        valid_fraction=options.valid_fraction,
        seed=options.seed,
        where=options.where,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        deduplicate=options.deduplicate or None,
        valid=validation.name if validation else None,
        valid_revision=validation.outline if validation else None,
        license=options.license or (former.license if former else source.license),
        valid_license=_valid_license(validation, former),
    )


def _valid_license(validation: Source | None, former: OutputSettings | None) -> str | None:
    if not validation:
        return None
    return former.valid_license if former else validation.license


@dataclass(frozen=True)
class Preparation:
    """One run of the tool on an output that is not complete."""

    settings: OutputSettings
    output: Output
    source: Source
    console: Console

    def run(self, given: Tokenizer | None, workers: int) -> None:
        """Tokenize, shuffle, pack and publish."""
        start = time.monotonic()
        if self.output.discard_old_runs():
            self.console.print("an earlier version began this folder: tokenizing it again")
        parts = self.source.parts()
        output, seed = self.output, self.settings.seed
        plan = SpillPlan(parts, output.tokenizer, output.runs, seed, self._choice)
        touched = forget_parts_of(plan, self._touched(_pieces(finished(plan))))
        tokenizer = self._tokenizer(parts, given, is_certain=not touched)
        self.output.begin(self.settings, tokenizer, self._evidence(()))
        trained = Tokenizer.load(self.output.tokenizer)
        self.console.print(str(trained.encoder), markup=False, highlight=False, soft_wrap=True)
        if not any(finished(plan)) and sum(part.size for part in parts) >= FORECAST_BYTES:
            self._forecast(parts, workers, trained)
        summaries = self._without_duplicates(self._spill(plan, workers), workers)
        settings = self._with_chunks_chosen(framed_tokens(summaries))
        dropped = dropped_by_split(parts, summaries, settings)
        manifests = SecondPass(settings, self.output, self.console, workers).run(summaries, dropped)
        self.output.publish(manifests, self._evidence(_pieces(summaries)))
        skipped = _skipped(summaries)
        self.console.print(closing_table(manifests, skipped, time.monotonic() - start))
        if settings.chooses:
            self.console.print(dropped_table(dropped, of_splits=settings.valid is not None))
        if self.source.left_out:
            self.console.print(f"left out: {self.source.left_out}", markup=False, soft_wrap=True)

    def foresee(self, given: Tokenizer | None, workers: int) -> None:
        """Show what a run would make, and make nothing."""
        path = self.output.tokenizer
        tokenizer = given or (Tokenizer.load(path) if path.exists() else None)
        self._forecast(self.source.parts(), workers, tokenizer)

    def check_complete(self) -> None:
        """Refuse a complete output whose source has other content now."""
        if self._evidence(()) and not self.output.evidence():
            raise UserError(
                f"{self.output.folder} does not say what it was made from (source.json is "
                "missing): delete it and make it again"
            )
        self._touched(())

    def _evidence(self, pieces: Sequence[Piece]) -> Evidence | None:
        """What tells whether the source is still the same; None where its revision tells that."""
        if self.settings.has_content_digest or not self.source.files:
            return None
        return Evidence(states=self.source.states, pieces=tuple(pieces))

    def _touched(self, pieces: Sequence[Piece]) -> frozenset[int]:
        """Numbers of the files whose times have changed since the work began.

        Raises:
            UserError: such a file has other content where one of `pieces`, or of the finished
                output's pieces, was read.
        """
        evidence = self.output.evidence()
        if not evidence:
            return frozenset()
        touched = evidence.touched(self.source.states)
        with self.console.status("comparing the source with what was read"):
            for piece in (*evidence.pieces, *pieces):
                path, _ = self.source.files[piece.file]
                with naming(path):
                    if piece.file in touched and not piece.is_in(path):
                        raise self.output.refusal(f"before {path} changed, {OTHER_CONTENT}")
        return touched

    def _tokenizer(self, parts: Sequence[Part], given: Tokenizer | None, is_certain: bool) -> bytes:
        """The tokenizer's file. One of an earlier run is trained again unless it `is_certain`."""
        path = self.output.tokenizer
        former = path.read_bytes() if path.exists() else None
        if former and (given or is_certain):
            return former
        if given:
            return given.data
        texts = sample_texts(
            [part for part in parts if not part.is_validation],
            self.settings.source,
            self.settings.tokenizer_sample_mb,
            evenly=self.settings.tokenizer_sample == "even",
        )
        with self.console.status("training the tokenizer"):
            data = train_tokenizer(texts, self.settings.vocab_size)
        if former and data != former:
            raise self.output.refusal(OTHER_CONTENT)
        return data

    @property
    def _choice(self) -> Choice:
        settings = self.settings
        return Choice(settings.min_tokens, settings.max_tokens, bool(settings.deduplicate))

    def _spill(self, plan: SpillPlan, workers: int) -> list[PartSummary]:
        """Pass 1: tokenize every part that is not finished yet."""
        with pass_bar(self.console, "tokenize", "parts", len(plan.parts)) as report:
            summaries = spill_all(plan, workers, report)
        if not any(summary.documents for summary in summaries):
            self.output.abandon()
            raise no_usable_document(self.settings.source, _skipped(summaries))
        return summaries

    def _without_duplicates(
        self, summaries: list[PartSummary], workers: int
    ) -> Sequence[PartSummary]:
        """Between the passes: mark duplicates, if that is asked for."""
        if not self.settings.deduplicate:
            return summaries
        task = Deduplication(
            summaries, self.output.runs, self.output.duplicates, digest_of((), summaries)
        )
        with pass_bar(self.console, "compare", "steps", STEPS * len(task.groups)) as report:
            return task.run(workers, report)

    def _with_chunks_chosen(self, tokens: int) -> OutputSettings:
        """The settings with a number of chunks per shard, which the output keeps."""
        settings = self.settings
        if settings.chunks_per_shard is None:
            chosen = chunks_per_shard(tokens, settings.chunk_length)
            settings = settings.model_copy(update={"chunks_per_shard": chosen})
            self.output.write_settings(settings)
        assert settings.chunks_per_shard
        if tokens > MAX_SHARDS * settings.chunks_per_shard * settings.chunk_length:
            raise UserError(
                f"{tokens:,} tokens make more than {MAX_SHARDS:,} shards: raise --chunks-per-shard"
            )
        return settings

    def _forecast(self, parts: Sequence[Part], workers: int, tokenizer: Tokenizer | None) -> None:
        """Show what will be made, and refuse what cannot be."""
        with self.console.status("measuring a sample of the source"):
            sample = measure(parts, tokenizer, self._choice)
        if sample is None:
            unknown = "the size of this source is not known beforehand"
            rare = ", or no row of a sample meets --where" if self.settings.where else ""
            self.console.print(f"no estimate: {unknown}{rare}", soft_wrap=True)
            return
        forecast = Forecast.of(sample, self.settings, workers)
        free = self.output.free_bytes()
        for line in forecast.lines(self.output.folder, free):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        forecast.check(self.output.folder, free, MAX_SHARDS)


def _pieces(summaries: Iterable[PartSummary | None]) -> list[Piece]:
    return [piece for summary in summaries if summary for piece in summary.pieces]


def _skipped(summaries: Sequence[PartSummary]) -> Counter[str]:
    return sum((Counter(summary.skipped) for summary in summaries), Counter())


if __name__ == "__main__":
    with one_line_errors():
        main()
