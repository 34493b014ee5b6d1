"""Reading shards: verified against the manifest, then served from memory.

Letters: N chunks of a shard, T tokens of a chunk.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from i3dist.data.manifest import TAR_BLOCK, Manifest, member_stride
from i3dist.errors import UserError


class ShardTokens(NamedTuple):
    """One shard in memory."""

    tokens: npt.NDArray[np.uint16]  # [N, T]
    depth: npt.NDArray[np.int64]  # [N] chunks before each that belong to the document it continues


def read_shard(folder: Path, manifest: Manifest, index: int) -> ShardTokens:
    """Read one shard of a split.

    Nothing in the file is interpreted before its size and SHA-256 are those of the manifest, so a
    cut, altered or exchanged shard is never trained on. Payloads then stand at fixed offsets.

    Raises:
        UserError: the shard is missing, unreadable or altered.
    """
    shard = manifest.shards[index]
    path = folder / shard.name
    try:
        data = path.read_bytes() if path.stat().st_size == shard.size else b""
    except OSError as error:
        raise UserError(
            f"{path}: shard cannot be read ({error.strerror}); restore it or make the data again"
        ) from None
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise UserError(
            f"{path}: shard differs from its manifest (size or SHA-256); "
            "restore it or make the data again"
        )
    stride, length = member_stride(manifest.chunk_length), manifest.chunk_length
    members = np.frombuffer(data, np.uint8, shard.chunks * stride).reshape(shard.chunks, stride)
    payload = np.ascontiguousarray(members[:, TAR_BLOCK : TAR_BLOCK + 2 * length])
    tokens = payload.view("<u2").astype(np.uint16, copy=False)
    return ShardTokens(tokens, document_depth(tokens, manifest.bos_id))


def document_depth(tokens: npt.NDArray[np.uint16], bos_id: int) -> npt.NDArray[np.int64]:
    """How many chunks before each one belong to the document that it continues: [N, T] -> [N].

    0 for the first chunk of a shard, whose history lies elsewhere, and for one that begins with
    ``<BOS>``.
    """
    begins = tokens == bos_id
    position = np.arange(len(tokens))
    # The newest chunk up to each one in which a document begins; without any, the shard's start.
    opened = np.maximum.accumulate(np.where(begins.any(axis=1), position, 0))
    before = np.concatenate([[0], opened[:-1]])
    return np.where(begins[:, 0], 0, position - before)


class ShardCache:
    """The shards that a reader is in the middle of; the least recently used leaves first."""

    def __init__(self, folder: Path, manifest: Manifest, capacity: int):
        self.folder = folder
        self.manifest = manifest
        self.capacity = capacity
        self._held: OrderedDict[int, ShardTokens] = OrderedDict()

    def __getitem__(self, index: int) -> ShardTokens:
        if index not in self._held:
            while len(self._held) >= self.capacity:
                self._held.popitem(last=False)
            self._held[index] = read_shard(self.folder, self.manifest, index)
        self._held.move_to_end(index)
        return self._held[index]
