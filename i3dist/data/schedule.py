"""Which chunks each lane reads when: a pure function of seed, lanes, window and shard sizes.

A lane is one row of the whole job's batch. It reads a whole shard from first chunk to last, then
takes its next one. A window is its next K chunks. Ranks appear nowhere here: the stream is the same
for any number of them.

There are two schedules. A run keeps the one that it began with (`train.schedule`).

- `Schedule`, version 2: the epochs' permutations of the shards follow each other in one endless
  sequence, of which lane g of G takes shards g, g + G, ... No lane ever waits.
- `EpochSchedule`, version 1: lane g takes shards g, g + G, ... of each epoch's permutation, and
  lanes that run out of shards before the others idle until the epoch ends.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal, Protocol

from i3dist.errors import UserError

Version = Literal[1, 2]
NEWEST: Version = 2
# Plans are kept of so many shards in all; lanes are in several rounds at once.
KEPT_SHARDS, FEWEST_ROUNDS = 1 << 17, 4
Place = tuple[int, int]
"""A shard, and a chunk in it."""


class Windows(Protocol):
    """(window index, row of the batch) -> the K chunks to read."""

    @property
    def window(self) -> int:
        """Chunks K of a window."""
        ...

    def chunks(self, index: int, lane: int) -> list[Place | None]:
        """The K chunks that a row reads in window `index`; None where it idles."""
        ...


class LaneSchedule(Windows, Protocol):
    """The windows of all lanes of a job."""

    @property
    def lanes(self) -> int:
        """Lanes G of the job."""
        ...


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

    @classmethod
    def of(cls, shards: Sequence[int], shard_chunks: Sequence[int]) -> "LanePlan":
        """The plan of these shards, given the sizes of all."""
        return cls(tuple(shards), tuple(accumulate(shard_chunks[i] for i in shards)))

    @property
    def chunks(self) -> int:
        """Chunks that the lane reads in the epoch."""
        return self.ends[-1] if self.ends else 0

    def chunk(self, position: int) -> Place | None:
        """(shard, chunk in it) at the lane's `position` in the epoch; None beyond its end."""
        if position >= self.chunks:
            return None
        which = bisect_right(self.ends, position)
        start = self.ends[which - 1] if which else 0
        return self.shards[which], position - start


@dataclass(frozen=True)
class Schedule:
    """Version 2: lanes walk through one endless sequence of shards and never idle.

    Every chunk is read exactly once in each epoch's stretch of the sequence. Lanes enter an epoch
    at different steps, as shards differ in size.
    """

    shard_chunks: tuple[int, ...]
    lanes: int
    window: int
    seed: int

    @cached_property
    def _sequence(self) -> "_Sequence":
        return _Sequence(self.shard_chunks, self.lanes, self.seed)

    def chunks(self, index: int, lane: int) -> list[Place | None]:
        """The K (shard, chunk) that `lane` reads in window `index`."""
        first = index * self.window
        return [self._sequence.chunk(first + k, lane) for k in range(self.window)]


@dataclass
class _Sequence:
    """The endless sequence of shards, as it is asked for, round by round.

    A round is as many epochs as have a shard for every lane: one, or more with fewer shards.
    """

    shard_chunks: tuple[int, ...]
    lanes: int
    seed: int
    # For each known round, how many chunks each lane has read before it.
    starts: list[list[int]] = field(default_factory=list)
    plans: dict[int, list[LanePlan]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.epochs = -(-self.lanes // len(self.shard_chunks))  # of a round
        self.starts.append([0] * self.lanes)

    def chunk(self, position: int, lane: int) -> Place:
        """The chunk at a lane's `position`, counted from the start of the run."""
        while self.starts[-1][lane] <= position:
            before, plans = self.starts[-1], self._round(len(self.starts) - 1)
            self.starts.append([n + p.chunks for n, p in zip(before, plans, strict=True)])
        number = bisect_right(self.starts, position, key=lambda starts: starts[lane]) - 1
        place = self._round(number)[lane].chunk(position - self.starts[number][lane])
        assert place is not None
        return place

    def _round(self, number: int) -> list[LanePlan]:
        """Every lane's plan in one round."""
        if number not in self.plans:
            # Lanes drift apart, as the last shard is short.
            most = KEPT_SHARDS // (self.epochs * len(self.shard_chunks))
            while len(self.plans) >= max(FEWEST_ROUNDS, most):
                del self.plans[min(self.plans)]
            self.plans[number] = self._make(number)
        return self.plans[number]

    def _make(self, number: int) -> list[LanePlan]:
        count, first = len(self.shard_chunks), number * self.epochs
        epochs = range(first, first + self.epochs)
        order = [shard for epoch in epochs for shard in permutation(self.seed, epoch, count)]
        # Lane g's places in the sequence are g, g + G, ...; the round's begin at first * count.
        offsets = ((lane - first * count) % self.lanes for lane in range(self.lanes))
        return [LanePlan.of(order[offset :: self.lanes], self.shard_chunks) for offset in offsets]


@dataclass(frozen=True)
class EpochSchedule:
    """Version 1: lanes that run out of shards idle until the epoch ends."""

    shard_chunks: tuple[int, ...]
    lanes: int
    window: int
    seed: int

    @cached_property
    def _epochs(self) -> "_Epochs":
        return _Epochs(self)

    def windows_in_epoch(self, epoch: int) -> int:
        """Windows until the longest lane is through."""
        longest = max(plan.chunks for plan in self._epochs.plans_of(epoch))
        return -(-longest // self.window)

    def chunks(self, index: int, lane: int) -> list[Place | None]:
        """The K (shard, chunk) that `lane` reads in window `index`; None where it idles."""
        epoch, window = self._epochs.locate(index)
        plan = self._epochs.plans_of(epoch)[lane]
        return [plan.chunk(window * self.window + k) for k in range(self.window)]


@dataclass
class _Epochs:
    """The epochs' plans, made when first asked for."""

    schedule: EpochSchedule
    starts: list[int] = field(default_factory=lambda: [0])  # first window of each known epoch
    plans: dict[int, list[LanePlan]] = field(default_factory=dict)

    def plans_of(self, epoch: int) -> list[LanePlan]:
        if epoch not in self.plans:
            if len(self.plans) > 4:  # training looks at one epoch and the next
                self.plans.clear()
            s = self.schedule
            order = permutation(s.seed, epoch, len(s.shard_chunks))
            self.plans[epoch] = [
                LanePlan.of(order[lane :: s.lanes], s.shard_chunks) for lane in range(s.lanes)
            ]
        return self.plans[epoch]

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, window in the epoch) of the job's window number `index`."""
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
    held = 0
    for shard in permutation(seed, 0, len(shard_chunks)):
        if held >= chunks:
            break
        chosen.append(shard)
        held += shard_chunks[shard]
    return tuple(chosen)
