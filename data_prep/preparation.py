"""Makes an output of shard.py, step by step: the tokenizer, pass 1, duplicates, pass 2."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console

from data_prep.arguments import TaskShare
from data_prep.begun import Begun
from data_prep.choice import Choice
from data_prep.dropped import dropped_by_split
from data_prep.duplicates import STEPS, Deduplication
from data_prep.evidence import Evidence, Piece
from data_prep.forecast import FORECAST_BYTES, Forecast, measure
from data_prep.formats import FORMATS
from data_prep.mixture import count_sources
from data_prep.output import OTHER_CONTENT, Output, OutputSettings
from data_prep.pack import chunks_per_shard
from data_prep.passes import (
    SecondPass,
    SpillPlan,
    digest_of,
    failures,
    finished,
    forget_parts_of,
    framed_tokens,
    spill_all,
    spill_some,
)
from data_prep.plan import Plan
from data_prep.progress import closing_table, dropped_table, pass_bar, sources_table
from data_prep.shuffle import PartSummary
from data_prep.sources import Part, Source, clean_file_name
from data_prep.tokenizer import no_usable_document, sample_texts, train_tokenizer
from data_prep.upload import clear, is_uploaded, upload
from i3dist.data.manifest import MAX_SHARDS, Manifest
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError


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
        if self.output.has_old_runs():
            self._say("an earlier version began this folder: tokenizing it again")
            shutil.rmtree(self.output.runs)
        plan = self._plan(self._whole_parts)
        self._begin(plan, given, workers)
        self._finish(plan, self._spill(plan, workers), workers, start)

    def begin(self, given: Tokenizer | None, workers: int) -> None:
        """Make the tokenizer, and all that tasks have in common."""
        self._refuse_old_runs()
        plan = self._plan(self._parts(given))
        self._begin(plan, given, workers)
        self._say(f"{self.output.folder} is begun: {len(plan.parts):,} parts are to be tokenized")

    def run_task(self, share: TaskShare, given: Tokenizer | None, workers: int) -> None:
        """Tokenize a share of the parts. It needs nothing of other tasks.

        Raises:
            UserError: some parts cannot be read; all others are done.
        """
        with self.output.locked_task(str(share)):
            self._refuse_old_runs()
            is_begun = self.output.tokenizer.exists()
            plan = self._plan(self._parts(given))
            self._begin(plan, given, None if is_begun else workers)
            numbers = share.numbers(len(plan.parts))
            with pass_bar(self.console, "tokenize", "parts", len(numbers)) as report:
                errors = spill_some(plan, numbers, workers, report)
        for error in errors:
            self._say(f"not done: {error}")
        if errors:
            raise UserError(
                f"{len(errors)} of {len(numbers):,} parts of task {share} cannot be tokenized, "
                f"the others are done; the first: {errors[0]}; then run the same command again"
            )
        self._say(f"task {share} is done: {len(numbers):,} of {len(plan.parts):,} parts")

    def merge(self, given: Tokenizer | None, workers: int) -> None:
        """Pack what the tasks have tokenized.

        Raises:
            UserError: some parts are not tokenized.
        """
        start = time.monotonic()
        self._refuse_old_runs()
        if not self.output.tokenizer.exists():
            raise UserError(f"nothing is tokenized in {self.output.folder}: run its tasks first")
        plan = self._plan(self._parts(given))
        self._begin(plan, given, None)
        summaries = [summary for summary in finished(plan) if summary]
        if missing := len(plan.parts) - len(summaries):
            reason = "".join(f"; {f.message}" for f in failures(self.output.runs)[:1])
            raise UserError(
                f"{missing:,} of {len(plan.parts):,} parts are not tokenized{reason}; run their "
                "tasks again, or this command without --merge, which tokenizes them here"
            )
        self._finish(plan, summaries, workers, start)

    def is_complete(self, given: Tokenizer | None) -> bool:
        """Whether all work is done; says so. An upload that was stopped is completed."""
        free = self._begun.may_differ(given)
        if not self.output.is_complete(self.settings, free):
            return False
        self.check_complete()
        self._upload()
        print(clean_file_name(f"{self.output.place} is already complete"))
        return True

    def _refuse_old_runs(self) -> None:
        if self.output.has_old_runs():
            raise UserError(
                f"an earlier version began {self.output.folder}: delete it, or continue without "
                "--begin, --task and --merge"
            )

    def _parts(self, given: Tokenizer | None) -> Sequence[Part]:
        """The parts for tasks, which leave broken files for later; training needs them all."""
        if given or self.output.tokenizer.exists():
            self.source.keep_in(self.output.facts)
            return self.source.parts_with_broken()
        return self._whole_parts

    @cached_property
    def _whole_parts(self) -> Sequence[Part]:
        """The parts of a source that can be opened as a whole."""
        self.source.keep_in(self.output.facts)
        return self.source.parts()

    def _plan(self, parts: Sequence[Part]) -> SpillPlan:
        """What pass 1 is to do, with the parts that the work was begun with."""
        former = Plan.load(self.output.plan)
        parts = former.arranged(parts) if former else parts
        output = self.output
        return SpillPlan(
            parts,
            output.tokenizer,
            output.runs,
            self.settings.seed,
            self.settings.format,
            output.merged_runs,
            self._choice,
        )

    def _begin(self, plan: SpillPlan, given: Tokenizer | None, workers: int | None) -> None:
        """Write down what the output is made from, and show what so many workers will make."""
        unread = self._touched(lambda: _pieces(finished(plan)))
        if unread:
            unread = forget_parts_of(plan, unread, self._begun.broken())
        tokenizer = self._tokenizer(given, is_certain=not unread)
        free = self._begun.may_differ(given)
        self.output.begin(self.settings, tokenizer, self._evidence(()), free)
        Plan.of(plan.parts).write(self.output.plan)
        trained = Tokenizer.load(self.output.tokenizer)
        self._say(str(trained.encoder))
        is_large = sum(part.size for part in plan.parts) >= FORECAST_BYTES
        if workers and is_large and not any(finished(plan)):
            self._forecast(plan.parts, workers, trained)

    def _finish(
        self, plan: SpillPlan, summaries: Sequence[PartSummary], workers: int, start: float
    ) -> None:
        """Pass 2: pack all runs; `start` is the time to count from."""
        summaries = self._without_duplicates(summaries, workers)
        settings = self._with_chunks_chosen(framed_tokens(summaries))
        sources = count_sources(self.source, plan.parts, summaries)
        dropped = dropped_by_split(plan.parts, summaries, settings)
        packing = SecondPass(settings, self.output, self.console, workers, sources)
        manifests = packing.run(summaries, dropped)
        self.output.publish(manifests, self._evidence(sorted(_pieces(summaries), key=_place)))
        skipped = _skipped(summaries)
        self.console.print(closing_table(manifests, skipped, time.monotonic() - start))
        if sources:
            self.console.print(sources_table(sources))
        if settings.chooses:
            self.console.print(dropped_table(dropped, of_splits=settings.valid is not None))
        if self.source.left_out:
            self._say(f"left out: {self.source.left_out}")
        self._upload()

    def _upload(self) -> None:
        """Move the complete output to its URL, if it has one."""
        output, store = self.output, self.output.store
        if store is None:
            return
        manifests = {split: Manifest.load(output.folder / split) for split in self.settings.splits}
        if not is_uploaded(output.folder, store, manifests):
            shards = sum(len(manifest.shards) for manifest in manifests.values())
            with pass_bar(self.console, "upload", "shards", shards) as report:
                upload(output.folder, store, manifests, report)
            self._say(f"{output.place} is complete")
        clear(output.folder)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

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
        self._touched(tuple)

    def _evidence(self, pieces: Sequence[Piece]) -> Evidence | None:
        """What tells whether the source is still the same; None where its revision tells that."""
        if self.settings.has_content_digest or not self.source.files:
            return None
        return Evidence(states=self.source.states, pieces=tuple(pieces))

    def _touched(self, read: Callable[[], Iterable[Piece]]) -> frozenset[int]:
        """Numbers of the files whose times have changed since the work began.

        Raises:
            UserError: such a file has other content where one of the pieces `read`, or of the
                finished output's pieces, was read.
        """
        if touched := self._begun.touched():
            with self.console.status("comparing the source with what was read"):
                self._begun.check(touched, read())
        return touched

    def _tokenizer(self, given: Tokenizer | None, is_certain: bool) -> bytes:
        """The tokenizer's file. One of an earlier run is trained again unless it `is_certain`."""
        path = self.output.tokenizer
        former = path.read_bytes() if path.exists() else None
        if former and (given or is_certain):
            return former
        if given:
            return given.data
        texts = sample_texts(
            self.source.sample_parts(self._whole_parts),
            self.settings.source,
            self.settings.tokenizer_sample_mb,
            evenly=self.settings.tokenizer_sample == "even",
            documents=FORMATS[self.settings.format],
        )
        with self.console.status("training the tokenizer"):
            data = train_tokenizer(texts, self.settings.vocab_size)
        if former and data != former:
            refusal = self.output.refusal(OTHER_CONTENT)
            raise UserError(f"{refusal}, or keep its tokenizer: --tokenizer {path}")
        return data

    @property
    def _begun(self) -> Begun:
        return Begun(self.output, self.source)

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
            if any(summary.usable for summary in summaries):
                raise UserError(
                    f"of {self.settings.source} no document is taken: raise the weight of a "
                    "--source, or set another --seed"
                )
            raise no_usable_document(self.settings.source, _skipped(summaries))
        return summaries

    def _without_duplicates(
        self, summaries: Sequence[PartSummary], workers: int
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
            sample = measure(parts, tokenizer, FORMATS[self.settings.format], self._choice)
        if sample is None:
            unknown = "the size of this source is not known beforehand"
            rare = ", or no row of a sample meets --where" if self.settings.where else ""
            self.console.print(f"no estimate: {unknown}{rare}", soft_wrap=True)
            return
        forecast = Forecast.of(sample, self.settings, workers)
        free = self.output.free_bytes()
        for line in forecast.lines(self.output.folder, free):
            self._say(line)
        forecast.check(self.output.folder, free, MAX_SHARDS)


def _pieces(summaries: Iterable[PartSummary | None]) -> list[Piece]:
    return [piece for summary in summaries if summary for piece in summary.pieces]


def _place(piece: Piece) -> tuple[int, int]:
    return piece.file, piece.start


def _skipped(summaries: Sequence[PartSummary]) -> Counter[str]:
    return sum((Counter(summary.skipped) for summary in summaries), Counter())
