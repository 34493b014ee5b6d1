"""Exact deduplication: of documents whose normalized texts are equal, only the first stays.

The first is that of the earliest place in the source, so it is the same for any number of workers.
The hashes that pass 1 has written beside the runs are sorted in three steps, in bounded memory,
each in any number of processes:

1. runs are grouped, and the hashes of a group are sorted into one file;
2. the hashes are divided into ranges. The entries of a range are gathered from all groups, and the
   duplicates among them are found;
3. the duplicates of a group's documents are gathered from all ranges, and marked beside their runs.
   Whoever reads a run leaves them out.

There are as many ranges as groups, each of about `GROUP_DOCUMENTS` hashes. So two files are opened
for each pair of a group and a range: 260,000 for 1.5 billion documents.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.arguments import ALONE, TaskShare
from data_prep.evidence import Saved
from data_prep.runs import Run, write_marks
from data_prep.shuffle import HASH_END, PartSummary
from data_prep.sources import Skip
from data_prep.text_hash import HASH, read_hashes
from data_prep.workers import Report, Task, run_jobs
from i3dist.files import write_whole, written_aside

GROUP_DOCUMENTS = 1 << 22
STEPS = 3

Rows = NDArray[np.void]
"""A row for each document: of `ENTRY`, or of `MARK`."""

MARK = np.dtype([("part", "<u4"), ("run", "<u4"), ("row", "<u4")])
"""Where a document is on disk: its part, the number of its run in the part, its row in the run."""

ENTRY = np.dtype([*HASH.descr, *MARK.descr])


RunNumber = tuple[int, int]
"""Number of a part, and of a run in it."""


class Kept(Saved):
    """What is left of a part, or of some of its runs."""

    documents: int
    tokens: int
    smallest_split: int
    largest_split: int

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            smallest_split=min(self.smallest_split, other.smallest_split),
            largest_split=max(self.largest_split, other.largest_split),
        )


class GroupResult(Saved):
    """What is left of the runs of a group whose duplicates are marked, by part."""

    parts: Mapping[int, Kept]


@dataclass(frozen=True)
class Deduplication:
    """Marks the duplicates among the documents of all parts.

    Several tasks may do this at once, each of which begins with its `share`. What others have done
    meanwhile is not done again.
    """

    summaries: Sequence[PartSummary]
    runs: Path
    folder: Path
    """For what is done, and is of these summaries alone."""
    share: TaskShare = ALONE

    @cached_property
    def groups(self) -> list[list[RunNumber]]:
        """All runs, in order, in groups of about `GROUP_DOCUMENTS`."""
        groups: list[list[RunNumber]] = [[]]
        held = 0.0
        for part, summary in enumerate(self.summaries):
            for number in range(len(summary.runs)):
                size = summary.documents / len(summary.runs)
                if groups[-1] and held + size > GROUP_DOCUMENTS:
                    groups.append([])
                    held = 0.0
                groups[-1].append((part, number))
                held += size
        return groups

    def run(self, workers: int, report: Report) -> list[PartSummary]:
        """Do what is not done yet; returns the summaries of what is left. `report` counts steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = range(len(self.groups))
        todo = [number for number in numbers if not self.result(number)]
        report(STEPS * (len(numbers) - len(todo)), 0)
        if todo:
            self._do(Sorting(self), [n for n in numbers if not self.sorted(n).exists()], workers)
            report(len(todo), 0)
            self._do(Finding(self), [n for n in numbers if not self.found(n).exists()], workers)
            report(len(todo), 0)
            self._do(Marking(self), todo, workers)
            report(len(todo), 0)
        return self._left()

    def clear(self) -> None:
        """Remove what is of no use when every group is marked, and no other task is at work."""
        for path in self.folder.glob("*.npy"):
            path.unlink()

    def _do(self, task: Task[int, None], numbers: Sequence[int], workers: int) -> None:
        run_jobs(task, self.share.first(numbers), workers, lambda *_: None)

    def _left(self) -> list[PartSummary]:
        left: dict[int, Kept] = {}
        for number in range(len(self.groups)):
            result = self.result(number)
            assert result
            for part, kept in result.parts.items():
                left[part] = left[part] + kept if part in left else kept
        summaries = list(self.summaries)
        for part, kept in left.items():
            summary = summaries[part]
            if dropped := summary.documents - kept.documents:
                skipped = {**summary.skipped, Skip.DUPLICATE.value: dropped}
                update = {**kept.model_dump(), "skipped": skipped}
                summaries[part] = summary.model_copy(update=update)
        return summaries

    def result(self, group: int) -> GroupResult | None:
        """The result of a group; None if its duplicates are not marked yet."""
        return GroupResult.load(self.result_path(group))

    def result_path(self, group: int) -> Path:
        """Path of the result of a group."""
        return self.folder / f"group-{group:06d}.json"

    def sorted(self, group: int) -> Path:
        """Path of the entries of a group, sorted by hash."""
        return self.folder / f"group-{group:06d}.npy"

    def found(self, number: int) -> Path:
        """Path of the duplicates in a range of hashes, sorted by run."""
        return self.folder / f"range-{number:06d}.npy"

    def path(self, run: RunNumber) -> Path:
        """Path of a run."""
        part, number = run
        return self.runs / self.summaries[part].runs[number]


