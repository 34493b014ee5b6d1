"""How long each kind of work may take before it counts as hung.

A number for `guard.hang_seconds` is the limit of all work but the parts of the start, which have
half an hour at least. "auto" learns limits from what a rank has seen of its own work, and of other
ranks' waits for data: a multiple of the longest time, but never less than a floor.
"""

from typing import Literal

# Kinds of work that are treated in a way of their own.
STEP, SAVE, DATA = "taking a step", "saving", "waiting for data"
# A part of the start: a rank reads files, compiles, or waits for ranks that have not started yet.
START = "starting"

# Work of which too little was seen may take this long. The first steps may compile for minutes.
UNKNOWN_SECONDS = 1800.0
STEPS_TO_LEARN = 50
# Of these, the first are not counted: what they compile says nothing of later ones.
FIRST_STEPS = 10
TIMES = 10  # the longest time seen
# Work that is no step reads or writes files, or compiles for a shape of its own.
STEP_SECONDS, OTHER_SECONDS = 60.0, 300.0


class Patience:
    """The limits of one rank."""

    def __init__(self, setting: float | Literal["auto"]) -> None:
        """`setting` is guard.hang_seconds; 0 means no limits."""
        self._fixed = None if setting == "auto" else float(setting)
        self.start_seconds = UNKNOWN_SECONDS  # what is to limit a start has to be more
        self._steps = 0
        self._longest: dict[str, float] = {}  # seconds by kind of work

    @property
    def endless(self) -> bool:
        """Whether there are no limits."""
        return self._fixed == 0

    def limit(self, work: str) -> float:
        """Seconds that this kind of work may take now."""
        if work == START:
            return max(self.start_seconds, self._fixed or 0.0)
        if self._fixed is not None:
            return self._fixed
        if work not in self._longest or (work == STEP and self._steps < STEPS_TO_LEARN):
            return UNKNOWN_SECONDS
        floor = STEP_SECONDS if work == STEP else OTHER_SECONDS
        return max(floor, TIMES * self._longest[work])

    def saw(self, work: str, seconds: float) -> None:
        """Learn from work that took so long and came to its end."""
        if work == STEP:
            self._steps += 1
            if self._steps <= FIRST_STEPS:
                return
        self._longest[work] = max(seconds, self._longest.get(work, 0.0))
