"""Which chunks each lane reads when: a pure function of seed, lanes, window and shard sizes.

A lane is one row of the whole job's batch. It reads a shard from its first chunk to its last, then
takes its next shard. A window is the lane's next K chunks. Ranks do not appear here, so the stream
is the same for any number of ranks.

There are two schedules. A run keeps the one that it began with (`train.schedule`).

- `Schedule`, version 2: the epochs' permutations of the shards form one endless sequence. Lane g of
  G takes shards g, g + G, ... of it. No lane ever waits.
- `EpochSchedule`, version 1: lane g of G takes shards g, g + G, ... of each epoch's permutation.
  Lanes that run out of shards before others idle until the epoch ends.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np

from i3dist.errors import UserError

Version = Literal[1, 2]
NEWEST: Version = 2
# Number of shards whose plans are kept. Lanes are in several rounds at once.
KEPT_SHARDS, FEWEST_ROUNDS = 1 << 17, 4
Place = tuple[int, int]
"""A shard, and a chunk in it."""


def permutation(seed: int, epoch: int, count: int) -> list[int]:
    """A uniformly random order of range(count), the same on every machine and library version."""

    prefix = f"{seed}/{epoch}/"
    keys = b"".join(
        hashlib.blake2b(f"{prefix}{item}".encode(), digest_size=16).digest()
        for item in range(count)
    )
    halves = np.frombuffer(keys, ">u8").reshape(count, 2)
    order: list[int] = np.lexsort((halves[:, 1], halves[:, 0])).tolist()
    return order


@dataclass(frozen=True)
class LanePlan:
    """The whole shards that one lane reads in a round, one after the other."""

    shards: tuple[int, ...]
    ends: tuple[int, ...]  # chunks of the lane up to and including each shard

    @classmethod
    def of(cls, shards: Sequence[int], shard_chunks: Sequence[int]) -> "LanePlan":
        """The plan for these shards, given the sizes of all shards."""
        return cls(tuple(shards), tuple(accumulate(shard_chunks[i] for i in shards)))

    @property
    def chunks(self) -> int:
        """Chunks that the lane reads in the round."""
        return self.ends[-1] if self.ends else 0

    def chunk(self, position: int) -> Place | None:
        """(shard, chunk in it) at the lane's `position` in the round; None beyond its end."""
        if position >= self.chunks:
            return None
        which = bisect_right(self.ends, position)
        start = self.ends[which - 1] if which else 0
        return self.shards[which], position - start


