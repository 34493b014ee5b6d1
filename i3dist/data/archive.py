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

# The checksum's place in a header: six octal digits, a zero byte and a blank.
_SUM = slice(148, 156)


def shard_bytes(number: int, chunks: NDArray[np.uint16]) -> bytes:
    """The archive of `chunks`, [N, T]. It depends only on the tokens and the shard's number."""
    count, length = chunks.shape
    stride, payload = member_stride(length), length * TOKEN_BYTES
    data = np.zeros(archive_size(count, length), np.uint8)
    members = data[: count * stride].reshape(count, stride)
    members[:, :TAR_BLOCK] = _headers(number, count, payload)
    members[:, TAR_BLOCK : TAR_BLOCK + payload] = np.ascontiguousarray(chunks, "<u2").view(np.uint8)
    return data.tobytes()


def chunks_of(data: bytes, count: int, length: int) -> NDArray[np.uint16]:
    """The tokens [N, T] in an archive of `count` chunks of `length` tokens."""
    stride = member_stride(length)
    members = np.frombuffer(data, np.uint8, count * stride).reshape(count, stride)
    payload = np.ascontiguousarray(members[:, TAR_BLOCK : TAR_BLOCK + length * TOKEN_BYTES])
    return payload.view("<u2").astype(np.uint16, copy=False)


def _headers(number: int, count: int, payload: int) -> NDArray[np.uint8]:
    """Headers of a shard's members, uint8 [N, TAR_BLOCK]: `tarfile` makes the first, for all."""
    names = [member_name(number, chunk) for chunk in range(count)]
    first = tarfile.TarInfo(names[0])
    first.size, first.mode = payload, 0o444
    headers = np.tile(np.frombuffer(first.tobuf(tarfile.USTAR_FORMAT), np.uint8), (count, 1))
    headers[:, : len(names[0])] = np.array(names, "S").view(np.uint8).reshape(count, -1)
    headers[:, _SUM] = ord(" ")  # the sum is defined with blanks in its own place
    sums = headers.sum(axis=1, dtype=np.int64)
    digits = sums[:, None] >> np.arange(15, -1, -3) & 7
    headers[:, _SUM] = np.pad(digits + ord("0"), ((0, 0), (0, 2)))
    headers[:, _SUM.stop - 1] = ord(" ")
    return headers
