"""Writes a shard: a POSIX ustar archive with one member per chunk, all of one fixed size."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from i3dist.data.manifest import Shard, archive_size, member_name, member_stride, shard_name


def write_shard(folder: Path, number: int, chunks: NDArray[np.uint16]) -> Shard:
    """Write `chunks`, shape [chunks, chunk_length], as shard `number` into `folder`."""
    data = shard_bytes(number, chunks)
    name = shard_name(number)
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name=name, chunks=len(chunks), size=len(data), sha256=digest)


def shard_bytes(number: int, chunks: NDArray[np.uint16]) -> bytes:
    """The archive of `chunks`: it depends on tokens and number alone, on no clock or user."""
    count, length = chunks.shape
    members = (_member(member_name(number, i), chunk) for i, chunk in enumerate(chunks))
    stride = member_stride(length)
    data = b"".join(member.ljust(stride, b"\0") for member in members)
    return data.ljust(archive_size(count, length), b"\0")


def _member(name: str, chunk: NDArray[np.uint16]) -> bytes:
    payload = chunk.astype("<u2").tobytes()
    header = tarfile.TarInfo(name)
    header.size = len(payload)
    header.mode = 0o444
    return header.tobuf(tarfile.USTAR_FORMAT) + payload
