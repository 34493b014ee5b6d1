"""Checks a block of a shard's members while it is in the processor's cache.

All arrays are made once and used again for every block: new ones of this size would come from the
operating system each time, which costs as much as the checks.
"""

from collections.abc import Sequence
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.checks.header_check import HeaderCheck
from data_prep.checks.stream import Stream
from i3dist.data.archive import Headers
from i3dist.data.manifest import TAR_BLOCK, member_stride
from i3dist.data.token_types import Stored

# Bytes that are read at once: a third of a shard of the default size.
BLOCK = 17 << 16

Ints = NDArray[np.int64]
_NOWHERE: Ints = np.empty(0, np.int64)


class Findings(NamedTuple):
    """What a shard's members hold; positions count from the shard's first token, ascending."""

    beyond: Ints  # positions of ids outside the vocabulary
    positions: Ints  # of special ids
    ids: Stored  # these ids
    changes: Ints  # positions whose mask differs from that of the token before, if there is a mask


class BlockCheck:
    """Reads and checks the shards of one split, one after the other, block by block."""

    def __init__(self, stream: Stream) -> None:
        """Make arrays for blocks of at most `members` members."""
        self.length, self._kind = stream.chunk_length, stream.token_type
        word = self._kind.dtype.itemsize
        self._payload = self.length * word
        self.stride = member_stride(self.length, word)
        self.members = _members(stream.chunks_per_shard, self.stride)
        self._vocab_size = stream.vocab_size
        self._ordinary, self._inner = _ordinary_ids(stream.vocab_size, stream.special_ranges())
        self._is_simple = bool(self._ordinary) and not self._inner and not self._kind.has_mask
        self._most = self._id(max(len(self._ordinary) - 1, 0))  # counted from the first one
        data = _aligned(self.members * self.stride).reshape(self.members, self.stride)
        self._data = data.reshape(-1).data
        end = TAR_BLOCK + self._payload
        self._stored, self._padding = data[:, :TAR_BLOCK], data[:, end:]
        self._tokens = data[:, TAR_BLOCK:end].view(self._kind.dtype)
        headers = Headers(self._payload, stream.chunks_per_shard, word)
        self._headers = HeaderCheck(headers, stream.chunks_per_shard)
        self._copied = np.empty((self.members, self.length), self._kind.dtype)
        self._within = np.empty(self._copied.shape, bool)
        self._found = np.empty_like(self._within)

    def begin(self, number: int, chunks: int, expected: Ints) -> None:
        """Begin with shard `number`, of so many chunks.

        Special ids may stand at the positions `expected`, ascending. Those elsewhere are found too,
        by a search that takes longer.
        """
        self._headers.begin(number)
        self._expected = expected
        starts = np.array([*range(0, chunks, self.members), chunks]) * self.length
        self._cuts = expected.searchsorted(starts).tolist()
        self.malformed: list[int] = []  # chunks whose header or padding is not that of the format
        self._is_as_expected = True
        self._special: list[tuple[Ints, Stored]] = []
        self._changes: list[Ints] = []
        self._learned_before = False  # the last token of the block before

    def read(self, file: FileIO, count: int) -> memoryview:
        """Read `count` members; fewer bytes if the file ends before.

        The bytes are valid until the next call.
        """
        wanted, done = count * self.stride, 0
        while done < wanted and (got := file.readinto(self._data[done:wanted])):
            done += got
        return self._data[:done]

    def check(self, first: int, count: int) -> None:
        """Check the `count` members last read, which are chunks `first` and on of the shard."""
        self._check_headers(first, count)
        tokens, start = self._tokens[:count], first * self.length
        if self._kind.has_mask:
            self._changes.append(self._changes_in(tokens) + start)
        block = first // self.members
        expected = self._expected[self._cuts[block] : self._cuts[block + 1]]
        found = self._expected_ids(tokens, expected - start)
        if found is not None:
            self._special.append((expected, found))
        else:
            self._is_as_expected = False
            ids = self._kind.ids(tokens)
            places = _flatnonzero(self._not_ordinary(ids).reshape(-1))
            self._special.append((places + start, ids[np.divmod(places, self.length)]))

    def ids_where_expected(self) -> Stored | None:
        """The ids at the expected positions; None if other tokens are not all ordinary.

        Also None if tokens have a mask, or special ids stand among the ordinary ones.
        """
        return np.concatenate([ids for _, ids in self._special]) if self._is_as_expected else None

    def is_ordinary(self, number: int) -> bool:
        """Whether an id of `ids_where_expected` is in the vocabulary and not special."""
        return number in self._ordinary

    def findings(self) -> Findings:
        """What the checks since `begin` have found."""
        positions, ids = (np.concatenate(parts) for parts in zip(*self._special, strict=True))
        if self._is_simple:  # where ids were expected, not all need be special
            is_special = ids - self._id(self._ordinary.start) > self._most
            if not is_special.all():
                positions, ids = positions[is_special], ids[is_special]
        beyond = _NOWHERE
        if len(ids) and ids.max() >= self._vocab_size:
            is_known = ids < self._vocab_size
            beyond, positions, ids = positions[~is_known], positions[is_known], ids[is_known]
        changes = np.concatenate(self._changes) if self._changes else _NOWHERE
        return Findings(beyond, positions, ids, changes)

    def _changes_in(self, tokens: Stored) -> Ints:
        """Where the mask of a block changes."""
        learned = self._kind.learned(tokens)
        assert learned is not None
        learned = learned.reshape(-1)
        before, self._learned_before = self._learned_before, bool(learned[-1])
        return np.flatnonzero(learned != np.concatenate(([before], learned[:-1])))

    def _check_headers(self, first: int, count: int) -> None:
        self.malformed += self._headers.wrong(self._stored[:count], first)
        padding = self._padding[:count]
        if padding.size and padding.any():
            self.malformed += (np.flatnonzero(padding.any(axis=1)) + first).tolist()

    def _expected_ids(self, tokens: Stored, places: Ints) -> Stored | None:
        """The ids at these tokens of the block; None if another one is not an ordinary id."""
        if not self._is_simple:
            return None
        # The copy is contiguous, which numpy searches twice as fast.
        copied = self._copied[: len(tokens)]
        np.copyto(copied, tokens)
        flat = copied.reshape(-1)
        found = flat[places]
        flat[places] = self._ordinary.start  # while all others are looked at
        least, most = np.minimum.reduce(flat), np.maximum.reduce(flat)
        return found if least >= self._ordinary.start and most < self._ordinary.stop else None

    def _not_ordinary(self, tokens: Stored) -> NDArray[np.bool_]:
        """Where ids are that are special or outside the vocabulary."""
        count, ordinary = len(tokens), self._ordinary
        found, within = self._found[:count], self._within[:count]
        if not ordinary:
            found[:] = True
            return found
        # Those below the first ordinary id wrap around to large numbers.
        shifted = np.subtract(tokens, self._id(ordinary.start), out=self._copied[:count])
        np.greater(shifted, self._most, out=found)
        for low, high in self._inner:
            np.subtract(tokens, self._id(low), out=shifted)
            np.less_equal(shifted, self._id(high - low), out=within)
            np.logical_or(found, within, out=found)
        return found

    def _id(self, number: int) -> Any:
        return self._kind.dtype.type(number)


def _aligned(size: int) -> NDArray[np.uint8]:
    """So many bytes that begin at a multiple of 64.

    The system copies a file's bytes to the places that Python's own buffers have, 16 bytes behind
    such a multiple, at half the speed.
    """
    data = np.empty(size + 64, np.uint8)
    start = -data.ctypes.data % 64
    return data[start : start + size]


def _members(chunks: int, stride: int) -> int:
    """The members of a block: about `BLOCK` bytes, and as many in the last block of a shard."""
    most = max(1, BLOCK // stride)
    return -(-chunks // -(-chunks // most))


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
