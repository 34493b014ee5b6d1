"""Divides the keys into ranges, and counts what each range holds.

A range holds about `RANGE_TOKENS` tokens. Counts come from the runs' keys, splits and offsets
alone. Their prefix sums place every range in the streams, so ranges can be packed independently of
each other, in any order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from data_prep.arguments import Item, TaskShare
from data_prep.runs import Run
from data_prep.shuffle import HASH_END
from data_prep.workers import Report, run_jobs
from i3dist.files import written_aside

RANGE_TOKENS = 1 << 25
WORKER_TOKENS = 1 << 28
"""A process that packs has at least so many tokens: its start takes as long as 30 million do."""

_COUNTED_FASTER = 32
"""How much faster tokens are counted than packed, at the least."""

_GROUP_RUNS, _MOST_GROUPS = 64, 256
"""Runs that are counted together, unless that makes more groups; each makes a file."""


def number_of_ranges(tokens: int) -> int:
    """Ranges for so many tokens: a function of the source and the settings alone."""
    return max(1, -(-tokens // RANGE_TOKENS))


def edge(number: int, ranges: int) -> int:
    """The first key of range `number` of so many: the end of the keys for `number == ranges`."""
    return HASH_END * number // ranges


@dataclass(frozen=True)
class Partition:
    """Consecutive ranges, and runs that hold all that packing them reads.

    `is_merged` runs are of this partition alone, and of no use once it is packed.
    """

    ranges: range
    runs: Sequence[Path]
    is_merged: bool = False


@dataclass(frozen=True)
class Counts:
    """Where each range lies in the stream of a split: int64 [ranges + 1] each; the last is the end.

    `documents` are the numbers of the first documents, `tokens` those of the first tokens.
    """

    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> "Counts":
        """From the numbers of documents and tokens of each range: int64 [2, ranges]."""
        ends = np.cumsum(counts, axis=1)
        return cls(*np.pad(ends, ((0, 0), (1, 0))))


RunGroup = tuple[int, Sequence[Path]]
"""The number of a group of runs, and the runs."""


@dataclass(frozen=True)
class CountTask:
    """Counts documents and tokens of groups of runs, by split and range, into files in `folder`.

    A group is counted unless it is counted already, by another task perhaps.
    """

    ranges: int
    splits: tuple[range, ...]
    """For each split, the range of its hashes."""
    folder: Path

    def start(self, report: Report) -> Callable[[RunGroup], None]:
        """A function that counts a group; `report` counts runs."""

        def count(group: RunGroup) -> None:
            number, paths = group
            if self.counted(number) is not None:
                report(len(paths), 0)
                return
            total = np.zeros((len(self.splits), 2, self.ranges), np.int64)
            for path in paths:
                total += self._count(Run(path))
                report(1, 0)
            with written_aside(self._path(number)) as partial, partial.open("wb") as file:
                np.savez(file, total)

        return count

    def counted(self, group: int) -> NDArray[np.int64] | None:
        """Documents and tokens of a group: int64 [splits, 2, ranges]; None if it is not counted."""
        try:
            with np.load(self._path(group)) as file:  # a zip archive, so it has checksums
                found: NDArray[np.int64] = file["arr_0"]
        except (FileNotFoundError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        return found

    def _path(self, group: int) -> Path:
        return self.folder / f"group-{group:06d}.npz"

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return np.array([edge(number, self.ranges) for number in range(self.ranges + 1)])

    def _count(self, run: Run) -> NDArray[np.int64]:
        cuts = np.searchsorted(run.high, self._edges)
        lengths = np.diff(run.bounds(0, len(run.high)))
        found = np.empty((len(self.splits), 2, self.ranges), np.int64)
        splits = run.splits(0, len(run.split))
        for counts, hashes in zip(found, self.splits, strict=True):
            inside = (splits >= hashes.start) & (splits < hashes.stop)
            for row, numbers in zip(counts, (inside, inside * lengths), strict=True):
                ends = np.concatenate(([0], np.cumsum(numbers)))
                row[:] = np.diff(ends[cuts])
        return found


def count_all(
    task: CountTask, runs: Sequence[Path], share: TaskShare, workers: int, report: Report
) -> list[Counts]:
    """Count the runs that are not counted yet; returns the counts of each split."""
    task.folder.mkdir(parents=True, exist_ok=True)
    groups = list(enumerate(divided(runs, min(_MOST_GROUPS, -(-len(runs) // _GROUP_RUNS)))))
    run_jobs(task, share.first(groups), workers, report)
    total = np.zeros((len(task.splits), 2, task.ranges), np.int64)
    for number, _ in groups:
        found = task.counted(number)
        assert found is not None
        total += found
    return [Counts.of(counts) for counts in total]


def divided(items: Sequence[Item], parts: int) -> Iterator[Sequence[Item]]:
    """Consecutive, about equal, nonempty parts of a sequence; at most so many."""
    parts = min(parts, len(items))
    for number in range(parts):
        yield items[len(items) * number // parts : len(items) * (number + 1) // parts]


def useful_workers(tokens: int, workers: int) -> int:
    """Processes for so many tokens, at most `workers`."""
    return max(1, min(workers, tokens // WORKER_TOKENS))


def counting_workers(tokens: int, workers: int) -> int:
    """Processes to count so many tokens, at most `workers`."""
    return useful_workers(tokens // _COUNTED_FASTER, workers)


def blocks(
    partitions: Sequence[Partition], todo: Sequence[int], tokens: int, workers: int
) -> list[range]:
    """Share ranges that are to be packed out among so many workers, as blocks of neighbors.

    A block lies in one partition and opens each run of it once. There are about as many blocks as
    workers, or as partitions if those are more, and one more for each gap where ranges are done
    already. So the number of opens grows with the runs, as the shards do.

    Args:
        partitions: all that have a range of `todo`.
        todo: numbers of the ranges, ascending.
        tokens: how many these hold, about.
        workers: processes that may work at once.
    """
    shares = -(-useful_workers(tokens, workers) // max(1, len(partitions)))
    return [
        block
        for partition in partitions
        for share in divided([n for n in todo if n in partition.ranges], shares)
        for block in _neighbors(share)
    ]


def _neighbors(numbers: Sequence[int]) -> Iterator[range]:
    """Ascending numbers as ranges without gaps."""
    gaps = [place for place in range(1, len(numbers)) if numbers[place] > numbers[place - 1] + 1]
    for start, stop in pairwise((0, *gaps, len(numbers))):
        yield range(numbers[start], numbers[stop - 1] + 1)