@dataclass(frozen=True)
class Sorting:
    """Step 1, for a group."""

    plan: Deduplication

    def start(self, report: Report) -> Callable[[int], None]:
        """A function that sorts the entries of a group."""
        return self._sort

    def _sort(self, group: int) -> None:
        if self.plan.sorted(group).exists():
            return
        tables = [np.empty(0, ENTRY)]
        for part, number in self.plan.groups[group]:
            found = read_hashes(self.plan.path((part, number)))
            table = np.empty(len(found), ENTRY)
            for name in HASH.names or ():
                table[name] = found[name]
            table["part"], table["run"], table["row"] = part, number, np.arange(len(found))
            tables.append(table)
        entries = np.concatenate(tables)
        _save(self.plan.sorted(group), entries[np.argsort(entries["high"])])


@dataclass(frozen=True)
class Finding:
    """Step 2, for a range of hashes."""

    plan: Deduplication

    def start(self, report: Report) -> Callable[[int], None]:
        """A function that finds the duplicates in a range."""
        return self._find

    def _find(self, number: int) -> None:
        if self.plan.found(number).exists():
            return
        count = len(self.plan.groups)
        edges = [(1 << 64) * n // count for n in (number, number + 1)]
        paths = map(self.plan.sorted, range(count))
        found = duplicates(np.concatenate([_slice(path, _high, *edges) for path in paths]))
        _save(self.plan.found(number), _in_order(found))


def duplicates(entries: Rows) -> Rows:
    """Where those are whose hash is that of an earlier one: `MARK` [N].

    Entries of the same part and place are one document.
    """
    order = np.argsort(entries["high"])
    high = entries["high"][order]
    is_equal = high[1:] == high[:-1]
    has_equal = np.zeros(len(order), bool)
    has_equal[1:] |= is_equal
    has_equal[:-1] |= is_equal
    # Few are left, and these are sorted by all that counts.
    found = entries[order[has_equal]]
    found = found[np.lexsort([found[name] for name in ("place", "part", "low", "high")])]
    begins = np.ones(len(found), bool)
    begins[1:] = (found["high"][1:] != found["high"][:-1]) | (found["low"][1:] != found["low"][:-1])
    first = found[begins][np.cumsum(begins) - 1]
    is_later = (found["part"] != first["part"]) | (found["place"] != first["place"])
    marks = np.empty(int(is_later.sum()), MARK)
    for name in MARK.names or ():
        marks[name] = found[name][is_later]
    return marks


@dataclass(frozen=True)
class Marking:
    """Step 3, for a group."""

    plan: Deduplication

    def start(self, report: Report) -> Callable[[int], None]:
        """A function that marks the duplicates of a group."""
        return self._mark

    def _mark(self, group: int) -> None:
        if self.plan.result(group):
            return
        runs = self.plan.groups[group]
        paths = map(self.plan.found, range(len(self.plan.groups)))
        found = [_slice(path, _run_number, runs[0], _after(runs[-1])) for path in paths]
        marks = _in_order(np.concatenate(found))
        result: dict[int, Kept] = {}
        for run in runs:
            start, stop = (bisect_left(marks, edge, key=_run_number) for edge in (run, _after(run)))
            write_marks(self.plan.path(run), marks["row"][start:stop])
            kept = _kept(Run(self.plan.path(run)))
            result[run[0]] = result[run[0]] + kept if run[0] in result else kept
        record = GroupResult(parts=result)
        write_whole(self.plan.result_path(group), record.model_dump_json().encode())


def _kept(run: Run) -> Kept:
    """What is left of a run."""
    split = run.splits(0, len(run.split))
    kept = split < HASH_END
    return Kept(
        documents=int(kept.sum()),
        tokens=int((np.diff(run.bounds(0, len(split)))[kept] - 2).sum()),
        smallest_split=int(split[kept].min(initial=HASH_END)),
        largest_split=int(split[kept].max(initial=-1)),
    )


def _in_order(marks: Rows) -> Rows:
    return marks[np.lexsort([marks[name] for name in ("row", "run", "part")])]


def _after(run: RunNumber) -> RunNumber:
    part, number = run
    return part, number + 1


def _run_number(row: Any) -> RunNumber:
    return int(row["part"]), int(row["run"])


def _high(row: Any) -> int:
    return int(row["high"])


def _slice(path: Path, key: Callable[[Any], Any], start: Any, stop: Any) -> Rows:
    """The rows of a file, sorted by a key, whose key is in [start, stop)."""
    rows: Rows = np.load(path, mmap_mode="r")
    first, last = (bisect_left(rows, edge, key=key) for edge in (start, stop))
    return np.array(rows[first:last])


def _save(path: Path, rows: Rows) -> None:
    with written_aside(path) as partial, partial.open("wb") as file:
        np.save(file, rows)
