"""The steps of shard.py: begin an output, do a task's share of a pass, merge, or do all at once."""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from data_prep.arguments import ALONE, TaskShare
from data_prep.beginning import Beginning, pieces_of, say
from data_prep.dropped import dropped_by_split
from data_prep.evidence import Piece
from data_prep.output import Output
from data_prep.passes import SpillPlan, failures, finished, spill_all, spill_some
from data_prep.progress import closing_table, dropped_table, pass_bar, sources_table
from data_prep.reading.mixture import count_sources
from data_prep.second_pass import SecondPass
from data_prep.shuffle import PartSummary
from data_prep.sources import clean_file_name
from data_prep.tokenizer import no_usable_document
from data_prep.upload import clear, upload
from i3dist.errors import UserError


@dataclass(frozen=True)
class Preparation:
    """One run of the tool, with so many `workers`, on an output that is not complete."""

    beginning: Beginning
    workers: int

    def is_complete(self, shared: bool) -> bool:
        """Whether all work is done; says so. An upload that was stopped is completed.

        Where the work is `shared`, another task may be looking at the same files: then none is
        moved, and the run that merges completes the upload.
        """
        if not self.beginning.is_complete():
            return False
        if not shared:
            self._upload()
        print(clean_file_name(f"{self._output.place} is already complete"))
        return True

    def run(self) -> None:
        """Tokenize, shuffle, pack and publish."""
        start = time.monotonic()
        if self._output.has_old_runs():
            self._say("an earlier version began this folder: tokenizing it again")
            shutil.rmtree(self._output.runs)
        plan = self.beginning.plan(with_broken=False)
        self.beginning.begin(plan, self.workers)
        self._finish(plan, self._tokenize(plan), start)

    def begin(self) -> None:
        """Make the tokenizer, and all that tasks have in common."""
        self._refuse_old_runs()
        plan = self.beginning.plan(with_broken=True)
        self.beginning.begin(plan, self.workers)
        self._say(f"{self._output.folder} is begun: {len(plan.parts):,} parts are to be tokenized")

    def tokenize(self, share: TaskShare) -> None:
        """Tokenize a share of the parts. It needs nothing of other tasks.

        Raises:
            UserError: some parts cannot be read; all others are done.
        """
        with self._output.locked_task(share, "tokenizing"):
            self._refuse_old_runs()
            is_begun = self._output.tokenizer.exists()
            plan = self.beginning.plan(with_broken=True)
            self.beginning.begin(plan, None if is_begun else self.workers)
            numbers = share.numbers(len(plan.parts))
            with pass_bar(self._console, "tokenize", "parts", len(numbers)) as report:
                errors = spill_some(plan, numbers, self.workers, report)
        for error in errors:
            self._say(f"not done: {error}")
        if errors:
            raise UserError(
                f"{len(errors)} of {len(numbers):,} parts of task {share} cannot be tokenized, "
                f"the others are done; the first: {errors[0]}; then run the same command again"
            )
        self._say(f"task {share} is done: {len(numbers):,} of {len(plan.parts):,} parts")

    def pack(self, share: TaskShare) -> None:
        """Pack a share of what all tasks have tokenized. It needs nothing of others that pack.

        Raises:
            UserError: some parts are not tokenized.
        """
        with self._output.locked_task(share, "packing"):
            if self._output.is_moving:
                self._say("all is packed: run the same command with --merge alone, to finish")
                return
            _, summaries = self._tokenized()
            if error := self._nothing_taken(summaries):
                raise error
            second = self._second_pass(summaries, share)
            ranges = second.pack()
        total = second.plan.layout.ranges
        self._say(f"task {share} has packed its share: {len(ranges):,} of {total:,} ranges")

    def merge(self) -> None:
        """Pack what tasks have tokenized and not packed, and finish.

        Raises:
            UserError: some parts are not tokenized.
        """
        start = time.monotonic()
        self._finish(*self._tokenized(), start)

    def _tokenized(self) -> tuple[SpillPlan, Sequence[PartSummary]]:
        """The parts and their summaries.

        Raises:
            UserError: some are not tokenized.
        """
        self._refuse_old_runs()
        if not self._output.tokenizer.exists():
            raise UserError(
                f"nothing is tokenized in {self._output.folder}: run its tasks first; if they "
                "failed, their own messages say why"
            )
        plan = self.beginning.plan(with_broken=True)
        self.beginning.begin(plan)
        summaries = [summary for summary in finished(plan) if summary]
        if missing := len(plan.parts) - len(summaries):
            reason = "".join(f"; {f.message}" for f in failures(self._output.runs)[:1])
            raise UserError(
                f"{missing:,} of {len(plan.parts):,} parts are not tokenized{reason}; run their "
                "tasks again, or this command without --merge, which tokenizes them here"
            )
        return plan, summaries

    def _tokenize(self, plan: SpillPlan) -> Sequence[PartSummary]:
        """Pass 1: tokenize every part that is not finished yet."""
        with pass_bar(self._console, "tokenize", "parts", len(plan.parts)) as report:
            return spill_all(plan, self.workers, report)

    def _finish(self, plan: SpillPlan, summaries: Sequence[PartSummary], start: float) -> None:
        """Pass 2 of all that is not packed, and publish; `start` is the time to count from."""
        if error := self._nothing_taken(summaries):
            self._output.abandon()
            raise error
        second = self._second_pass(summaries)
        settings, summaries = self.beginning.settings, second.left
        sources = count_sources(self.beginning.source, plan.parts, summaries)
        dropped = dropped_by_split(plan.parts, summaries, settings)
        manifests = second.finish(sources, dropped)
        evidence = self.beginning.evidence(sorted(pieces_of(summaries), key=_place))
        self._output.publish(second.work, manifests, evidence)
        skipped = _skipped(summaries)
        self._console.print(closing_table(manifests, skipped, time.monotonic() - start))
        if sources:
            self._console.print(sources_table(sources))
        if settings.chooses:
            self._console.print(dropped_table(dropped, of_splits=settings.valid is not None))
        if self.beginning.source.left_out:
            self._say(f"left out: {self.beginning.source.left_out}")
        self._upload()

    def _upload(self) -> None:
        """Move the complete output to its URL, if it has one."""
        output, store = self._output, self._output.store
        if store is None:
            return
        manifests = output.manifests(self.beginning.settings.splits)
        if manifests:  # else all is at the URL
            shards = sum(len(manifest.shards) for manifest in manifests.values())
            with pass_bar(self._console, "upload", "shards", shards) as report:
                upload(output.folder, store, manifests, report)
            self._say(f"{output.place} is complete")
        clear(output.folder)

    def _nothing_taken(self, summaries: Sequence[PartSummary]) -> UserError | None:
        """What is wrong with a source of which no document is taken."""
        if any(summary.documents for summary in summaries):
            return None
        name = self.beginning.settings.source
        if any(summary.usable for summary in summaries):
            return UserError(
                f"of {name} no document is taken: raise the weight of a --source, or set another "
                "--seed"
            )
        return no_usable_document(name, _skipped(summaries))

    def _second_pass(
        self, summaries: Sequence[PartSummary], share: TaskShare = ALONE
    ) -> SecondPass:
        settings = self.beginning.settings
        return SecondPass(settings, self._output, summaries, self._console, self.workers, share)

    def _refuse_old_runs(self) -> None:
        if self._output.has_old_runs():
            raise UserError(
                f"an earlier version began {self._output.folder}: delete it, or continue without "
                "--begin, --task and --merge"
            )

    def _say(self, line: str) -> None:
        say(self._console, line)

    @property
    def _output(self) -> Output:
        return self.beginning.output

    @property
    def _console(self) -> Console:
        return self.beginning.console


def _place(piece: Piece) -> tuple[int, int]:
    return piece.file, piece.start


def _skipped(summaries: Sequence[PartSummary]) -> Counter[str]:
    return sum((Counter(summary.skipped) for summary in summaries), Counter())
