"""Reading shards: verified against the manifest, then served from memory.

Letters: N chunks of a shard, T tokens of a chunk.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from i3dist.config import OnDamage
from i3dist.data.archive import chunks_of, shard_bytes
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError


class ShardTokens(NamedTuple):
    """One shard in memory."""

    tokens: npt.NDArray[np.uint16]  # [N, T]
    depth: npt.NDArray[np.int64]  # [N] chunks before each that belong to the document it continues
    loss: str = ""  # what is lost, in words, where the shard is quarantined


class DamagedShardError(UserError):
    """A shard that can be read and is not what its manifest says."""


def read_shard(folder: Path, manifest: Manifest, index: int) -> ShardTokens:
    """Read one shard of a split.

    Nothing in the file is interpreted before its size and SHA-256 are those of the manifest, so a
    cut, altered or exchanged shard is never trained on. Tokens then stand at fixed offsets, and
    whatever else the file holds must be as `shard_bytes` writes it: no archive is ever parsed.

    Raises:
        DamagedShardError: the shard is cut, altered or another one.
        UserError: it is missing or unreadable, or the manifest is of something else.
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
        raise DamagedShardError(
            f"{path}: shard differs from its manifest (size or SHA-256); "
            "restore it, make the data again, or train without it by data.on_damage=quarantine"
        )
    tokens = chunks_of(data, shard.chunks, manifest.chunk_length)
    if shard_bytes(index, tokens) != data or tokens.max() >= manifest.vocab_size:
        raise UserError(
            f"{path}: not a shard of this vocabulary and format, though its SHA-256 is the "
            "manifest's; make the data with data_prep/shard.py"
        )
    return ShardTokens(tokens, document_depth(tokens, manifest.bos_id))


def quarantined(folder: Path, manifest: Manifest, index: int) -> ShardTokens:
    """What takes a damaged shard's place: as many chunks of padding, which have no targets.

    Its lane idles and no other chunk moves, so the stream still depends on seed, epoch, lanes and
    data alone.
    """
    shard = manifest.shards[index]
    tokens = np.full((shard.chunks, manifest.chunk_length), manifest.pad_id, np.uint16)
    loss = (
        f"{folder / shard.name} is damaged and quarantined: its {shard.chunks} chunks of "
        f"{manifest.tokens_in(index):,} tokens are not trained on"
    )
    return ShardTokens(tokens, np.zeros(shard.chunks, np.int64), loss)


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

    def __init__(self, folder: Path, manifest: Manifest, capacity: int, on_damage: OnDamage):
        self.folder = folder
        self.manifest = manifest
        self.capacity = capacity
        self.on_damage = on_damage
        self._held: OrderedDict[int, ShardTokens] = OrderedDict()

    def __getitem__(self, index: int) -> ShardTokens:
        if index not in self._held:
            while len(self._held) >= self.capacity:
                self._held.popitem(last=False)
            self._held[index] = self._read(index)
        self._held.move_to_end(index)
        return self._held[index]

    def _read(self, index: int) -> ShardTokens:
        try:
            return read_shard(self.folder, self.manifest, index)
        except DamagedShardError:
            if self.on_damage == "stop":
                raise
            return quarantined(self.folder, self.manifest, index)
