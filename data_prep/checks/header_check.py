"""Checks the headers of a shard's members without making them all anew for each shard.

They differ from each other in a few words of 8 bytes only: those of the name and of the checksum.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from i3dist.data.archive import Headers

_WORD = np.dtype("<u8")
# The words of a header that hold the name and the checksum.
_NAME, _SUM = (0, 1, 2), (18, 19)
_COLUMNS = (*_NAME, *_SUM)
_ROWS = 1 << 10  # made at a time
_KEPT_SUMS = 1 << 20

Words = NDArray[np.uint64]


class _Buffers:
    """Room for the headers of N members, as expected and as stored, [N, 64] words."""

    def __init__(self, one: Words, count: int) -> None:
        """All are expected to be like `one`, [1, 64]."""
        expected = one.repeat(count, axis=0)
        self.expected = expected.data
        self.columns = [expected[:, column] for column in _COLUMNS]
        self.copy = bytearray(expected.nbytes)
        self.stored = np.frombuffer(self.copy, _WORD).reshape(expected.shape)


class HeaderCheck:
    """Compares headers with those of the format, for shards of at most `chunks` chunks."""

    def __init__(self, headers: Headers, chunks: int) -> None:
        """Compare with what `headers` makes."""
        self._headers, self._chunks = headers, chunks
        self._names: dict[int, Words] = {}  # by digits of a shard's number, of the first with such
        self._sums: dict[int, Words] = {}  # by the sum of these digits
        self._buffers: dict[int, _Buffers] = {}  # by number of chunks

    def begin(self, number: int) -> None:
        """Go to shard `number`, of at most 7 digits (`MAX_SHARDS`)."""
        digits = f"{number:06d}".encode()
        first = 0 if number < 10**6 else 10**6
        if len(digits) not in self._names:
            self._names[len(digits)] = self._made(first, _NAME)
        if (total := sum(digits)) not in self._sums:
            if len(self._sums) * self._chunks > _KEPT_SUMS:
                self._sums.clear()
            self._sums[total] = self._made(number, _SUM)
        # A name begins with these digits, so its first word grows by what they have more.
        more = int.from_bytes(digits, "little") - int.from_bytes(f"{first:06d}".encode(), "little")
        begin, *rest = self._names[len(digits)]
        self._words = (begin + _WORD.type(more), *rest, *self._sums[total])

    def wrong(self, stored: NDArray[np.uint8], first: int) -> list[int]:
        """Which of the N chunks from `first` on have another header than `stored`, [N, 512]."""
        count = len(stored)
        if count not in self._buffers:
            self._buffers[count] = _Buffers(self._headers.of(0, 0, 1).view(_WORD), count)
        buffers = self._buffers[count]
        for column, words in zip(buffers.columns, self._words, strict=True):
            column[:] = words[first : first + count]
        # Copied and compared as bytes: three times as fast as one word after the other.
        buffers.stored[:] = stored.view(_WORD)
        if buffers.copy == buffers.expected:
            return []
        wrong = buffers.stored != np.asarray(buffers.expected)
        return (np.flatnonzero(wrong.any(axis=1)) + first).tolist()

    def _made(self, number: int, columns: Sequence[int]) -> Words:
        """These words of the headers of a shard, [columns, chunks]."""
        made = []
        for first in range(0, self._chunks, _ROWS):
            rows = self._headers.of(number, first, min(_ROWS, self._chunks - first))
            made.append(rows.view(_WORD)[:, columns])
        return np.ascontiguousarray(np.concatenate(made).T)
