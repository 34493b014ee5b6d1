"""What a run does about steps that went wrong: skip them, count them, stop where they do not end.

Its decisions follow from figures that all ranks share, so all ranks decide alike.
"""

import math
import statistics

from i3dist.checkpoint.run_state import GuardState
from i3dist.config import GuardSettings
from i3dist.engine.interface import Stepped

NOT_FINITE = "not finite"
SPIKE = "spike"


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
            norms = state.norms
            if self.settings.spike_factor:
                norms = (*norms, stepped.norm)[-self.settings.spike_window :]
            self._change(bad=0, spikes=0, idle=0, norms=norms)
            return None
        self._change(skipped=state.skipped + 1, idle=state.idle + 1)
        if all(map(math.isfinite, (stepped.norm, *stepped.sums))):
            self._change(bad=0, spikes=state.spikes + 1)
            return SPIKE
        self._change(bad=state.bad + 1)
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
        self._change(
            skipped=now - taken,
            bad=0,
            spikes=0,
            idle=0,
            norms=(),
            rolled_back_to=(*state.rolled_back_to, to),
            rolled_back_at=(*state.rolled_back_at, now),
        )

    def _change(self, **fields: object) -> None:
        self.state = self.state.model_copy(update=fields)
