"""Which chunks each lane reads when: a pure function of seed, epoch, lanes and shard sizes.

A lane is one row of the whole job's batch. In each epoch lane g of G takes shards g, g + G, ... of
the epoch's permutation and reads each from first chunk to last. A window is its next K chunks.
Ranks appear nowhere here: the stream is the same for any number of them. Lanes that run out of
shards before the others idle until the epoch ends.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from i3dist.errors import UserError


def permutation(seed: int, epoch: int, count: int) -> list[int]:
    """A uniformly random order of range(count), the same on every machine and library version."""

    def key(item: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{item}".encode(), digest_size=16).digest()

    return sorted(range(count), key=key)


@dataclass(frozen=True)
class LanePlan:
    """What one lane reads in one epoch: whole shards, one after the other."""

    shards: tuple[int, ...]
    ends: tuple[int, ...]  # chunks of the lane up to and including each shard

    @property
    def chunks(self) -> int:
        """Chunks that the lane reads in the epoch."""
        return self.ends[-1] if self.ends else 0

    def chunk(self, position: int) -> tuple[int, int] | None:
        """(shard, chunk in it) at the lane's `position` in the epoch; None where it idles."""
        if position >= self.chunks:
            return None
        which = bisect_right(self.ends, position)
        start = self.ends[which - 1] if which else 0
        return self.shards[which], position - start


@dataclass(frozen=True)
class Schedule:
    """(window index, lane) -> the K chunks to read. Every chunk is read exactly once an epoch."""

    shard_chunks: tuple[int, ...]
    lanes: int
    window: int
    seed: int
    subset: tuple[int, ...] | None = None  # shards to read; None reads all

    @cached_property
    def _plans(self) -> "_Plans":
        return _Plans(self)

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, window in the epoch) of the job's window number `index`."""
        return self._plans.locate(index)

    def windows_in_epoch(self, epoch: int) -> int:
        """Windows until the longest lane is through."""
        longest = max(plan.chunks for plan in self._plans.of_epoch(epoch))
        return -(-longest // self.window)

    def chunks(self, index: int, lane: int) -> list[tuple[int, int] | None]:
        """The K (shard, chunk) that `lane` reads in window `index`; None where it idles."""
        epoch, window = self.locate(index)
        plan = self._plans.of_epoch(epoch)[lane]
        return [plan.chunk(window * self.window + k) for k in range(self.window)]


@dataclass
class _Plans:
    """The epochs' plans, made when first asked for."""

    schedule: Schedule
    starts: list[int] = field(default_factory=lambda: [0])  # first window of each known epoch
    plans: dict[int, list[LanePlan]] = field(default_factory=dict)

    def of_epoch(self, epoch: int) -> list[LanePlan]:
        if epoch not in self.plans:
            if len(self.plans) > 4:  # training looks at one epoch and the next
                self.plans.clear()
            self.plans[epoch] = self._make(epoch)
        return self.plans[epoch]

    def _make(self, epoch: int) -> list[LanePlan]:
        s = self.schedule
        pool = s.subset if s.subset is not None else range(len(s.shard_chunks))
        order = [pool[i] for i in permutation(s.seed, epoch, len(pool))]
        plans = []
        for lane in range(s.lanes):
            shards = tuple(order[lane :: s.lanes])
            plans.append(LanePlan(shards, tuple(accumulate(s.shard_chunks[i] for i in shards))))
        return plans

    def locate(self, index: int) -> tuple[int, int]:
        while self.starts[-1] <= index:
            epoch = len(self.starts) - 1
            self.starts.append(self.starts[-1] + self.schedule.windows_in_epoch(epoch))
        epoch = bisect_right(self.starts, index) - 1
        return epoch, index - self.starts[epoch]


def lanes_of_rank(lanes: int, rank: int, world_size: int) -> range:
    """The lanes that `rank` owns: an equal, contiguous share.

    Raises:
        UserError: the number of lanes is not divisible by the number of ranks.
    """
    if lanes % world_size:
        raise UserError(
            f"train.lanes={lanes} cannot be shared by {world_size} ranks; "
            f"start a number of ranks that divides it: {', '.join(map(str, divisors(lanes)))}"
        )
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)


def divisors(lanes: int) -> list[int]:
    """The numbers that divide `lanes`, in order."""
    return [n for n in range(1, lanes + 1) if lanes % n == 0]


def fixed_subset(shard_chunks: Sequence[int], chunks: int, seed: int) -> tuple[int, ...]:
    """Shards holding at least `chunks` chunks (or all there are), the same ones for a seed."""
    chosen: list[int] = []
    for shard in permutation(seed, 0, len(shard_chunks)):
        if sum(shard_chunks[i] for i in chosen) >= chunks:
            break
        chosen.append(shard)
    return tuple(chosen)
