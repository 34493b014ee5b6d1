"""Writes a shard."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from i3dist.data.archive import shard_bytes
from i3dist.data.manifest import Shard, shard_name


def write_shard(folder: Path, number: int, chunks: NDArray[np.uint16]) -> Shard:
    """Write `chunks`, shape [chunks, chunk_length], as shard `number` into `folder`."""
    data = shard_bytes(number, chunks)
    name = shard_name(number)
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name=name, chunks=len(chunks), size=len(data), sha256=digest)
