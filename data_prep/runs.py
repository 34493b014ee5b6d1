"""Reads runs: memory-mapped Arrow files of framed documents, sorted by key."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from i3dist.data.manifest import TOKEN_BYTES
from i3dist.errors import UserError

_HASHES = ("high", "low", "split")
_LIBC = ctypes.CDLL(None, use_errno=True)


class Run:
    """One run, as one record batch. It is mapped; no file stays open.

    `high`, `low` and `split` are the documents' hashes, int64 [rows]. `offsets`, int64 [rows + 1],
    tell where each document's tokens begin in the run, in bytes, and where the last ones end.
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
        self._place = ctypes.c_void_p(self._bytes.address), ctypes.c_size_t(self._bytes.size)

    def release(self) -> None:
        """Let go of the pages that were read, so that they do not count as memory in use."""
        _LIBC.madvise(*self._place, mmap.MADV_DONTNEED)


class Keys(NamedTuple):
    """All documents of a range, in the order of their keys."""

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

    def seek(self, start: int, stop: int) -> Keys:
        """Go to the documents whose first key number is in [start, stop); returns their keys."""
        for run, *_ in self._rows:
            run.release()
        ends = np.array((start, stop))
        found = ((run, *np.searchsorted(run.high, ends)) for run in self._runs)
        self._rows = [(run, first, last) for run, first, last in found if first < last]
        high, low, split = (
            _joined([getattr(run, name)[first:last] for run, first, last in self._rows])
            for name in _HASHES
        )
        order = np.lexsort((low, high)) if len(self._rows) > 1 else np.arange(len(high))
        lengths = [
            np.diff(run.offsets[first : last + 1]) // TOKEN_BYTES for run, first, last in self._rows
        ]
        return Keys(order, split[order], _joined(lengths)[order])

    def table(self, rows: NDArray[np.int64]) -> pa.Table:
        """All columns of rows of the range."""
        slices = [run.batch[first:last] for run, first, last in self._rows]
        return pa.Table.from_batches(slices).combine_chunks().take(pa.array(rows))

    def labels(self, rows: NDArray[np.int64]) -> tuple[pa.Array, pa.Array]:
        """Ids and urls of rows of the range."""
        picked = pa.array(rows)
        ids, urls = (
            pa.concat_arrays(
                [run.batch.column(name)[first:last] for run, first, last in self._rows]
            ).take(picked)
            for name in ("id", "url")
        )
        return ids, urls

    def tokens(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """The tokens of rows of the range, one after the other. Few rows are read without others.

        Memory holds about twice the tokens meanwhile.
        """
        if not len(rows):
            return np.empty(0, np.uint16)
        taken = np.zeros(sum(last - first for _, first, last in self._rows), bool)
        taken[rows] = True
        arrays, begin = [], 0
        for run, first, last in self._rows:
            mask = taken[begin : begin + last - first]
            begin += last - first
            array = run.batch.column("tokens")[first:last]
            if 2 * mask.sum() > len(mask):
                mask[:] = True  # copying all is faster than choosing
            else:
                array = array.filter(pa.array(mask))
            arrays.append(array)
        picked = (np.cumsum(taken) - 1)[rows]
        whole = pa.concat_arrays(arrays)
        if not np.array_equal(picked, np.arange(len(picked))):
            whole = whole.take(pa.array(picked))
        _, offsets, values = whole.buffers()
        ends = np.frombuffer(offsets, np.int64)[[whole.offset, whole.offset + len(whole)]]
        return np.frombuffer(values, np.uint16)[slice(*ends // TOKEN_BYTES)]


def _joined(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)
