"""Reads shards: checks them against the manifest, then serves them from memory.

Notation: N chunks of a shard, T tokens of a chunk.
"""

import mmap
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from i3dist.config import OnDamage
from i3dist.data.archive import chunks_of, shard_bytes
from i3dist.data.folder import Folder, RemoteFolder, is_intact
from i3dist.data.manifest import Manifest
from i3dist.data.shard_table import shard_number
from i3dist.errors import UserError
from i3dist.files import regular


class ShardTokens(NamedTuple):
    """One shard in memory."""

    tokens: npt.NDArray[np.unsignedinteger]  # [N, T] ids: uint16, or uint32 as the manifest says
    depth: npt.NDArray[np.int64]  # [N] chunks before each that belong to the document it continues
    damage: str = ""  # of a quarantined shard, what is not trained on, in words
    learned: npt.NDArray[np.bool_] | None = None  # [N, T] which tokens are; None: all

    def not_learned(self, chunk: int) -> npt.NDArray[np.intp]:
        """Places in a chunk after which stands a token that is not learned. There is a mask."""
        assert self.learned is not None
        length = self.tokens.shape[1]
        after = self.learned.reshape(-1)[chunk * length + 1 : (chunk + 1) * length + 1]
        return np.flatnonzero(~after)


# On a network file system each size takes a while, so many are asked for at once.
STAT_THREADS = 16
STAT_BATCH = 1 << 14
MISSING = -1
READERS = 1 + 256  # processes that may share a cache's notes: a rank, and its data.workers


class DamagedShardError(UserError):
    """A shard that can be read but is not the manifest's."""


def check_shards(folder: Folder, manifest: Manifest, on_damage: OnDamage = "stop") -> None:
    """Check that every shard of a split exists and has its size, without opening any.

    At a URL that would take a request for every shard. There the last one is fetched, which is
    missing where an upload has not ended.

    Raises:
        UserError: a shard is missing, or has another size and `on_damage` is "stop". The message
            names the first such shard and counts the others.
    """
    if not isinstance(folder, Path):
        _check_last(folder, manifest, on_damage)
        return
    sizes = _sizes(folder, len(manifest.shards))
    missing = sizes == MISSING
    wrong = np.flatnonzero(missing if on_damage == "quarantine" else sizes != manifest.shard_sizes)
    if not len(wrong):
        return
    first, others = manifest.shards[wrong[0]], len(wrong) - 1
    if missing[wrong[0]]:
        what = f"cannot be read ({_problem(folder / first.name)})"
    else:
        what = f"differs from its manifest ({sizes[wrong[0]]:,} of {first.size:,} bytes)"
    more = f", and {others:,} more are missing or have another size" if others else ""
    remedy = _remedy(manifest, can_go_on=not missing.any())
    raise UserError(f"{folder / first.name}: shard {what}{more}; {remedy}")


def _check_last(folder: RemoteFolder, manifest: Manifest, on_damage: OnDamage) -> None:
    shard = manifest.shards[-1]
    if not is_intact(folder.read(shard), shard) and on_damage == "stop":
        what = "shard differs from its manifest"
        raise UserError(f"{folder / shard.name}: {what}; {_remedy(manifest)}")


def _sizes(folder: Path, count: int) -> npt.NDArray[np.int64]:
    """Sizes in bytes of the first `count` shards, `MISSING` where there is no file.

    Links are followed.
    """
    sizes = np.full(count, MISSING)

    def measure(entries: list[os.DirEntry[str]]) -> None:
        for entry in entries:
            number = shard_number(entry.name)
            if number is not None and number < count and entry.is_file():
                sizes[number] = entry.stat().st_size

    try:
        with os.scandir(folder) as listing, ThreadPoolExecutor(STAT_THREADS) as pool:
            while there := list(islice(listing, STAT_BATCH)):  # not all at once: there are millions
                for _ in pool.map(measure, (there[n::STAT_THREADS] for n in range(STAT_THREADS))):
                    pass
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    return sizes


def _problem(path: Path) -> str:
    """Why a shard that was not found among the files cannot be read."""
    try:
        regular(path)
    except OSError as error:
        return str(error.strerror)
    return "it has just come: start again"


def _remedy(manifest: Manifest, can_go_on: bool = True, first: str = "") -> str:
    """What to do about a shard. Shards of validation cannot be quarantined.

    `first` is what to do before making data again whose damage shard.py does not notice.
    """
    again = f"make the data again{first}"
    if can_go_on and manifest.split == "train":
        return f"restore it, {again}, or train without it by data.on_damage=quarantine"
    return f"restore it or {again}"


