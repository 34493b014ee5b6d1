"""Exact deduplication: of documents whose normalized texts are equal, only the first stays.

The first is that of the earliest place in the source, so it is the same for any number of workers.
The hashes that pass 1 has written beside the runs are sorted in three steps, in bounded memory,
each in any number of processes:

1. parts of the source are grouped, and the hashes of a group are sorted into one file;
2. the hashes are divided into ranges. The entries of a range are gathered from all groups, and the
   duplicates among them are found;
3. the duplicates of a group's documents are gathered from all ranges, and marked beside their runs.
   Whoever reads a run leaves them out.

There are as many ranges as groups, each of about `GROUP_DOCUMENTS` hashes. So two files are opened
for each pair of a group and a range: 260,000 for 1.5 billion documents.
"""

import shutil
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.evidence import Saved
from data_prep.runs import Run, write_marks
from data_prep.shuffle import HASH_END, PartSummary
from data_prep.sources import Skip
from data_prep.text_hash import HASH, read_hashes
from data_prep.workers import Report, Task, run_jobs
from i3dist.data.manifest import TOKEN_BYTES
from i3dist.files import write_whole, written_aside

GROUP_DOCUMENTS = 1 << 22
STEPS = 3

Rows = NDArray[np.void]
"""A row for each document: of `ENTRY`, or of `MARK`."""

MARK = np.dtype([("part", "<u4"), ("run", "<u4"), ("row", "<u4")])
"""Where a document is on disk: its part, the number of its run in the part, its row in the run."""

ENTRY = np.dtype([*HASH.descr, *MARK.descr])


class Kept(Saved):
    """What is left of a part."""

    documents: int
    tokens: int
    smallest_split: int
    largest_split: int


class GroupResult(Saved):
    """What is left of the parts of a group that had duplicates, by number."""

    parts: Mapping[int, Kept]


@dataclass(frozen=True)
class Deduplication:
    """Marks the duplicates among the documents of all parts.

    `digest` is of all that pass 1 has read: it tells whether work in `folder` is of the same runs.
    """

    summaries: Sequence[PartSummary]
    runs: Path
    folder: Path
    digest: str

    @cached_property
    def groups(self) -> list[range]:
        """Consecutive numbers of parts."""
        cuts, held = [0], 0
        for number, summary in enumerate(self.summaries):
            if held and held + summary.documents > GROUP_DOCUMENTS:
                cuts.append(number)
                held = 0
            held += summary.documents
        return [range(*cut) for cut in zip(cuts, [*cuts[1:], len(self.summaries)], strict=True)]

    def run(self, workers: int, report: Report) -> list[PartSummary]:
        """Do what is not done yet; returns the summaries of what is left. `report` counts steps."""
        self._begin()
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
        for number in numbers:  # every group is marked, so these are of no more use
            self.sorted(number).unlink(missing_ok=True)
            self.found(number).unlink(missing_ok=True)
        return self._left()

    def _do(self, task: Task[int, None], numbers: Sequence[int], workers: int) -> None:
        run_jobs(task, numbers, workers, lambda *_: None)

    def _begin(self) -> None:
        path = self.folder / "digest"
        if not path.exists() or path.read_text() != self.digest:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_whole(path, self.digest.encode())

    def _left(self) -> list[PartSummary]:
        summaries = list(self.summaries)
        for number in range(len(self.groups)):
            result = self.result(number)
            assert result
            for part, kept in result.parts.items():
                dropped = summaries[part].documents - kept.documents
                skipped = {**summaries[part].skipped, Skip.DUPLICATE.value: dropped}
                update = {**kept.model_dump(), "skipped": skipped}
                summaries[part] = summaries[part].model_copy(update=update)
        return summaries

    def result(self, group: int) -> GroupResult | None:
        """The result of a group whose duplicates are marked."""
        return GroupResult.load(self.result_path(group))

    def result_path(self, group: int) -> Path:
        """Path of the result of a group."""
        return self.folder / f"group-{group:06d}.json"

    def sorted(self, group: int) -> Path:
        """Path of the entries of a group, sorted by hash."""
        return self.folder / f"group-{group:06d}.npy"

    def found(self, number: int) -> Path:
        """Path of the duplicates in a range of hashes, sorted by part."""
        return self.folder / f"range-{number:06d}.npy"

    def run_paths(self, part: int) -> list[Path]:
        """Paths of the runs of a part."""
        return [self.runs / name for name in self.summaries[part].runs]


@dataclass(frozen=True)
class Sorting:
    """Step 1, for a group."""

    plan: Deduplication

    def start(self, report: Report) -> Callable[[int], None]:
        """A function that sorts the entries of a group."""
        return self._sort

    def _sort(self, group: int) -> None:
        tables = [np.empty(0, ENTRY)]
        for part in self.plan.groups[group]:
            for number, path in enumerate(self.plan.run_paths(part)):
                found = read_hashes(path)
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
        count = len(self.plan.groups)
        edges = [(1 << 64) * n // count for n in (number, number + 1)]
        paths = map(self.plan.sorted, range(count))
        entries = np.concatenate([_slice(path, "high", *edges) for path in paths])
        found = duplicates(entries)
        _save(self.plan.found(number), found[np.argsort(found["part"])])


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
        parts = self.plan.groups[group]
        paths = map(self.plan.found, range(len(self.plan.groups)))
        marks = np.sort(
            np.concatenate([_slice(path, "part", parts.start, parts.stop) for path in paths])
        )
        result = {}
        for part in parts:
            marked = marks[slice(*np.searchsorted(marks["part"], (part, part + 1)))]
            for number, path in enumerate(self.plan.run_paths(part)):
                write_marks(path, marked["row"][marked["run"] == number])
            if len(marked):
                result[part] = _kept(self.plan.run_paths(part))
        record = GroupResult(parts=result)
        write_whole(self.plan.result_path(group), record.model_dump_json().encode())


def _kept(paths: Sequence[Path]) -> Kept:
    """What is left in the runs of a part."""
    documents = tokens = 0
    smallest, largest = HASH_END, -1
    for path in paths:
        run = Run(path)
        split = run.splits(0, len(run.split))
        kept = split < HASH_END
        documents += int(kept.sum())
        tokens += int((np.diff(run.offsets)[kept] // TOKEN_BYTES - 2).sum())
        smallest = min(smallest, int(split[kept].min(initial=HASH_END)))
        largest = max(largest, int(split[kept].max(initial=-1)))
    return Kept(documents=documents, tokens=tokens, smallest_split=smallest, largest_split=largest)


def _slice(path: Path, name: str, start: int, stop: int) -> Rows:
    """The rows of a file, sorted by a field, in which the field is in [start, stop)."""
    rows: Rows = np.load(path, mmap_mode="r")
    first, last = (
        bisect_left(rows, edge, key=lambda row: int(row[name])) for edge in (start, stop)
    )
    return np.array(rows[first:last])


def _save(path: Path, rows: Rows) -> None:
    with written_aside(path) as partial, partial.open("wb") as file:
        np.save(file, rows)
