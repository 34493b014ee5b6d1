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
_SUM = slice(148, 156)
_SHIFTS = np.arange(15, -1, -3)
_KEPT_CHECKSUMS = 1 << 20


def shard_bytes(number: int, chunks: Stored) -> bytes:
    """The archive of `chunks`, [N, T]. It depends only on the tokens and the shard's number."""
    (count, length), size = chunks.shape, chunks.dtype.itemsize
    stride, payload = member_stride(length, size), length * size
    data = np.zeros(archive_size(count, length, size), np.uint8)
    members = data[: count * stride].reshape(count, stride)
    headers = Headers(payload, count, size)
    members[:, :TAR_BLOCK] = headers.number(headers.blank(count), number, 0)
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
        self._fields: dict[int, NDArray[np.uint8]] = {}
        self._widest = 0  # bytes before a chunk's number, of all names so far

    def blank(self, count: int) -> NDArray[np.uint8]:
        """Headers [count, TAR_BLOCK] without names and checksums."""
        return np.tile(self._blank, (count, 1))

    def number(self, blank: NDArray[np.uint8], shard: int, first: int) -> NDArray[np.uint8]:
        """Write names and checksums of chunks `first` and on of a shard into `blank`.

        What stands there from an earlier call is replaced.
        """
        chunks = slice(first, first + len(blank))
        prefix = np.frombuffer((member_name(shard, 0).partition("-")[0] + "-").encode(), np.uint8)
        end = len(prefix) + self._names.shape[1]
        blank[:, : len(prefix)] = prefix
        blank[:, len(prefix) : end] = self._names[chunks]
        if len(prefix) < self._widest:
            blank[:, end : end + self._widest - len(prefix)] = 0
        self._widest = max(self._widest, len(prefix))
        blank[:, _SUM] = self._checksums(int(prefix.sum()))[chunks]
        return blank

    def _checksums(self, prefix: int) -> NDArray[np.uint8]:
        """The checksum fields of a shard, [chunks, 8], if the bytes of its number add up so."""
        if prefix not in self._fields:
            if len(self._fields) * len(self._sums) > _KEPT_CHECKSUMS:
                self._fields.clear()
            sums = self._sums + prefix
            fields = np.zeros((len(sums), _SUM.stop - _SUM.start), np.uint8)
            fields[:, :6] = (sums[:, None] >> _SHIFTS & 7) + ord("0")
            fields[:, -1] = ord(" ")
            self._fields[prefix] = fields
        return self._fields[prefix]
