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
_ROWS = 1 << 8  # made at a time: memory that is used again, not new from the system
_KEPT_SUMS = 1 << 20

Words = NDArray[np.uint64]


class HeaderCheck:
    """Makes the headers of a shard's members alike, for shards of at most `chunks` chunks.

    Attributes:
        rest: what is left of each right header, uint8 [512].
    """

    def __init__(self, headers: Headers, chunks: int) -> None:
        """Take as right what `headers` makes."""
        self._headers, self._chunks = headers, chunks
        self._names: dict[int, list[Words]] = {}  # by digits of a shard's number, of the first such
        self._sums: dict[int, list[Words]] = {}  # by the sum of these digits
        rest = headers.of(0, 0, 1).view(_WORD)
        rest[:, _COLUMNS] = 0
        self.rest = rest.view(np.uint8)[0]

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

    def subtract(self, columns: Sequence[Words], first: int) -> None:
        """Subtract what is special to each of N chunks, `first` and on, from its header, in place.

        A header becomes `rest` if and only if it is right. `columns` are words of the headers, [N]
        each, as `columns` gives them.
        """
        stop = first + len(columns[0])
        for column, wanted in zip(columns, self._words, strict=True):
            np.subtract(column, wanted[first:stop], out=column)

    @staticmethod
    def columns(members: NDArray[np.uint8]) -> list[Words]:
        """The words of N headers that differ, [N] each, of `members`, [N, S], which they begin."""
        return [members.view(_WORD)[:, column] for column in _COLUMNS]

    def _made(self, number: int, columns: Sequence[int]) -> list[Words]:
        """These words of the headers of a shard, [chunks] each."""
        made = []
        for first in range(0, self._chunks, _ROWS):
            rows = self._headers.of(number, first, min(_ROWS, self._chunks - first))
            made.append(rows.view(_WORD)[:, columns])
        return list(np.ascontiguousarray(np.concatenate(made).T))