def read_shard(folder: Folder, manifest: Manifest, index: int) -> ShardTokens:
    """Read one shard of a split.

    The file's size and SHA-256 are compared with the manifest before anything in it is used, so a
    truncated, altered or exchanged shard is never trained on. Tokens are read at fixed offsets, and
    the rest of the file must be what `shard_bytes` writes: no archive is ever parsed.

    Raises:
        DamagedShardError: the shard is truncated, altered or another one.
        UserError: it is missing or unreadable, or the manifest is of other data.
    """
    shard = manifest.shards[index]
    path = folder / shard.name
    try:
        if isinstance(folder, Path):
            local = regular(folder / shard.name)
            data = local.read_bytes() if local.stat().st_size == shard.size else b""
        else:
            data = folder.read(shard)
    except OSError as error:
        raise UserError(
            f"{path}: shard cannot be read ({error.strerror}); restore it or make the data again"
        ) from None
    if not is_intact(data, shard):
        raise DamagedShardError(
            f"{path}: shard differs from its manifest (size or SHA-256); "
            f"{_remedy(manifest, first=f' (delete {folder.parent} first)')}"
        )
    kind = manifest.token_type
    stored = chunks_of(data, shard.chunks, manifest.chunk_length, kind.dtype)
    tokens = kind.ids(stored)
    if shard_bytes(index, stored) != data or tokens.max() >= manifest.vocab_size:
        raise UserError(
            f"{path}: not a shard of this vocabulary and format, though its SHA-256 is the "
            "manifest's; make the data with data_prep/shard.py"
        )
    depth = document_depth(tokens, manifest.bos_id)
    return ShardTokens(tokens, depth, learned=kind.learned(stored))


def quarantined(folder: Folder, manifest: Manifest, index: int) -> ShardTokens:
    """A stand-in for a damaged shard: as many chunks of padding, which have no targets.

    The lane idles meanwhile and no other chunk moves, so the stream still depends only on seed,
    epoch, lanes and data.
    """
    shard = manifest.shards[index]
    shape = (shard.chunks, manifest.chunk_length)
    tokens = np.full(shape, manifest.pad_id, manifest.token_type.dtype)
    damage = (
        f"{folder / shard.name} is damaged and quarantined: its {shard.chunks} chunks of "
        f"{manifest.tokens_in(index):,} tokens are not trained on"
    )
    return ShardTokens(tokens, np.zeros(shard.chunks, np.int64), damage)


def document_depth(tokens: npt.NDArray[np.unsignedinteger], bos_id: int) -> npt.NDArray[np.int64]:
    """The number of chunks before each one that belong to the document it continues.

    0 for the first chunk of a shard, whose history is in another shard, and for a chunk that begins
    with ``<BOS>``.

    Args:
        tokens: [N, T].
        bos_id: the id of ``<BOS>``.

    Returns:
        int64 [N].
    """
    begins = tokens == bos_id
    position = np.arange(len(tokens))
    # The last chunk up to each one in which a document begins; if there is none, the first chunk.
    opened = np.maximum.accumulate(np.where(begins.any(axis=1), position, 0))
    before = np.concatenate([[0], opened[:-1]])
    return np.where(begins[:, 0], 0, position - before)


class ShardCache:
    """Keeps the shards that lanes are reading; drops the least recently used one."""

    def __init__(self, folder: Folder, manifest: Manifest, capacity: int, on_damage: OnDamage):
        self.folder = folder
        self.manifest = manifest
        self.capacity = capacity
        self.on_damage = on_damage
        self.reader = 0  # the number of this process among those that were forked with this cache
        self._held: OrderedDict[int, ShardTokens] = OrderedDict()
        # By process, 1 + the shard that it reads right now, in memory that forks share.
        self._reads = np.frombuffer(mmap.mmap(-1, READERS * 8), np.int64)

    def being_read(self) -> list[str]:
        """Names of the shards that this process and its forks are reading from files."""
        reads = np.unique(self._reads)
        return [self.manifest.shards[number - 1].name for number in reads if number]

    def __getitem__(self, index: int) -> ShardTokens:
        if index not in self._held:
            while len(self._held) >= self.capacity:
                self._held.popitem(last=False)
            self._held[index] = self._read(index)
        self._held.move_to_end(index)
        return self._held[index]

    def _read(self, index: int) -> ShardTokens:
        self._reads[self.reader] = 1 + index
        try:
            return read_shard(self.folder, self.manifest, index)
        except DamagedShardError:
            if self.on_damage == "stop":
                raise
            return quarantined(self.folder, self.manifest, index)
        finally:
            self._reads[self.reader] = 0
