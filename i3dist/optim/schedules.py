"""Schedules by name: how the learning rate falls after warm-up, and how history is let in.

A schedule is a function that takes a `Point` of a curve and returns the curve's height there, from
0 to 1. Your own is registered in a file that `--extend` names (docs/extending.md).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from i3dist.errors import UserError, reason
from i3dist.registry import Registry


@dataclass(frozen=True)
class Point:
    """A point of a curve that leads from `start` to `end` within `steps` steps, and stays there."""

    step: int
    """Steps since the curve began; may exceed `steps`."""
    steps: int
    start: float
    end: float
    decay_fraction: float = 1.0
    """`optimizer.decay_fraction`."""

    @property
    def progress(self) -> float:
        """The share of the curve that is done, from 0 to 1."""
        return min(1.0, self.step / self.steps)

    def between(self, share: float) -> float:
        """`start` where `share` is 0, `end` where it is 1, and on a line between them."""
        return self.start * (1.0 - share) + self.end * share


Schedule = Callable[[Point], float]
SCHEDULES: Registry[Schedule] = Registry("schedule")
SHORT_NAMES = {"wsd": "warmup-stable-decay"}


@SCHEDULES.register("cosine")
def cosine(at: Point) -> float:
    """Half a cosine wave: flat at both ends (Loshchilov and Hutter, arXiv:1608.03983)."""
    return at.end + (at.start - at.end) * (0.5 * (1.0 + math.cos(math.pi * at.progress)))


@SCHEDULES.register("linear")
def linear(at: Point) -> float:
    """A straight line."""
    return at.between(at.progress)


@SCHEDULES.register("warmup-stable-decay")
def warmup_stable_decay(at: Point) -> float:
    """Stay at `start`; over the last `decay_fraction` of the curve, a line (arXiv:2404.06395)."""
    return at.between(1.0 - min(1.0, (1.0 - at.progress) / at.decay_fraction))


def schedule_name(name: str) -> str:
    """The full name of a schedule; a validator for settings.

    Raises:
        ValueError: there is no such schedule.
    """
    return SCHEDULES.checked(SHORT_NAMES.get(name, name))


def height(name: str, at: Point) -> float:
    """The value of a schedule at a point, from 0 to 1.

    Raises:
        UserError: the schedule failed, or returned something else.
    """
    schedule = SCHEDULES.of(name)
    try:
        value = float(schedule(at))
    except Exception as error:  # it may be the user's own
        where = f"at step {at.step} of {at.steps}"
        raise UserError(f"schedule {name!r} failed {where}: {reason(error)}") from error
    if not 0 <= value <= 1:
        raise UserError(
            f"schedule {name!r} returned {value} for step {at.step} of {at.steps}; "
            "it should return a number from 0 to 1"
        )
    return value
