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
_ROWS = 1 << 10  # made at a time
_KEPT_SUMS = 1 << 20

Words = NDArray[np.uint64]


class HeaderCheck:
    """Compares headers with those of the format, for shards of at most `chunks` chunks."""

    def __init__(self, headers: Headers, chunks: int) -> None:
        """Compare with what `headers` makes."""
        self._headers, self._chunks = headers, chunks
        self._one = headers.of(0, 0, 1).view(_WORD)
        self._names: dict[int, Words] = {}  # by digits of a shard's number, of the first with such
        self._sums: dict[int, Words] = {}  # by the sum of these digits
        self._equal = np.empty((0, self._one.shape[1]), bool)
        self._expected: list[Words] = []  # the words of the shard of `begin`

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
        names = self._names[len(digits)]
        self._expected = [names[0] + np.uint64(more), *names[1:], *self._sums[total]]

    def wrong(self, stored: NDArray[np.uint8], first: int) -> list[int]:
        """Which of the N chunks from `first` on have another header than `stored`, [N, 512]."""
        count, words = len(stored), stored.view(_WORD)
        if len(self._equal) < count:
            self._equal = np.empty((count, words.shape[1]), bool)
        equal = np.equal(words, self._one, out=self._equal[:count])
        for column, expected in zip((*_NAME, *_SUM), self._expected, strict=True):
            np.equal(words[:, column], expected[first : first + count], out=equal[:, column])
        return [] if equal.all() else (np.flatnonzero(~equal.all(axis=1)) + first).tolist()

    def _made(self, number: int, columns: Sequence[int]) -> Words:
        """These words of the headers of a shard, [columns, chunks]."""
        made = []
        for first in range(0, self._chunks, _ROWS):
            rows = self._headers.of(number, first, min(_ROWS, self._chunks - first))
            made.append(rows.view(_WORD)[:, columns])
        return np.concatenate(made).T.copy()
