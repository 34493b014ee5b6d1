"""The two passes over the documents: spill them into runs, then count and pack the runs' ranges."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.choice import ALL, Choice
from data_prep.dropped import BySource
from data_prep.evidence import Saved
from data_prep.formats import FORMATS
from data_prep.merge import Layout, MergeTask, merged
from data_prep.output import TRAIN, VALID, Output, OutputSettings
from data_prep.pack import Framing
from data_prep.packing import PackTask, SplitPlan, pack_all
from data_prep.progress import pass_bar
from data_prep.ranges import CountTask, Partition, count_all, counting_workers
from data_prep.shuffle import HALF, HASH_END, PartSummary, Spiller, summary_path
from data_prep.sources import TEXT, Part
from data_prep.workers import Report, run_jobs
from i3dist.data.manifest import Manifest, SourceCounts
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.files import PARTIAL, write_whole

_CUT_SHORT = "a process ended while it read a part"


@dataclass(frozen=True)
class SpillPlan:
    """What pass 1 is to do."""

    parts: Sequence[Part]
    tokenizer: Path
    folder: Path
    seed: int
    format: str = TEXT
    merged: Path | None = None
    """The folder of merged runs: once it exists, runs may be gone."""
    choice: Choice = ALL

    def summary(self, number: int) -> PartSummary | None:
        """The summary of a part; None if the part is not finished, or its runs are not whole."""
        summary, part = PartSummary.load(summary_path(self.folder, number)), self.parts[number]
        if summary is None or summary.identity != part.identity:
            return None
        if not part.is_made_of(summary.pieces):
            return None
        has_runs = self.merged is None or not self.merged.exists()
        return None if has_runs and not summary.is_whole(self.folder) else summary


@dataclass(frozen=True)
class SpillTask:
    """Spills parts, each given with its number."""

    tokenizer: Path
    folder: Path
    seed: int
    format: str
    choice: Choice
    goes_on: bool = False
    """Whether a part that cannot be read leaves the others to be done."""

    def start(self, report: Report) -> Callable[[tuple[int, Part]], UserError | None]:
        """A function that spills a part; returns why it could not, where it `goes_on`."""
        spiller = Spiller(
            Tokenizer.load(self.tokenizer),
            self.folder,
            self.seed,
            lambda tokens: report(0, tokens),
            FORMATS[self.format],
            self.choice,
        )

        def spill(job: tuple[int, Part]) -> UserError | None:
            number, part = job
            path = failure_path(self.folder, number)
            failure = Failure(message=_CUT_SHORT, files=tuple(sorted(part.files)))
            failure.write(path)  # for the case that this process dies
            summary_path(self.folder, number).unlink(missing_ok=True)  # of runs that are lost
            try:
                spiller.spill(part, number)
            except UserError as error:
                failure.model_copy(update={"message": str(error)}).write(path)
                if not self.goes_on:
                    raise
                return error
            path.unlink(missing_ok=True)
            report(1, 0)
            return None

        return spill


def spill_all(plan: SpillPlan, workers: int, report: Report) -> list[PartSummary]:
    """Spill the parts that are not finished yet; returns the summaries of all parts."""
    todo = _unfinished(plan, range(len(plan.parts)))
    report(len(plan.parts) - len(todo), 0)
    task = SpillTask(plan.tokenizer, plan.folder, plan.seed, plan.format, plan.choice)
    run_jobs(task, todo, workers, report)
    return [summary for summary in finished(plan) if summary]


def spill_some(
    plan: SpillPlan, numbers: Sequence[int], workers: int, report: Report
) -> list[UserError]:
    """Spill those of these parts that are not finished yet; returns what is wrong with others."""
    todo = _unfinished(plan, numbers)
    report(len(numbers) - len(todo), 0)
    task = SpillTask(plan.tokenizer, plan.folder, plan.seed, plan.format, plan.choice, goes_on=True)
    return [error for error in run_jobs(task, todo, workers, report, _worker_died) if error]


def _worker_died(job: tuple[int, Part]) -> UserError:
    return UserError(
        f"the worker process of part {job[0]} died (out of memory?); try fewer --workers"
    )


def _unfinished(plan: SpillPlan, numbers: Sequence[int]) -> list[tuple[int, Part]]:
    """Parts to be spilled with their numbers: new ones, then failed ones from the oldest failure.

    So a part that ends its process, for want of memory perhaps, does so when the others are done.
    What a killed process has left of these parts is removed.
    """
    todo = [number for number in numbers if not plan.summary(number)]
    todo.sort(key=lambda number: failed_at(plan.folder, number))
    unfinished = set(todo)
    for path in plan.folder.glob(f".part-*{PARTIAL}"):
        if int(path.name.split("-")[1].split(".")[0]) in unfinished:
            path.unlink(missing_ok=True)
    return [(number, plan.parts[number]) for number in todo]


class Failure(Saved):
    """Why a part that was begun is not finished, and the numbers of the files that it reads."""

    message: str
    files: tuple[int, ...]

    def write(self, path: Path) -> None:
        """Write it down; it is removed when the part is finished."""
        write_whole(path, self.model_dump_json().encode())


def failure_path(folder: Path, number: int) -> Path:
    """Path of the record of a failure to read part `number`."""
    return summary_path(folder, number).with_suffix(".failed")


def failed_at(folder: Path, number: int) -> int:
    """When part `number` failed, in ns; 0 if it did not."""
    try:
        return failure_path(folder, number).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def failures(folder: Path) -> list[Failure]:
    """What is wrong with parts that are not finished, in the order of their numbers."""
    paths = sorted(folder.glob("part-*.failed"))
    found = (Failure.load(path) for path in paths if not path.with_suffix(".json").exists())
    return [failure for failure in found if failure]


def finished(plan: SpillPlan) -> list[PartSummary | None]:
    """The summary of each part; None if the part is not finished."""
    return [plan.summary(number) for number in range(len(plan.parts))]


def forget_parts_of(
    plan: SpillPlan, touched: frozenset[int], broken: frozenset[int]
) -> frozenset[int]:
    """Forget the parts of touched files that were read only in part, so that all is read again.

    `broken` files are some of which a part could not be read. Returns the touched files that are to
    be read.
    """
    parts = list(zip(plan.parts, finished(plan), strict=True))
    done = {number: part for number, (part, summary) in enumerate(parts) if summary}
    read_in_part = {file for part, summary in parts if not summary for file in part.files}
    unread = touched & (read_in_part | broken)
    while mixed := [n for n, part in done.items() if part.files & unread]:
        for number in mixed:
            summary_path(plan.folder, number).unlink()
            unread |= touched & done.pop(number).files
    return unread


def split_ranges(summaries: Sequence[PartSummary], valid_fraction: float) -> tuple[range, range]:
    """The ranges of split hashes of (train, valid), each of which gets a document.

    The smallest hash is always in valid and the largest in train, whatever the fraction.

    Raises:
        UserError: the corpus has only one text, which cannot be split.
    """
    if not valid_fraction:
        return range(HASH_END), range(0)
    smallest = min(summary.smallest_split for summary in summaries)
    largest = max(summary.largest_split for summary in summaries)
    if smallest == largest:
        raise UserError(
            "a validation split needs two different documents and the source has one: "
            "give it more and another --out, or set --valid-fraction 0"
        )
    bound = min(max(int(valid_fraction * HASH_END), smallest + 1), largest)
    return range(bound, HASH_END), range(bound)


def halves(summaries: Sequence[PartSummary], settings: OutputSettings) -> tuple[range, range]:
    """The ranges of split hashes of (train, valid), where each has a source of its own.

    Raises:
        UserError: nothing is left of one of the sources.
    """
    has_valid = any(summary.smallest_split < HALF for summary in summaries)
    has_train = any(summary.largest_split >= HALF for summary in summaries)
    if not has_valid or not has_train:
        option, name = ("source", settings.source) if has_valid else ("valid", settings.valid)
        raise UserError(
            f"no document of --{option} {name} is left: choose less strictly, or name another, "
            "and another --out"
        )
    return range(HALF, HASH_END), range(HALF)


def framed_tokens(summaries: Sequence[PartSummary]) -> int:
    """Tokens of all documents with <BOS> and <EOS>."""
    return sum(summary.tokens + 2 * summary.documents for summary in summaries)


@dataclass(frozen=True)
class SecondPass:
    """Packs the runs of the first pass into the splits of an output, whose settings are whole."""

    settings: OutputSettings
    output: Output
    console: Console
    workers: int
    sources: tuple[SourceCounts, ...] | None = None

    def run(
        self, summaries: Sequence[PartSummary], dropped: Mapping[str, BySource]
    ) -> dict[str, Manifest]:
        """Merge runs if they are too many, count, and pack; returns the manifests by split.

        `dropped` tells for each split what was dropped of its sources.
        """
        tokenizer = Tokenizer.load(self.output.tokenizer)
        assert self.settings.chunks_per_shard
        framing = Framing(
            chunk_length=self.settings.chunk_length,
            chunks_per_shard=self.settings.chunks_per_shard,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            dtype=self.settings.token_type(tokenizer.vocab_size).name,
        )
        self.output.take_back()
        tokens = framed_tokens(summaries)
        partitions = self._merge(summaries, tokens)
        splits = self._count(summaries, partitions, tokens)
        digest = digest_of((self.settings.model_dump_json(), tokenizer.sha256, splits), summaries)
        task = PackTask(partitions, splits, framing, self.output.work, digest)
        with pass_bar(self.console, "pack", "ranges", task.ranges) as report:
            shards = pack_all(task, self.workers, report)
        origin: dict[str, Any] = {
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "seed": self.settings.seed,
        }
        return {
            split.name: split.manifest(
                framing, shards[split.name], origin | self._origin(split.name, dropped)
            )
            for split in splits
        }

    def _origin(self, split: str, dropped: Mapping[str, BySource]) -> dict[str, object]:
        """What the manifest of a split says of its source."""
        has_own = self.settings.valid is not None and split == VALID
        return {
            "source": self.settings.source_of(split),
            "sources": None if has_own else self.sources,
            "dropped": dropped[split] if self.settings.chooses else None,
        }

    def _merge(self, summaries: Sequence[PartSummary], tokens: int) -> list[Partition]:
        paths = [self.output.runs / name for summary in summaries for name in summary.runs]
        layout = Layout.of(tokens, len(paths))
        task = MergeTask(layout, self.output.merged_runs, digest_of((layout,), summaries))
        if not layout.groups:
            return merged(task, paths, self.workers, lambda *_: None)
        with pass_bar(self.console, "merge", "groups of runs", layout.groups) as report:
            return merged(task, paths, self.workers, report)

    def _count(
        self, summaries: Sequence[PartSummary], partitions: Sequence[Partition], tokens: int
    ) -> list[SplitPlan]:
        """Count what each range of keys holds of each split."""
        if self.settings.valid:
            train, valid = halves(summaries, self.settings)
        else:
            train, valid = split_ranges(summaries, self.settings.valid_fraction)
        hashes = {TRAIN: train, VALID: valid}
        splits = {name: hashes[name] for name in self.settings.splits}
        task = CountTask(partitions[-1].ranges.stop, tuple(splits.values()))
        runs = sum(len(partition.runs) for partition in partitions)
        with pass_bar(self.console, "count", "runs", runs) as report:
            counts = count_all(task, partitions, counting_workers(tokens, self.workers), report)
        return [SplitPlan(*item, found) for item, found in zip(splits.items(), counts, strict=True)]


def digest_of(parts: Iterable[object], summaries: Sequence[PartSummary]) -> str:
    """SHA-256 of some parts and of what pass 1 has read: all that decides the bytes of a step."""
    digest = hashlib.sha256()
    for part in (*parts, *(summary.model_dump_json() for summary in summaries)):
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()
