"""What a run does about steps that went wrong: skip them, count them, stop where they do not end.

Its decisions follow from figures that all ranks share, so all ranks decide alike.
"""

import math
import statistics

from pydantic import BaseModel, ConfigDict

from i3dist.config import GuardSettings
from i3dist.engine import Stepped

NOT_FINITE = "not finite"
SPIKE = "spike"


class GuardState(BaseModel):
    """What later decisions depend on, as saved in a checkpoint's state.json."""

    model_config = ConfigDict(extra="forbid")

    skipped: int = 0
    """Steps of the run that updated nothing, or whose updates were given up by rolling back."""
    bad: int = 0
    """Steps in a row, up to the last, whose loss or gradient was not finite."""
    spikes: int = 0
    """Steps in a row, up to the last, that were skipped for their norm."""
    norms: list[float] = []
    """The newest norms of steps that were taken; only kept where spikes are looked for."""
    rolled_back_to: list[int] = []
    """Steps of the checkpoints that the run was rolled back to."""


class Guard:
    """Says which steps are skipped, and when it is enough."""

    def __init__(self, settings: GuardSettings, state: GuardState | None = None):
        self.settings = settings
        self.state = state or GuardState()

    def limit(self) -> float:
        """The norm above which the next step is to be skipped."""
        settings, state = self.settings, self.state
        seen = len(state.norms) == settings.spike_window
        if not settings.spike_factor or not seen or state.spikes >= settings.spike_steps:
            return math.inf
        return settings.spike_factor * statistics.median(state.norms)

    def judge(self, stepped: Stepped) -> str | None:
        """Take in a step; returns why it was skipped, or None."""
        state = self.state
        if stepped.taken:
            state.bad = state.spikes = 0
            if self.settings.spike_factor:
                state.norms = [*state.norms, stepped.norm][-self.settings.spike_window :]
            return None
        state.skipped += 1
        if all(map(math.isfinite, (stepped.norm, *stepped.sums))):
            state.bad, state.spikes = 0, state.spikes + 1
            return SPIKE
        state.bad += 1
        return NOT_FINITE

    def gives_up(self) -> bool:
        """Whether so many steps in a row were not finite that it cannot go on like this."""
        return self.state.bad >= self.settings.bad_steps

    def rolls_back(self) -> bool:
        """Whether that is answered by rolling back; else the run is to stop."""
        return self.gives_up() and len(self.state.rolled_back_to) < self.settings.rollbacks

    def rolled_back(self, now: int, to: int, taken: int) -> None:
        """Take in that weights and optimizer are an earlier step's.

        Args:
            now: the last step.
            to: step of the checkpoint.
            taken: steps up to that one that updated the weights.
        """
        state = self.state
        state.bad = state.spikes = 0
        state.norms = []
        state.skipped = now - taken
        state.rolled_back_to = [*state.rolled_back_to, to]
