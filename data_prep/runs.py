"""Reads runs: memory-mapped Arrow files of framed documents, sorted by key.

Beside a run there may be marks: numbers of rows, in order, of documents to leave out.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.shuffle import HASH_END, token_dtype
from i3dist.data.token_types import UINT16, Stored
from i3dist.errors import UserError
from i3dist.files import write_whole

_HASHES = ("high", "low", "split")
_LIBC = ctypes.CDLL(None, use_errno=True)


def int64_array(numbers: NDArray[np.int64]) -> pa.Array:
    """An Arrow array over the same memory. `pa.array` would take 0.2 s to import pandas first."""
    buffer = pa.py_buffer(np.ascontiguousarray(numbers, np.int64))
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, buffer])


class Run:
    """One run, as one record batch. It is mapped; no file stays open.

    `high`, `low` and `split` are the documents' hashes, int64 [rows]. `tokens` are those of all
    documents, as shards store them. `offsets`, int64 [rows + 1], tell where each document's tokens
    begin in them, in bytes, and where the last ones end.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(os.fsencode(path)) as file:
            self._bytes = file.read_buffer()
        try:
            self.batch = pa.ipc.open_file(pa.BufferReader(self._bytes)).get_batch(0)
        except pa.ArrowException:
            folder = path.parent.parent.parent
            raise UserError(f"{path} is damaged: delete {folder} and make it again") from None
        self.high, self.low, self.split, self.offsets = (
            np.frombuffer(self.batch[name].buffers()[1], np.int64) for name in (*_HASHES, "tokens")
        )
        self.tokens = np.frombuffer(
            self.batch["tokens"].buffers()[2], token_dtype(self.batch.schema)
        )
        self._marks = _read_marks(path)
        self._place = ctypes.c_void_p(self._bytes.address), ctypes.c_size_t(self._bytes.size)

    def bounds(self, first: int, last: int) -> NDArray[np.int64]:
        """Where documents `first` to `last` begin in `tokens`, in tokens: [last - first + 1]."""
        return self.offsets[first : last + 1] // self.tokens.itemsize

    def splits(self, first: int, last: int) -> NDArray[np.int64]:
        """The hashes of some rows that decide the split; `HASH_END` if a row is left out."""
        split = self.split[first:last]
        marked = self._marks[slice(*np.searchsorted(self._marks, (first, last)))]
        if len(marked):
            split = split.copy()
            split[marked - first] = HASH_END
        return split

    def release(self) -> None:
        """Let go of the pages that were read, so that they do not count as memory in use."""
        _LIBC.madvise(*self._place, mmap.MADV_DONTNEED)


class Keys(NamedTuple):
    """The documents of a range, in the order of their keys, without those that are left out."""

    order: NDArray[np.int64]
    """[N], for each document its row, counted over the rows of the range in all runs."""
    split: NDArray[np.int64]
    """[N], hashes that decide the split."""
    lengths: NDArray[np.int64]
    """[N], tokens with <BOS> and <EOS>."""


class RunReader:
    """Reads a set of runs range by range. A run is opened once."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._runs = [Run(path) for path in paths]
        self._rows: list[tuple[Run, int, int]] = []
        dtype = self._runs[0].tokens.dtype if self._runs else UINT16.dtype
        self._buffer: Stored = np.empty(0, dtype)

    def seek(self, start: int, stop: int) -> Keys:
        """Go to the documents whose first key number is in [start, stop); returns their keys."""
        for run, *_ in self._rows:
            run.release()
        ends = np.array((start, stop))
        found = ((run, *np.searchsorted(run.high, ends)) for run in self._runs)
        self._rows = [(run, first, last) for run, first, last in found if first < last]
        high, low = (
            _joined([getattr(run, name)[first:last] for run, first, last in self._rows])
            for name in ("high", "low")
        )
        split = _joined([run.splits(first, last) for run, first, last in self._rows])
        order = np.lexsort((low, high)) if len(self._rows) > 1 else np.arange(len(high))
        order = order[split[order] < HASH_END]
        lengths = [np.diff(run.bounds(first, last)) for run, first, last in self._rows]
        return Keys(order, split[order], _joined(lengths)[order])

    def table(self, rows: NDArray[np.int64]) -> pa.Table:
        """All columns of rows of the range."""
        slices = [run.batch[first:last] for run, first, last in self._rows]
        return pa.Table.from_batches(slices).combine_chunks().take(int64_array(rows))

    def labels(self, rows: NDArray[np.int64]) -> tuple[pa.Array, pa.Array]:
        """Ids and urls of rows of the range."""
        picked = int64_array(rows)
        ids, urls = (
            pa.concat_arrays(
                [run.batch.column(name)[first:last] for run, first, last in self._rows]
            ).take(picked)
            for name in ("id", "url")
        )
        return ids, urls

    def tokens(self, rows: NDArray[np.int64]) -> Stored:
        """The tokens of rows of the range, one after the other; they stay until the next call.

        Those of several rows are copied once, from the mapped files into a buffer that is used
        again. Arrow's `concat` and `take` would copy them twice into fresh memory, whose first use
        costs more than a slice for each document does.
        """
        if not len(rows):
            return self._buffer[:0]
        runs = np.repeat(
            np.arange(len(self._rows)), [last - first for _, first, last in self._rows]
        )
        ends = [
            _joined([run.bounds(first + n, last + n - 1) for run, first, last in self._rows])
            for n in (0, 1)
        ]
        starts, stops = (bounds[rows] for bounds in ends)
        values = [run.tokens for run, *_ in self._rows]
        places = zip(runs[rows].tolist(), starts.tolist(), stops.tolist(), strict=True)
        parts = [values[run][start:stop] for run, start, stop in places]
        if len(parts) == 1:  # perhaps of hundreds of megabytes
            return parts[0]
        total = int((stops - starts).sum())
        if len(self._buffer) < total:
            self._buffer = np.empty(total, self._buffer.dtype)
        return np.concatenate(parts, out=self._buffer[:total])


def write_marks(run: Path, rows: NDArray[np.uint32]) -> None:
    """Mark rows of a run, given in order, to be left out; all others are kept."""
    if len(rows):
        write_whole(_marks_path(run), rows.astype("<u4").tobytes())
    else:
        _marks_path(run).unlink(missing_ok=True)


def _read_marks(run: Path) -> NDArray[np.uint32]:
    path = _marks_path(run)
    if not path.exists():
        return np.empty(0, np.uint32)
    with pa.memory_map(os.fsencode(path)) as file:
        return np.frombuffer(file.read_buffer(), "<u4")


def _marks_path(run: Path) -> Path:
    return run.with_suffix(".dropped")


def _joined(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)
