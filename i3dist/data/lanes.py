"""Batches of lanes. Notation: B lanes, K chunks of a window, T tokens.

A window is a pure function of its index (see `schedule`). So worker processes can read windows in
any order, and a run that continues asks for the next index instead of replaying the stream.
"""

import logging
import os
import re
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from i3dist.config import OnDamage
from i3dist.data.folder import Ahead, Folder
from i3dist.data.held_out import Table
from i3dist.data.manifest import Manifest
from i3dist.data.schedule import LaneSchedule
from i3dist.data.shards import ShardCache
from i3dist.errors import UserError
from i3dist.ops.cross_entropy import IGNORE

log = logging.getLogger(__name__)

# What torch says when a process of a DataLoader has died.
DEATH = r"DataLoader worker \(pid|Pin memory thread exited"


class Batch(NamedTuple):
    """One window of some lanes."""

    tokens: Tensor  # [B, K, T] int64
    targets: Tensor  # [B, K, T] int64, IGNORE where nothing is predicted
    depth: Tensor  # [B, K] int64, number of chunks before each in the document that it continues

    def rows(self, start: int, stop: int) -> "Batch":
        """Lanes [start, stop)."""
        return Batch(*(part[start:stop] for part in self))

    def to(self, device: torch.device) -> "Batch":
        """A copy on the device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class StepCounts(NamedTuple):
    """What one optimizer step of the whole job holds; scalars on the device, fp64."""

    targets: Tensor  # positions that are trained on
    tokens: Tensor  # inputs, padding left out
    chunks: Tensor  # chunks with at least one token
    latents: Tensor  # latents that those chunks may see, in sum


Reading = tuple[Batch, list[str]] | UserError
"""A window, and a line for each quarantined shard in it; or why it cannot be read."""


class LaneWindows(Dataset[Reading]):
    """Window index -> the batch of a range of lanes.

    A `UserError` is returned, not raised: an error raised in a worker process would arrive wrapped
    in that process's traceback.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        schedule: LaneSchedule | Table,
        lanes: range,
        on_damage: OnDamage = "stop",
    ):
        self.manifest = manifest
        self.schedule = schedule
        self.lanes = lanes
        # A lane may end one shard and begin the next within a window.
        self.shards = ShardCache(folder, manifest, capacity=2 * len(lanes), on_damage=on_damage)
        # For local files there is nothing to fetch, and looking ahead takes a third of the time.
        self._ahead = None if isinstance(folder, Path) else Ahead(folder)
        self._reads: dict[int, int] = {}  # by lane: the shard that it reads

    def __getitem__(self, index: int) -> Reading:
        damage: list[str] = []
        if self._ahead is not None and isinstance(self.schedule, LaneSchedule):
            self._fetch_ahead(index, self.schedule, self._ahead)
        try:
            rows = [self._row(index, lane, damage) for lane in self.lanes]
        except UserError as error:
            return error
        parts = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return Batch(*parts), damage

    def _fetch_ahead(self, index: int, schedule: LaneSchedule, ahead: Ahead) -> None:
        """Have the shards of window `index` fetched, then the shard that each lane reads next."""
        now, later = [], []
        for lane in self.lanes:
            places = filter(None, schedule.chunks(index, lane))
            shards = list(dict.fromkeys(shard for shard, _ in places))
            if shards and self._reads.get(lane) != shards[-1]:
                self._reads[lane] = shards[-1]
                now += shards
                later += schedule.shard_after(index, lane)
        ahead.want(self.manifest.shards[shard] for shard in dict.fromkeys(now + later))

    def _row(
        self, index: int, lane: int, damage: list[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [K, T], targets [K, T] and depth [K] of one lane; adds lines to `damage`."""
        m = self.manifest
        shape = (self.schedule.window, m.chunk_length)
        tokens = np.full(shape, m.pad_id, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        depth = np.zeros(shape[0], np.int64)
        for k, place in enumerate(self.schedule.chunks(index, lane)):
            if place is None:
                continue  # the lane idles: padding without targets
            shard, chunk = self.shards[place[0]], place[1]
            if shard.damage:
                damage.append(shard.damage)
            tokens[k] = shard.tokens[chunk]
            targets[k, :-1] = shard.tokens[chunk, 1:]
            if chunk + 1 < len(shard.tokens):
                targets[k, -1] = shard.tokens[chunk + 1, 0]
            if shard.learned is not None:
                targets[k, shard.not_learned(chunk)] = IGNORE
            depth[k] = shard.depth[chunk]
        targets[(targets == m.bos_id) | (targets == m.pad_id)] = IGNORE
        return tokens, targets, depth


def windows(
    dataset: LaneWindows, start: int, stop: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of windows [start, stop) in order, on the device, read ahead by `workers` processes.

    A quarantined shard is logged once, before its first batch. It is logged as an error because
    ranks other than 0 log only errors, and any rank may be the one that reads the shard.

    Raises:
        UserError: a shard is missing, or altered and not to be quarantined; a process has died.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=partial(_begin_to_read, dataset),
    )
    told: set[str] = set()
    for reading in _read(loader):
        if isinstance(reading, UserError):
            raise reading
        batch, damage = reading
        for line in damage:
            if line not in told:
                told.add(line)
                log.error("%s", line)
        yield batch.to(device)


def _begin_to_read(dataset: LaneWindows, worker: int) -> None:
    """Number this reading process, and have it end if a window cannot be handed over.

    If /dev/shm is full, for example, Python would print a traceback and continue, and the rank
    would wait for that window for ever.
    """
    dataset.shards.reader = 1 + worker
    die = staticmethod(lambda *_: os._exit(1))
    Queue._on_queue_feeder_error = die  # type: ignore[attr-defined]


def _read(loader: "DataLoader[Reading]") -> Iterator[Reading]:
    """The items of a loader; if one of its processes dies, a `UserError` is raised here.

    torch would raise in its signal handler, wherever the main thread happens to be, even in a save.
    Without that handler it checks its processes every 5 s while it waits for data.
    """
    try:
        parts = iter(loader)
    except OSError as error:  # no semaphores, or no more processes
        raise UserError(
            f"cannot start processes that read data ({error.strerror}): check that /dev/shm can be "
            "written and that more processes are allowed, or set data.workers=0"
        ) from None
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from parts
    except RuntimeError as error:
        if not re.search(DEATH, str(error)):
            raise
        raise UserError(
            "a process that reads data died (out of memory, or /dev/shm is full?): "
            f"{str(error).strip(' .')}; run the same command again with fewer data.workers, and it "
            "continues"
        ) from None
