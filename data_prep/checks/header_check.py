"""Checks the headers of a shard's members without making them all anew for each shard.

They differ from each other in a few words of 8 bytes only: those of the name and of the checksum.
"""

import numpy as np
from numpy.typing import NDArray

from i3dist.data.archive import Headers

_WORD = np.dtype("<u8")
# The words of a header that hold the name and the checksum.
_NAME, _SUM = slice(0, 3), slice(18, 20)
_ROWS = 1 << 10  # made at a time
_KEPT_SUMS = 1 << 20

Words = NDArray[np.uint64]


class HeaderCheck:
    """Compares headers with those of the format, for shards of at most `chunks` chunks."""

    def __init__(self, headers: Headers, chunks: int) -> None:
        """Compare with what `headers` makes."""
        self._headers, self._chunks = headers, chunks
        self._names: dict[int, Words] = {}  # by digits of a shard's number, of the first with such
        self._sums: dict[int, Words] = {}  # by the sum of these digits
        self._one = headers.of(0, 0, 1).view(_WORD)
        self._expected = np.empty((0, self._one.shape[1]), _WORD)  # of the chunks last compared
        self._copies: dict[int, bytearray] = {}  # by number of chunks

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
        self._more = np.array([more, 0, 0], _WORD)
        self._name, self._sum = self._names[len(digits)], self._sums[total]

    def wrong(self, stored: NDArray[np.uint8], first: int) -> list[int]:
        """Which of the N chunks from `first` on have another header than `stored`, [N, 512]."""
        count, chunks = len(stored), slice(first, first + len(stored))
        if len(self._expected) < count:
            self._expected = np.repeat(self._one, count, axis=0)
        expected = self._expected[:count]
        np.add(self._name[chunks], self._more, out=expected[:, _NAME])
        expected[:, _SUM] = self._sum[chunks]
        words = stored.view(_WORD)
        # Copied and compared as bytes: three times as fast as one word after the other.
        if count not in self._copies:
            self._copies[count] = bytearray(expected.nbytes)
        copy = self._copies[count]
        np.frombuffer(copy, _WORD).reshape(expected.shape)[:] = words
        if copy == expected.data:
            return []
        return (np.flatnonzero((words != expected).any(axis=1)) + first).tolist()

    def _made(self, number: int, columns: slice) -> Words:
        """These words of the headers of a shard, [chunks, columns]."""
        made = []
        for first in range(0, self._chunks, _ROWS):
            rows = self._headers.of(number, first, min(_ROWS, self._chunks - first))
            made.append(rows.view(_WORD)[:, columns].copy())
        return np.concatenate(made)
