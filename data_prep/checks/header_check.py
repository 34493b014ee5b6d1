"""Checks the headers of a shard's members without making them all anew for each shard.

They differ from each other in a few words of 8 bytes only: those of the name and of the checksum.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from i3dist.data.archive import Headers
from i3dist.data.manifest import TAR_BLOCK

_WORD = np.dtype("<u8")
# The words of a header that hold the name and the checksum.
_NAME, _SUM = (0, 1, 2), (18, 19)
_COLUMNS = (*_NAME, *_SUM)
_ROWS = 1 << 10  # made at a time
_KEPT_SUMS = 1 << 20

Words = NDArray[np.uint64]


class _Copy:
    """A copy of the headers of N members, [N, 64] words, and the same memory in other forms."""

    def __init__(self, count: int) -> None:
        self.bytes = bytearray(count * TAR_BLOCK)
        self.words = np.frombuffer(self.bytes, _WORD).reshape(count, -1)
        self.columns = [self.words[:, column] for column in _COLUMNS]
        self.from_second_on = memoryview(self.bytes)[TAR_BLOCK:]


class HeaderCheck:
    """Compares headers with those of the format, for shards of at most `chunks` chunks."""

    def __init__(self, headers: Headers, chunks: int) -> None:
        """Compare with what `headers` makes."""
        self._headers, self._chunks = headers, chunks
        self._names: dict[int, list[Words]] = {}  # by digits of a shard's number, of the first such
        self._sums: dict[int, list[Words]] = {}  # by the sum of these digits
        self._copies: dict[int, _Copy] = {}  # by number of chunks
        rest = headers.of(0, 0, 1).view(_WORD)
        rest[:, _COLUMNS] = 0
        self._rest = rest.tobytes()  # what all headers have beside name and checksum

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
        if count not in self._copies:
            self._copies[count] = _Copy(count)
        copy = self._copies[count]
        copy.words[:] = stored.view(_WORD)
        for column, words in zip(copy.columns, self._words, strict=True):
            column -= words[first : first + count]
        # Now all have to be like the first. Bytes are compared three times as fast as words.
        if copy.bytes.startswith(self._rest) and copy.bytes.startswith(copy.from_second_on):
            return []
        differs = copy.words != np.frombuffer(self._rest, _WORD)
        return (np.flatnonzero(differs.any(axis=1)) + first).tolist()

    def _made(self, number: int, columns: Sequence[int]) -> list[Words]:
        """These words of the headers of a shard, [chunks] each."""
        made = []
        for first in range(0, self._chunks, _ROWS):
            rows = self._headers.of(number, first, min(_ROWS, self._chunks - first))
            made.append(rows.view(_WORD)[:, columns])
        return list(np.ascontiguousarray(np.concatenate(made).T))
