"""Divides the keys into ranges, and counts what each range holds.

A range holds about `RANGE_TOKENS` tokens. Counts come from the runs' keys, splits and offsets
alone. Their prefix sums place every range in the streams, so ranges can be packed independently of
each other, in any order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.runs import Run
from data_prep.shuffle import HASH_END
from data_prep.workers import Report, run_jobs

RANGE_TOKENS = 1 << 25
WORKER_TOKENS = 1 << 28
"""A process that packs has at least so many tokens: its start takes as long as 30 million do."""

_COUNTED_FASTER = 32
"""How much faster tokens are counted than packed, at the least."""

_COUNTS_PER_WORKER = 4

Item = TypeVar("Item")


def number_of_ranges(tokens: int) -> int:
    """Ranges for so many tokens: a function of the source and the settings alone."""
    return max(1, -(-tokens // RANGE_TOKENS))


def edge(number: int, ranges: int) -> int:
    """The first key of range `number` of so many: the end of the keys for `number == ranges`."""
    return HASH_END * number // ranges


@dataclass(frozen=True)
class Partition:
    """Consecutive ranges, and the runs that hold all their documents."""

    ranges: range
    runs: Sequence[Path]


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


@dataclass(frozen=True)
class CountTask:
    """Counts documents and tokens of runs, by split and range."""

    ranges: int
    splits: tuple[range, ...]
    """For each split, the range of its hashes."""

    def start(self, report: Report) -> Callable[[Partition], NDArray[np.int64]]:
        """A function from some runs of a partition to int64 [splits, 2, ranges of the partition]:
        documents and tokens."""

        def count(part: Partition) -> NDArray[np.int64]:
            total = np.zeros((len(self.splits), 2, len(part.ranges)), np.int64)
            for path in part.runs:
                total += self._count(Run(path), part.ranges)
                report(1, 0)
            return total

        return count

    def _count(self, run: Run, ranges: range) -> NDArray[np.int64]:
        edges = [edge(number, self.ranges) for number in (*ranges, ranges.stop)]
        cuts = np.searchsorted(run.high, np.array(edges))
        lengths = np.diff(run.bounds(0, len(run.high)))
        found = np.empty((len(self.splits), 2, len(ranges)), np.int64)
        splits = run.splits(0, len(run.split))
        for counts, hashes in zip(found, self.splits, strict=True):
            inside = (splits >= hashes.start) & (splits < hashes.stop)
            for row, numbers in zip(counts, (inside, inside * lengths), strict=True):
                ends = np.concatenate(([0], np.cumsum(numbers)))
                row[:] = np.diff(ends[cuts])
        return found


def count_all(
    task: CountTask, partitions: Sequence[Partition], workers: int, report: Report
) -> list[Counts]:
    """Count all runs; returns the counts of each split."""
    parts = max(1, _COUNTS_PER_WORKER * workers // len(partitions))
    jobs = [Partition(p.ranges, runs) for p in partitions for runs in divided(p.runs, parts)]
    total = np.zeros((len(task.splits), 2, task.ranges), np.int64)
    for job, found in zip(jobs, run_jobs(task, jobs, workers, report), strict=True):
        total[:, :, job.ranges.start : job.ranges.stop] += found
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

    A block lies in one partition and opens each run of it once, and at most once each run of the
    next partitions whose first documents complete its shards. There are about as many blocks as
    workers, or as partitions if those are more, and one more for each gap where ranges are done
    already. So the number of opens grows with the runs, as the shards do.

    Args:
        todo: numbers of the ranges, ascending.
        tokens: how many all partitions hold, about.
    """
    whole = partitions[-1].ranges.stop
    workers = useful_workers(tokens * len(todo) // whole, workers)
    shares = max(1, -(-workers // len(partitions)))
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
