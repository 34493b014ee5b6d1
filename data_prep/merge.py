"""Merges runs where there are too many to read each range from all of them.

Packing maps all runs of a partition at once, and takes a slice of every run for every range. With
more than `MAX_RUNS` runs (beyond 30 billion tokens) these slices get shorter than a document and
their number grows with the square of the corpus. Then runs are merged first: groups of `GROUP_RUNS`
runs become one run for each partition of the keys. The partitions are as many as make a merged run
about as long as a range. Each group is recorded when it is synced, and its old runs are removed, so
merging needs no more disk than one group for each worker.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from data_prep import ranges
from data_prep.evidence import Saved
from data_prep.ranges import Partition, edge, number_of_ranges
from data_prep.runs import RunReader
from data_prep.shuffle import write_run
from data_prep.workers import Report, run_jobs
from i3dist.errors import UserError
from i3dist.files import write_whole

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


class GroupRecord(Saved):
    """The merged runs of a group: the size of each in bytes, by its partition."""

    digest: str
    sizes: Mapping[int, int]


@dataclass(frozen=True)
class MergeTask:
    """Merges groups of runs into `folder`. `digest` tells which runs these are."""

    layout: Layout
    folder: Path
    digest: str

    def start(self, report: Report) -> Callable[[tuple[int, Sequence[Path]]], None]:
        """A function that merges a group, given with its number."""

        def merge(group: tuple[int, Sequence[Path]]) -> None:
            number, paths = group
            sizes = self._merge(number, RunReader(paths), report)
            record = GroupRecord(digest=self.digest, sizes=sizes)
            write_whole(self._record(number), record.model_dump_json().encode())
            _remove(paths)
            report(1, 0)

        return merge

    def _merge(self, number: int, reader: RunReader, report: Report) -> dict[int, int]:
        sizes = {}
        for place in range(self.layout.partitions):
            part = self.layout.partition(place)
            keys = reader.seek(*(edge(n, self.layout.ranges) for n in (part.start, part.stop)))
            if len(keys.order):
                path = self.path(number, place)
                write_run(reader.table(keys.order), path)
                sizes[place] = path.stat().st_size
            report(0, int(keys.lengths.sum()))
        return sizes

    def path(self, group: int, partition: int) -> Path:
        """Path of a merged run."""
        return self.folder / f"group-{group:06d}-partition-{partition:06d}.arrow"

    def finished(self, group: int) -> GroupRecord | None:
        """The record of a group that is merged, and whose runs are there."""
        record = GroupRecord.load(self._record(group))
        if record is None or record.digest != self.digest:
            return None
        paths = {self.path(group, place): size for place, size in record.sizes.items()}
        there = (path.is_file() and path.stat().st_size == size for path, size in paths.items())
        return record if all(there) else None

    def _record(self, group: int) -> Path:
        return self.folder / f"group-{group:06d}.json"


def merged(task: MergeTask, runs: Sequence[Path], workers: int, report: Report) -> list[Partition]:
    """Merge the groups that are not merged yet; returns the partitions. `report` counts groups."""
    layout = task.layout
    if not layout.groups:
        return [Partition(range(layout.ranges), runs)]
    task.folder.mkdir(exist_ok=True)
    todo = []
    for number in range(layout.groups):
        group = runs[number * GROUP_RUNS : (number + 1) * GROUP_RUNS]
        if task.finished(number):
            _remove(group)  # a run that was killed may have left them
        else:
            todo.append((number, group))
    report(layout.groups - len(todo), 0)
    if not all(path.exists() for _, group in todo for path in group):
        folder = task.folder.parent.parent
        raise UserError(f"files in {task.folder} are missing: delete {folder} and make it again")
    run_jobs(task, todo, workers, report)
    held: list[list[Path]] = [[] for _ in range(layout.partitions)]
    for number in range(layout.groups):
        record = task.finished(number)
        assert record
        for place in record.sizes:
            held[place].append(task.path(number, place))
    return [Partition(layout.partition(place), paths) for place, paths in enumerate(held)]


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
