"""Turn text into tokenized, shuffled, packed shards: `python data_prep/shard.py --help`."""

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from data_prep.evidence import Evidence, Piece
from data_prep.hub import HUB_NAME, HubSource
from data_prep.output import OTHER_CONTENT, TRAIN, VALID, Output, Settings
from data_prep.pack import Framing, Packer
from data_prep.passes import (
    SpillPlan,
    finished,
    forget_parts_of,
    pack_split,
    spill_all,
    split_ranges,
)
from data_prep.progress import closing_table, pass_bar
from data_prep.readers import SUFFIXES_IN_WORDS, naming
from data_prep.records import clean_file_name
from data_prep.shuffle import PartSummary
from data_prep.sources import STDLIB, Part, Source, file_source, stdlib_source
from data_prep.tokenizer import (
    SMALLEST_VOCABULARY,
    no_usable_document,
    sample_texts,
    train_tokenizer,
)
from i3dist.cli.extend import add_extend_option
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.manifest import MAX_SHARDS, Manifest
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError

DEFAULT_VOCABULARY = 32_000
LARGEST_VOCABULARY = 1 << 16
_EXAMPLES = """\
examples:
  FineWeb-Edu sample-10BT, from the hub:
    python data_prep/shard.py
  text that every machine has:
    python data_prep/shard.py --source stdlib --vocab-size 4096 --out data/lib
  your own:
    python data_prep/shard.py --source 'texts/*.parquet' --out data/texts

A document is a row of parquet, a line of jsonl or ndjson (an object; both with
`text`, and if you like `id` and `url`), or a txt file. Text is UTF-8, or what
its byte-order mark says. A folder is read as `find -L` walks it, but for hidden
names, folders whose names begin with _ , and what this tool has made. What is
skipped or left out is counted by reason at the end; a broken file ends the run.

The output holds train/ and valid/, each with shard-000000.tar ...,
index.parquet (where every document lies) and manifest.json, beside
tokenizer.json. The same source and settings give the same shards, whatever
--workers is. A run that was stopped continues when it is started again, and
where packing has not ended, with other --chunk-length, --chunks-per-shard or
--valid-fraction too. Else a folder made with other settings, or from other
content, is refused: source.json keeps sizes, times and hashes of what was read.
While it works the tool needs disk for about twice the shards.
"""


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high`, both allowed."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low:,} to {high:,}")
        return value

    return parse


def _source(text: str) -> Path | str:
    return text if text == STDLIB else typed_path(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a value that makes no sense is a `UserError`."""
    parser = ArgumentParser(
        prog="shard.py",
        description="Turn text into tokenized, shuffled, packed shards for training.",
        epilog=_EXAMPLES,
    )
    _add_text_options(parser)
    _add_shard_options(parser)
    add_extend_option(parser)
    return parser.parse_args(arguments)


def _add_text_options(parser: ArgumentParser) -> None:
    """Options on what is read and written, and on how text becomes tokens."""
    add = parser.add_argument
    add(
        "--source",
        type=_source,
        help=f"a file, a folder or a glob of {SUFFIXES_IN_WORDS}; or `stdlib`, the text of this "
        f"Python's standard library (default: {HUB_NAME}, streamed from the hub)",
    )
    add(
        "--out",
        type=typed_path,
        default=Path("data/fineweb-edu"),
        help="folder (default: %(default)s)",
    )
    add("--tokenizer", type=typed_path, help="a tokenizer.json to use (default: train one)")
    add(
        "--vocab-size",
        type=_number(int, SMALLEST_VOCABULARY, LARGEST_VOCABULARY),
        help=f"entries of the vocabulary (default: --tokenizer's, else {DEFAULT_VOCABULARY})",
    )
    add(
        "--tokenizer-sample-mb",
        type=_number(int, 1, 10_000),
        default=200,
        metavar="MB",
        help="train the tokenizer on the first MB of text (default: %(default)s)",
    )
    add(
        "--workers",
        type=_number(int, 1, 1024),
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize (default: one per core, here %(default)s)",
    )


def _add_shard_options(parser: ArgumentParser) -> None:
    """Options on how tokens become shards."""
    add = parser.add_argument
    add(
        "--chunk-length",
        type=_number(int, 2, 1 << 16),
        default=512,
        help="tokens per chunk (default: %(default)s)",
    )
    add(
        "--chunks-per-shard",
        type=_number(int, 1, 1_000_000),
        default=256,
        help="fewer give small corpora more shards for their lanes (default: %(default)s)",
    )
    add(
        "--valid-fraction",
        type=_number(float, 0.0, 0.9),
        default=0.005,
        help="share of documents for validation; 0: no such split (default: %(default)s)",
    )
    add(
        "--seed",
        type=_number(int, 0, (1 << 63) - 1),
        default=0,
        help="of the shuffle and the split (default: %(default)s)",
    )


def open_source(spec: str | Path | None, former: Settings | None) -> Source:
    """The source that `--source` names; one from the hub stays at the version it began with."""
    if spec is None:
        is_hub = former is not None and former.source == HUB_NAME
        return HubSource(pinned=former.revision if former and is_hub else None)
    return stdlib_source() if spec == STDLIB else file_source(spec)


def check_vocabulary(tokenizer: Tokenizer, wanted: int | None) -> None:
    """Refuse a given tokenizer whose vocabulary is not the one asked for, or does not fit."""
    if wanted is not None and tokenizer.vocab_size != wanted:
        raise UserError(
            f"{tokenizer.path} has a vocabulary of {tokenizer.vocab_size}, not of --vocab-size "
            f"{wanted}: leave that option away, or name another --tokenizer"
        )
    if tokenizer.vocab_size > LARGEST_VOCABULARY:
        raise UserError(
            f"{tokenizer.path} has a vocabulary of {tokenizer.vocab_size}, and a token in a shard "
            f"can be one of {LARGEST_VOCABULARY} at most: name another --tokenizer"
        )


def settings_of(
    options: argparse.Namespace,
    source: Source,
    given: Tokenizer | None,
    former: Settings | None,
) -> Settings:
    """What decides the bytes of the output: all options but --out and --workers.

    Of the source it tells as much as the `former` settings do, so that they can be compared.
    """
    vocab_size = given.vocab_size if given else options.vocab_size or DEFAULT_VOCABULARY
    return Settings(
        source=source.name,
        revision=source.revision if former and former.has_content_digest else source.outline,
        tokenizer=f"sha256 {given.sha256}" if given else "trained",
        tokenizer_sample_mb=0 if given else options.tokenizer_sample_mb,
        vocab_size=vocab_size,
        chunk_length=options.chunk_length,
        chunks_per_shard=options.chunks_per_shard,
        valid_fraction=options.valid_fraction,
        seed=options.seed,
    )


@dataclass(frozen=True)
class Job:
    """One run of the tool on an output that is not complete."""

    settings: Settings
    output: Output
    source: Source
    console: Console

    def check_complete(self) -> None:
        """Refuse a complete output whose source holds something else now."""
        if self._evidence(()) and not self.output.evidence():
            raise UserError(
                f"{self.output.folder} does not say what it was made from (source.json is "
                "missing): delete it and make it again"
            )
        self._touched(())

    def run(self, given: Tokenizer | None, workers: int) -> None:
        """Tokenize, shuffle, pack and publish."""
        start = time.monotonic()
        parts = self.source.parts()
        plan = SpillPlan(parts, self.output.tokenizer, self.output.runs, self.settings.seed)
        touched = forget_parts_of(plan, self._touched(_pieces(finished(plan))))
        tokenizer = self._tokenizer(parts, given, is_certain=not touched)
        self.output.begin(self.settings, tokenizer, self._evidence(()))
        summaries = self._spill(plan, workers)
        manifests = self._pack(summaries)
        self.output.publish(manifests, self._evidence(_pieces(summaries)))
        skipped = _skipped(summaries)
        self.console.print(closing_table(manifests, skipped, time.monotonic() - start))
        if self.source.left_out:
            self.console.print(f"left out: {self.source.left_out}", markup=False, soft_wrap=True)

    def _evidence(self, pieces: Sequence[Piece]) -> Evidence | None:
        """What tells whether the source is still the same; None where its revision tells it."""
        if self.settings.has_content_digest or not self.source.files:
            return None
        return Evidence(states=self.source.states, pieces=tuple(pieces))

    def _touched(self, pieces: Sequence[Piece]) -> frozenset[int]:
        """Numbers of the files that have other times than when the work began.

        A piece that was read and holds something else now, of `pieces` or of the finished output,
        is a `UserError`.
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
        """The tokenizer; where the former one is not certain, it is trained again to compare."""
        path = self.output.tokenizer
        former = path.read_bytes() if path.exists() else None
        if former and (given or is_certain):
            return former
        if given:
            return given.data
        data = self._train(parts)
        if former and data != former:
            raise self.output.refusal(OTHER_CONTENT)
        return data

    def _train(self, parts: Sequence[Part]) -> bytes:
        limit = self.settings.tokenizer_sample_mb * 1_000_000
        texts = sample_texts(parts, self.settings.source, limit)
        with self.console.status("training the tokenizer"):
            data = train_tokenizer(texts, self.settings.vocab_size)
        size = Tokenizer(data, self.output.tokenizer).vocab_size
        if size < self.settings.vocab_size:
            print(
                f"the text is too small for {self.settings.vocab_size} vocabulary entries: "
                f"there are {size}"
            )
        return data

    def _spill(self, plan: SpillPlan, workers: int) -> list[PartSummary]:
        with pass_bar(self.console, "tokenize", "parts", len(plan.parts)) as report:
            summaries = spill_all(plan, workers, report)
        if not any(summary.documents for summary in summaries):
            self.output.abandon()
            raise no_usable_document(self.settings.source, _skipped(summaries))
        self._check_shards(summaries)
        return summaries

    def _check_shards(self, summaries: Sequence[PartSummary]) -> None:
        tokens = sum(summary.tokens + 2 * summary.documents for summary in summaries)
        most = MAX_SHARDS * self.settings.chunks_per_shard * self.settings.chunk_length
        if tokens > most:
            raise UserError(
                f"{tokens:,} tokens make more than {MAX_SHARDS:,} shards: raise --chunks-per-shard"
            )

    def _pack(self, summaries: Sequence[PartSummary]) -> dict[str, Manifest]:
        """Write the splits into the staging folders; returns the manifests, not yet written."""
        tokenizer = Tokenizer.load(self.output.tokenizer)
        train, valid = split_ranges(summaries, self.settings.valid_fraction)
        ranges = {TRAIN: train, VALID: valid}
        documents = sum(summary.documents for summary in summaries)
        manifests = {}
        with pass_bar(self.console, "pack", "documents", documents) as report:
            for split in self.settings.splits:
                packer = Packer(self.output.stage(split), self._framing(tokenizer))
                pack_split(summaries, self.output.runs, ranges[split], packer, report)
                manifests[split] = self._manifest(split, packer, tokenizer)
        return manifests

    def _framing(self, tokenizer: Tokenizer) -> Framing:
        return Framing(
            chunk_length=self.settings.chunk_length,
            chunks_per_shard=self.settings.chunks_per_shard,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

    def _manifest(self, split: str, packer: Packer, tokenizer: Tokenizer) -> Manifest:
        framing = packer.framing
        return Manifest(
            split=split,
            chunk_length=framing.chunk_length,
            chunks_per_shard=framing.chunks_per_shard,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            bos_id=framing.bos_id,
            eos_id=framing.eos_id,
            pad_id=framing.pad_id,
            source=self.settings.source,
            seed=self.settings.seed,
            documents=packer.documents,
            tokens=packer.tokens,
            chunks=sum(shard.chunks for shard in packer.shards),
            shards=tuple(packer.shards),
        )


def _pieces(summaries: Iterable[PartSummary | None]) -> list[Piece]:
    return [piece for summary in summaries if summary for piece in summary.pieces]


def _skipped(summaries: Sequence[PartSummary]) -> Counter[str]:
    return sum((Counter(summary.skipped) for summary in summaries), Counter())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; everything a user can get wrong is a `UserError`."""
    options = parse(arguments)
    console = Console()
    output = Output(options.out)
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    if given:
        check_vocabulary(given, options.vocab_size)
    former = output.settings()
    source = open_source(options.source, former)
    job = Job(settings_of(options, source, given, former), output, source, console)
    try:
        with output.locked():
            if output.is_complete(job.settings):
                job.check_complete()
                print(clean_file_name(f"{output.folder} is already complete"))
                return
            job.run(given, options.workers)
    except OSError as error:
        place = error.filename or output.folder
        raise UserError(f"cannot write to {place}: {error.strerror or error}") from None


if __name__ == "__main__":
    with one_line_errors():
        main()