@dataclass(frozen=True)
class LaneSchedule:
    """The windows of all lanes of a job.

    Lanes are planned round by round. A round is one epoch or several.
    """

    shard_chunks: tuple[int, ...]
    lanes: int
    window: int
    seed: int
    _kept: dict[int, list[LanePlan]] = field(default_factory=dict, init=False, compare=False)

    def chunks(self, index: int, lane: int) -> list[Place | None]:
        """The K (shard, chunk) that `lane` reads in window `index`; None where it idles."""
        raise NotImplementedError

    def first_reading(self, shard: int, chunk: int) -> tuple[int, int, int]:
        """(window, lane, chunk in the window) at which the first epoch reads a chunk of a shard."""
        count = len(self.shard_chunks)
        turn, lane = divmod(permutation(self.seed, 0, count).index(shard), self.lanes)
        before = self.plans(0)[lane].ends[turn - 1] if turn else 0
        window, k = divmod(before + chunk, self.window)
        return window, lane, k

    def shard_after(self, index: int, lane: int) -> list[int]:
        """The shard that `lane` reads after those of window `index`; none if it idles then."""
        read = [place[0] for place in self.chunks(index, lane) if place]
        for later in range(index + 1, index + 2 + self.shard_chunks[read[-1]] // self.window):
            places = filter(None, self.chunks(later, lane))
            if new := [shard for shard, _ in places if shard != read[-1]]:
                return new[:1]
        return []

    @property
    def epochs(self) -> int:
        """Epochs of a round."""
        return 1

    def plans(self, number: int) -> list[LanePlan]:
        """The plan of each lane in one round. Recent rounds are kept."""
        if number not in self._kept:
            most = KEPT_SHARDS // (self.epochs * len(self.shard_chunks))
            while len(self._kept) >= max(FEWEST_ROUNDS, most):
                del self._kept[min(self._kept)]
            self._kept[number] = self._plan(number)
        return self._kept[number]

    def _plan(self, number: int) -> list[LanePlan]:
        count, first = len(self.shard_chunks), number * self.epochs
        epochs = range(first, first + self.epochs)
        order = [shard for epoch in epochs for shard in permutation(self.seed, epoch, count)]
        offsets = (self._offset(lane, first * count) for lane in range(self.lanes))
        return [LanePlan.of(order[offset :: self.lanes], self.shard_chunks) for offset in offsets]

    def _offset(self, lane: int, before: int) -> int:
        """Where the lane's first shard stands in a round with `before` shards before it."""
        return lane


@dataclass(frozen=True)
class Schedule(LaneSchedule):
    """Version 2: lanes walk through one endless sequence of shards and never idle.

    Every chunk is read exactly once in each epoch's stretch of the sequence. Lanes enter an epoch
    at different steps, as shards differ in size.
    """

    # For each known round, the chunks that each lane has read before it.
    _starts: list[list[int]] = field(default_factory=list, init=False, compare=False)

    def __post_init__(self) -> None:
        self._starts.append([0] * self.lanes)

    @property
    def epochs(self) -> int:
        """Epochs of a round: as many as have a shard for every lane."""
        return -(-self.lanes // len(self.shard_chunks))

    def chunks(self, index: int, lane: int) -> list[Place | None]:
        """The K (shard, chunk) that `lane` reads in window `index`."""
        first = index * self.window
        return [self._chunk(first + k, lane) for k in range(self.window)]

    def _chunk(self, position: int, lane: int) -> Place | None:
        """The chunk at a lane's `position`, counted from the start of the run."""
        starts = self._starts
        while starts[-1][lane] <= position:
            plans = self.plans(len(starts) - 1)
            starts.append([n + p.chunks for n, p in zip(starts[-1], plans, strict=True)])
        number = bisect_right(starts, position, key=lambda counts: counts[lane]) - 1
        return self.plans(number)[lane].chunk(position - starts[number][lane])

    def _offset(self, lane: int, before: int) -> int:
        # Lane g's places in the sequence are g, g + G, ...
        return (lane - before) % self.lanes


@dataclass(frozen=True)
class EpochSchedule(LaneSchedule):
    """Version 1: lanes that run out of shards idle until the epoch ends. A round is an epoch."""

    # First window of each known epoch.
    _starts: list[int] = field(default_factory=lambda: [0], init=False, compare=False)

    def windows_in_epoch(self, epoch: int) -> int:
        """Windows until the longest lane has ended."""
        longest = max(plan.chunks for plan in self.plans(epoch))
        return -(-longest // self.window)

    def chunks(self, index: int, lane: int) -> list[Place | None]:
        """The K (shard, chunk) that `lane` reads in window `index`; None where it idles."""
        while self._starts[-1] <= index:
            epoch = len(self._starts) - 1
            self._starts.append(self._starts[-1] + self.windows_in_epoch(epoch))
        epoch = bisect_right(self._starts, index) - 1
        first = (index - self._starts[epoch]) * self.window
        plan = self.plans(epoch)[lane]
        return [plan.chunk(first + k) for k in range(self.window)]


def lanes_of_rank(lanes: int, rank: int, world_size: int) -> range:
    """The lanes that `rank` owns: an equal, contiguous share.

    Raises:
        UserError: the number of ranks does not divide the number of lanes.
    """
    if lanes % world_size:
        raise UserError(
            f"train.lanes={lanes} cannot be shared by {world_size} ranks; "
            f"start a number of ranks that divides it: {', '.join(map(str, divisors(lanes)))}"
        )
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)


def divisors(lanes: int) -> list[int]:
    """The numbers that divide `lanes`, ascending."""
    return [n for n in range(1, lanes + 1) if lanes % n == 0]


def fixed_subset(shard_chunks: Sequence[int], chunks: int, seed: int) -> tuple[int, ...]:
    """A choice of whole shards with `chunks` chunks or more, or all; it depends on the seed."""
    order = permutation(seed, 0, len(shard_chunks))
    held = list(accumulate(shard_chunks[shard] for shard in order))
    return tuple(order[: bisect_left(held, chunks) + 1])
