"""The bytes of a shard: a POSIX ustar archive with one member per chunk, all of one fixed size.

docs/data-format.md has the layout. No archive is ever parsed: the writer makes shards with
`shard_bytes`, and the reader refuses a file that differs from what `shard_bytes` makes of its
tokens.

Notation: N chunks of a shard, T tokens of a chunk.
"""

import tarfile

import numpy as np
from numpy.typing import NDArray

from i3dist.data.manifest import (
    TAR_BLOCK,
    TOKEN_BYTES,
    archive_size,
    member_name,
    member_stride,
)
from i3dist.data.token_types import UINT16, Stored

# The checksum's place in a header: six octal digits, a zero byte and a blank.
_SUM, _DIGITS = slice(148, 156), slice(148, 154)
_SHIFTS = np.arange(15, -1, -3)


def shard_bytes(number: int, chunks: Stored) -> bytes:
    """The archive of `chunks`, [N, T]. It depends only on the tokens and the shard's number."""
    (count, length), size = chunks.shape, chunks.dtype.itemsize
    stride, payload = member_stride(length, size), length * size
    data = np.zeros(archive_size(count, length, size), np.uint8)
    members = data[: count * stride].reshape(count, stride)
    members[:, :TAR_BLOCK] = Headers(payload, count, size).of(number, 0, count)
    little_endian = np.ascontiguousarray(chunks, f"<u{size}")
    members[:, TAR_BLOCK : TAR_BLOCK + payload] = little_endian.view(np.uint8)
    return data.tobytes()


def chunks_of(
    data: bytes, count: int, length: int, dtype: np.dtype[np.unsignedinteger] = UINT16.dtype
) -> Stored:
    """The tokens [N, T] in an archive of `count` chunks of `length` tokens, as they are stored."""
    stride = member_stride(length, dtype.itemsize)
    members = np.frombuffer(data, np.uint8, count * stride).reshape(count, stride)
    payload = np.ascontiguousarray(members[:, TAR_BLOCK : TAR_BLOCK + length * dtype.itemsize])
    return payload.view(dtype).astype(dtype.newbyteorder("="), copy=False)


class Headers:
    """Makes the headers of members that all have one size: they differ in name and checksum."""

    def __init__(self, payload: int, chunks: int, token_bytes: int = TOKEN_BYTES) -> None:
        """For members of `payload` bytes, in shards of at most so many chunks."""
        names = [member_name(0, n, token_bytes).partition("-")[2] for n in range(chunks)]
        self._names = np.array(names, "S").view(np.uint8).reshape(chunks, -1)
        member = tarfile.TarInfo()
        member.size, member.mode = payload, 0o444
        self._blank = np.frombuffer(member.tobuf(tarfile.USTAR_FORMAT), np.uint8).copy()
        self._blank[_SUM] = ord(" ")  # the sum is defined with blanks in its own place
        self._sums = self._names.sum(axis=1, dtype=np.int64) + int(self._blank.sum())
        self._blank[_DIGITS.stop] = 0

    def of(self, shard: int, first: int, count: int) -> NDArray[np.uint8]:
        """The headers [count, TAR_BLOCK] of chunks `first` and on of a shard."""
        chunks = slice(first, first + count)
        prefix = np.frombuffer((member_name(shard, 0).partition("-")[0] + "-").encode(), np.uint8)
        headers = np.tile(self._blank, (count, 1))
        headers[:, : len(prefix)] = prefix
        headers[:, len(prefix) : len(prefix) + self._names.shape[1]] = self._names[chunks]
        sums = self._sums[chunks] + int(prefix.sum())
        headers[:, _DIGITS] = (sums[:, None] >> _SHIFTS & 7) + ord("0")
        return headers
