"""Checks a block of a shard's members while it is in the processor's cache.

All arrays are made once and used again for every block: new ones of this size would come from the
operating system each time, which costs as much as the checks.
"""

import math
from collections.abc import Sequence
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.checks.header_check import HeaderCheck
from data_prep.checks.stream import Stream
from i3dist.data.archive import Headers
from i3dist.data.manifest import TAR_BLOCK, TAR_RECORD, member_stride
from i3dist.data.token_types import Stored, TokenType

# Bytes that are read at once, at most: a whole shard of the default size is 3 MB.
BLOCK = 1 << 22
# Bytes behind a shard's members, at most.
_MOST_TAIL = 2 * TAR_BLOCK + TAR_RECORD
# Members that are a row while their least and greatest words are taken: fewer, longer steps.
_FOLD = 4

Ints = NDArray[np.int64]
_NOWHERE: Ints = np.empty(0, np.int64)


class Findings(NamedTuple):
    """What a shard's members hold; positions count from the shard's first token, ascending."""

    beyond: Ints  # positions of ids outside the vocabulary
    positions: Ints  # of special ids
    ids: Stored  # these ids
    changes: Ints  # positions whose mask differs from that of the token before, if there is a mask


class _Block:
    """Members in memory, of S bytes or W words each: N of them, uint8 [N, S], in several forms."""

    def __init__(self, members: NDArray[np.uint8], kind: TokenType, length: int) -> None:
        self.headers = HeaderCheck.columns(members)
        self.words = members.view(kind.dtype)  # [N, W]
        self.flat = self.words.reshape(-1)
        before = TAR_BLOCK // kind.dtype.itemsize
        self.tokens = self.words[:, before : before + length]
        fold = math.gcd(len(members), _FOLD)
        self.rows = self.flat.reshape(-1, fold * self.words.shape[1])


class BlockCheck:
    """Reads and checks the shards of one split, one after the other, block by block."""

    def __init__(self, stream: Stream) -> None:
        """Make arrays for blocks of at most `members` members."""
        self.length, self._kind = stream.chunk_length, stream.token_type
        dtype, word = self._kind.dtype, self._kind.dtype.itemsize
        self.stride = member_stride(self.length, word)
        self.members = _members(stream.chunks_per_shard, self.stride)
        blocks = -(-stream.chunks_per_shard // self.members)
        self._starts = np.arange(blocks + 1) * self.members * self.length
        self._vocab_size = stream.vocab_size
        self._ordinary, self._inner = _ordinary_ids(stream.vocab_size, stream.special_ranges())
        self._is_simple = bool(self._ordinary) and not self._inner and not self._kind.has_mask
        self._most = self._id(max(len(self._ordinary) - 1, 0))  # counted from the first one
        self._data = _aligned(self.members * self.stride + _MOST_TAIL)
        self._bytes = self._data.data
        self._blocks: dict[int, _Block] = {}  # by number of members
        self._headers = HeaderCheck(
            Headers(self.length * word, stream.chunks_per_shard, word), stream.chunks_per_shard
        )
        self._before, self._width = TAR_BLOCK // word, self.stride // word
        self._set_bounds()
        self._shifted = np.empty((self.members, self.length), dtype)
        self._within = np.empty(self._shifted.shape, bool)
        self._found = np.empty_like(self._within)

    def _set_bounds(self) -> None:
        """Set the bounds of a member's words: its tokens are ordinary ids, all else is fixed."""
        dtype = self._kind.dtype
        self._is_fixed = np.ones(self._width, bool)
        self._is_fixed[self._before : self._before + self.length] = False
        low = np.zeros(self._width, dtype)
        low[: self._before] = self._headers.rest.view(dtype)
        high = low.copy()
        low[~self._is_fixed] = self._ordinary.start if self._is_simple else 0
        high[~self._is_fixed] = self._ordinary.stop - 1 if self._is_simple else np.iinfo(dtype).max
        self._wanted = low[self._is_fixed]
        # Of the words of a row of members: lower and upper values, which are compared at once.
        self._lower, self._upper = _aligned(4 * _FOLD * self.stride).view(dtype).reshape(2, 2, -1)
        self._lower[0], self._upper[1] = np.tile(low, _FOLD), np.tile(high, _FOLD)

    def begin(self, number: int, chunks: int, expected: Ints, places: Ints) -> None:
        """Begin with shard `number`, of so many chunks.

        Special ids may stand at the positions `expected`, ascending, which have these `places` in
        the file. Those elsewhere are found too, by a search that takes longer.
        """
        self._headers.begin(number)
        self._expected, self._places = expected, places
        self._cuts = expected.searchsorted(np.minimum(self._starts, chunks * self.length)).tolist()
        self.malformed: list[int] = []  # chunks whose header or padding is not that of the format
        self._is_as_expected = True
        self._special: list[tuple[Ints, Stored]] = []
        self._changes: list[Ints] = []
        self._learned_before = False  # the last token of the block before

    def read(self, file: FileIO, size: int) -> memoryview:
        """Read `size` bytes, of members and what follows them; fewer if the file ends before.

        The bytes are valid until the next `check` or `read`.
        """
        done = 0
        while done < size and (got := file.readinto(self._bytes[done:size])):
            done += got
        return self._bytes[:done]

    def check(self, first: int, count: int) -> None:
        """Check the `count` members last read, which are chunks `first` and on of the shard.

        All of them together are looked at by the least and the greatest of each of a member's
        words. For that, what is special to each header and expected ids are replaced in the block.
        """
        block, number = self._block(count), first // self.members
        self._headers.subtract(block.headers, first)
        start, stop = self._cuts[number : number + 2]
        expected, places = self._expected[start:stop], self._places[start:stop]
        if first:
            places = places - first * self._width
        found = block.flat[places]
        if self._is_simple:
            block.flat[places] = self._ordinary.start
        is_right = self._is_within_bounds(block.rows)
        if not is_right:
            differs = (block.words[:, self._is_fixed] != self._wanted).any(axis=1)
            self.malformed += (np.flatnonzero(differs) + first).tolist()
        if self._is_simple and is_right:
            self._special.append((expected, found))
        else:
            block.flat[places] = found
            self._search(block.tokens, first * self.length)

    def _block(self, count: int) -> _Block:
        if count not in self._blocks:
            members = self._data[: count * self.stride].reshape(count, self.stride)
            self._blocks[count] = _Block(members, self._kind, self.length)
        return self._blocks[count]

    def _is_within_bounds(self, rows: Stored) -> bool:
        """Whether all words of the members are: two passes over memory, and no copy."""
        width = rows.shape[1]
        lower, upper = self._lower[:, :width], self._upper[:, :width]
        np.minimum.reduce(rows, out=upper[0])
        np.maximum.reduce(rows, out=lower[1])
        return not (lower > upper).any()

    def _search(self, tokens: Stored, start: int) -> None:
        """Find special ids and changes of the mask in tokens, the first of which is `start`."""
        self._is_as_expected = False
        if self._kind.has_mask:
            self._changes.append(self._changes_in(tokens) + start)
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

    def _not_ordinary(self, tokens: Stored) -> NDArray[np.bool_]:
        """Where ids are that are special or outside the vocabulary."""
        count, ordinary = len(tokens), self._ordinary
        found, within = self._found[:count], self._within[:count]
        if not ordinary:
            found[:] = True
            return found
        # Those below the first ordinary id wrap around to large numbers.
        shifted = np.subtract(tokens, self._id(ordinary.start), out=self._shifted[:count])
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
