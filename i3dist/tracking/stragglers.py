"""Which ranks are slow: every rank's own time of computing, and its GPU's clock and temperature.

Ranks wait for each other in every step, so that the step times of all are that of the slowest. Own
times tell them apart. They travel with what a step sums over ranks anyway: each rank fills its own
place, and the sum has all of them.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from i3dist.distributed.collectives import gather_objects
from i3dist.distributed.devices import uses_cuda
from i3dist.distributed.job import Job, host_name

# A rank is slow if it takes so much longer than the fastest.
SLOW = 1.1
# The driver takes milliseconds to tell a GPU's state, and steps wait meanwhile.
ASK_SECONDS = 10.0


@dataclass(frozen=True)
class RankFigures:
    """One rank over an interval. A figure that is not known is 0."""

    rank: int
    host: str
    seconds: float
    """Own computing in a step, mean: from its data to its first gradients (`ComputeTimer`)."""
    clock: float
    """Of the GPU's multiprocessors, MHz."""
    temperature: float
    """Of the GPU, degrees Celsius."""


class Stragglers:
    """The figures of all ranks, since the last report."""

    def __init__(self, job: Job) -> None:
        """Every rank calls this, at the same time."""
        self._rank, self._ranks = job.rank, job.world_size
        self._hosts = gather_objects(host_name())
        self._own = [0.0, 0.0, 0.0]  # seconds of the last step, clock, temperature
        self._asked = -ASK_SECONDS
        self.restart()

    def restart(self) -> None:
        """Begin the next interval."""
        if (now := time.monotonic()) - self._asked >= ASK_SECONDS:
            self._asked, self._own[1:] = now, _gpu_state()
        self._sums = [0.0] * (3 * self._ranks)
        self._steps = 0

    def share(self, like: Tensor) -> Tensor:
        """[3 x ranks], with 0 in other ranks' places: what is to be summed over ranks.

        `like` says type and device. A job of one rank sums nothing: [0].
        """
        shares = like.new_zeros(3 * self._ranks if self._ranks > 1 else 0)
        if self._ranks > 1:
            for place, figure in enumerate(self._own, start=3 * self._rank):
                shares[place].fill_(figure)  # on the device: a copy from the host would wait
        return shares

    def add(self, summed: Sequence[float], seconds: float) -> None:
        """Add a step.

        Args:
            summed: what all ranks' shares came to.
            seconds: this rank's own in this step, which the next share has.
        """
        sent, self._own[0] = self._own[0] > 0, seconds
        if sent:
            new = summed if self._ranks > 1 else self._own
            self._sums = [a + b for a, b in zip(self._sums, new, strict=True)]
            self._steps += 1

    def figures(self) -> list[RankFigures]:
        """Of each rank, in the steps since the last report; none before a first share is in."""
        if not self._steps:
            return []
        means = [total / self._steps for total in self._sums]
        return [
            RankFigures(rank, host, *means[3 * rank : 3 * rank + 3])
            for rank, host in enumerate(self._hosts)
        ]


def _gpu_state() -> tuple[float, float]:
    """Clock in MHz and temperature in degrees Celsius of this rank's GPU; 0 where not known."""
    if uses_cuda():
        with suppress(Exception):  # the driver may not tell, or nvidia-ml-py be missing
            return float(torch.cuda.clock_rate()), float(torch.cuda.temperature())
    return 0.0, 0.0
