"""Checks a block of a shard's members while it is in the processor's cache.

All arrays are made once and used again for every block: new ones of this size would come from the
operating system each time, which costs as much as the checks.
"""

from collections.abc import Sequence
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.stream import Stream
from i3dist.data.archive import Headers
from i3dist.data.manifest import TAR_BLOCK, member_stride
from i3dist.data.token_types import Stored

# Bytes that are read at once.
BLOCK = 1 << 19

Ints = NDArray[np.int64]
_NOWHERE: Ints = np.empty(0, np.int64)


class Findings(NamedTuple):
    """What a block of N members of T tokens holds; positions count from the shard's first token."""

    malformed: list[int]  # chunks whose header or padding is not that of the format
    beyond: Ints  # positions of ids outside the vocabulary
    positions: Ints  # of special ids, ascending
    ids: Stored  # these ids
    changes: Ints  # positions whose mask differs from that of the token before, if there is a mask


class BlockCheck:
    """Reads and checks blocks of the shards of one split."""

    def __init__(self, stream: Stream) -> None:
        """Make arrays for blocks of at most `members` members."""
        self.length, self._kind = stream.chunk_length, stream.token_type
        self._payload = self.length * self._kind.dtype.itemsize
        self.stride = member_stride(self.length, self._kind.dtype.itemsize)
        self.members = min(max(1, BLOCK // self.stride), stream.chunks_per_shard)
        self._vocab_size = stream.vocab_size
        self._ordinary, self._inner = _ordinary_ids(stream.vocab_size, stream.special_ranges())
        self._most = self._id(max(len(self._ordinary) - 1, 0))  # counted from the first one
        self._data = memoryview(bytearray(self.members * self.stride))
        data = np.frombuffer(self._data, np.uint8).reshape(self.members, self.stride)
        end = TAR_BLOCK + self._payload
        self._stored, self._padding = data[:, :TAR_BLOCK], data[:, end:]
        self._tokens = data[:, TAR_BLOCK:end].view(self._kind.dtype)
        self._headers = Headers(self._payload, stream.chunks_per_shard, self._kind.dtype.itemsize)
        self._made = self._headers.blank(self.members)
        self._shifted = np.empty((self.members, self.length), self._kind.dtype)
        self._within = np.empty(self._shifted.shape, bool)
        self._found = np.empty_like(self._within)
        self._learned_before = False  # the last token of the block before

    def read(self, file: FileIO, count: int) -> memoryview:
        """Read `count` members; fewer bytes if the file ends before.

        The bytes are valid until the next call.
        """
        wanted, done = count * self.stride, 0
        while done < wanted and (got := file.readinto(self._data[done:wanted])):
            done += got
        return self._data[:done]

    def check(self, number: int, first: int, count: int, expected: Ints) -> Findings:
        """Check the `count` members last read, which are chunks `first` and on of a shard.

        Args:
            number: the shard's.
            first: the first chunk.
            count: how many.
            expected: where special ids may stand in the block, ascending. Those elsewhere are found
                too, by a search that takes longer.
        """
        tokens = self._tokens[:count]
        changes, start = self._changes(tokens, first), first * self.length
        special, ids = self._special(self._kind.ids(tokens), expected)
        beyond = _NOWHERE
        if len(ids) and ids.max() >= self._vocab_size:
            is_known = ids < self._vocab_size
            beyond, special, ids = special[~is_known], special[is_known], ids[is_known]
        malformed = self._malformed(number, first, count)
        return Findings(malformed, beyond + start, special + start, ids, changes + start)

    def _changes(self, tokens: Stored, first: int) -> Ints:
        """Where the mask of a block changes, given the number of its first chunk."""
        learned = self._kind.learned(tokens)
        if learned is None:
            return _NOWHERE
        learned = learned.reshape(-1)
        before = self._learned_before if first else False
        self._learned_before = bool(learned[-1])
        return np.flatnonzero(learned != np.concatenate(([before], learned[:-1])))

    def _malformed(self, number: int, first: int, count: int) -> list[int]:
        made = self._headers.number(self._made[:count], number, first)
        stored, padding = self._stored[:count], self._padding[:count]
        alike = np.array_equal(stored.view(np.uint64), made.view(np.uint64))
        if alike and not (padding.size and padding.any()):
            return []
        wrong = (stored != made).any(axis=1) | padding.any(axis=1)
        return (np.flatnonzero(wrong) + first).tolist()

    def _special(self, tokens: Stored, expected: Ints) -> tuple[Ints, Stored]:
        """Where ids are that are special or outside the vocabulary, and these ids."""
        if self._ordinary and not self._inner and len(expected):
            shifted = self._shift(tokens).reshape(-1)
            found = shifted[expected]
            if not (is_special := found > self._most).all():
                expected, found = expected[is_special], found[is_special]
            shifted[expected] = 0
            if shifted.max() <= self._most:
                return expected, found + self._id(self._ordinary.start)
        places = _flatnonzero(self._not_ordinary(tokens).reshape(-1))
        return places, tokens[np.divmod(places, self.length)]

    def _shift(self, tokens: Stored) -> Stored:
        """Ids counted from the first ordinary one; those below it wrap around to large numbers."""
        start = self._id(self._ordinary.start)
        return np.subtract(tokens, start, out=self._shifted[: len(tokens)])

    def _not_ordinary(self, tokens: Stored) -> NDArray[np.bool_]:
        """Where ids are that are special or outside the vocabulary."""
        count, ordinary = len(tokens), self._ordinary
        found, within = self._found[:count], self._within[:count]
        if not ordinary:
            found[:] = True
            return found
        shifted = self._shift(tokens)
        np.greater(shifted, self._most, out=found)
        for low, high in self._inner:
            np.subtract(tokens, self._id(low), out=shifted)
            np.less_equal(shifted, self._id(high - low), out=within)
            np.logical_or(found, within, out=found)
        return found

    def _id(self, number: int) -> Any:
        return self._kind.dtype.type(number)


def _ordinary_ids(
    vocab_size: int, special: Sequence[tuple[int, int]]
) -> tuple[range, Sequence[tuple[int, int]]]:
    """The ids from the first ordinary one to the last, and the special ranges among them."""
    first, last, inner = 0, vocab_size - 1, list(special)
    if inner and inner[0][0] == first:
        first = inner.pop(0)[1] + 1
    if inner and inner[-1][1] == last:
        last = inner.pop()[0] - 1
    return range(first, last + 1), inner


def _flatnonzero(found: NDArray[np.bool_]) -> Ints:
    """As `np.flatnonzero`, three times as fast where few are true."""
    if len(found) % 8:
        return np.flatnonzero(found)
    words = np.flatnonzero(found.view(np.uint64) != 0)
    rows, columns = found.reshape(-1, 8)[words].nonzero()
    return words[rows] * 8 + columns
