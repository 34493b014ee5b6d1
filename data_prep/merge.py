"""Merges runs where there are too many to read each range from all of them.

Packing maps all runs of a partition at once, and takes a slice of every run for every range. With
more than `MAX_RUNS` runs (beyond 30 billion tokens) these slices get shorter than a document and
their number grows with the square of the corpus. Then runs are merged first: groups of `GROUP_RUNS`
runs become one run for each partition of the keys. The partitions are as many as make a merged run
about as long as a range.

A task merges for itself what its own partitions need, so it waits for no other: their ranges, and
the next ones, whose first documents complete their last shards. What is merged is removed once its
partition is packed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from data_prep import ranges
from data_prep.arguments import TaskShare
from data_prep.ranges import Partition, RunGroup, edge, number_of_ranges
from data_prep.runs import RunReader
from data_prep.shuffle import write_run
from data_prep.workers import Report, run_jobs

MAX_RUNS = 2048
GROUP_RUNS = 512


@dataclass(frozen=True)
class Layout:
    """How many ranges, partitions and groups of runs there are; without groups nothing is merged.

    The numbers follow from those of tokens and runs.
    """

    ranges: int
    partitions: int
    groups: int

    @classmethod
    def of(cls, tokens: int, runs: int) -> Self:
        """The layout for so many tokens in so many runs."""
        count = number_of_ranges(tokens)
        if runs <= MAX_RUNS:
            return cls(count, 1, 0)
        groups = -(-runs // GROUP_RUNS)
        return cls(count, min(count, -(-tokens // (groups * ranges.RANGE_TOKENS))), groups)

    def partition(self, number: int) -> range:
        """Numbers of the ranges of a partition."""
        start, stop = (self.ranges * n // self.partitions for n in (number, number + 1))
        return range(start, stop)

    def share(self, share: TaskShare) -> range:
        """Numbers of the ranges that a task packs: whole partitions where runs are merged."""
        if not self.groups:
            return share.block(self.ranges)
        block = share.block(self.partitions)
        return range(*(self.ranges * n // self.partitions for n in (block.start, block.stop)))

    def with_any(self, numbers: Sequence[int]) -> list[int]:
        """Numbers of the partitions that have any of these ranges."""
        held = set(numbers)
        return [n for n in range(self.partitions) if held.intersection(self.partition(n))]


@dataclass(frozen=True)
class MergeTask:
    """Merges groups of runs into `folder`, each into a run for every partition that is needed."""

    layout: Layout
    folder: Path
    needed: Mapping[int, range]
    """For the number of each partition that is needed, the ranges whose documents it gets."""

    def start(self, report: Report) -> Callable[[RunGroup], None]:
        """A function that merges a group; what is merged already stays."""

        def merge(group: RunGroup) -> None:
            number, paths = group
            todo = [place for place in self.needed if not self.path(number, place).exists()]
            reader = RunReader(paths if todo else [])
            for place in todo:
                report(0, self._merge(reader, self.needed[place], self.path(number, place)))
            report(1, 0)

        return merge

    def _merge(self, reader: RunReader, part: range, path: Path) -> int:
        """Write the documents of some ranges as a run, an empty file if there are none."""
        keys = reader.seek(*(edge(n, self.layout.ranges) for n in (part.start, part.stop)))
        if len(keys.order):
            write_run(reader.table(keys.order), path)
        else:
            path.touch()
        return int(keys.lengths.sum())

    def path(self, group: int, partition: int) -> Path:
        """Path of a merged run."""
        return self.folder / f"group-{group:06d}-partition-{partition:06d}.arrow"


def merged(task: MergeTask, runs: Sequence[Path], workers: int, report: Report) -> list[Partition]:
    """Merge what is not merged yet; returns the partitions that are needed.

    `report` counts groups.
    """
    layout = task.layout
    if not layout.groups:
        return [Partition(range(layout.ranges), runs)]
    task.folder.mkdir(parents=True, exist_ok=True)
    groups = [runs[n * GROUP_RUNS : (n + 1) * GROUP_RUNS] for n in range(layout.groups)]
    run_jobs(task, list(enumerate(groups)), workers, report)
    return [
        Partition(layout.partition(place), _written(task, place), is_merged=True)
        for place in task.needed
    ]


def _written(task: MergeTask, partition: int) -> list[Path]:
    """The merged runs of a partition that hold any documents."""
    paths = (task.path(group, partition) for group in range(task.layout.groups))
    return [path for path in paths if path.stat().st_size]
