"""Why a step is skipped, and when a run rolls back or gives up.

- "not finite": the gradient norm or the loss is NaN or infinite on any rank.
- "spike": the norm is above `guard.spike_factor` times the median of the last
  `guard.spike_window` norms; at most `guard.spike_steps` in a row are skipped for this.

`Engine.step` skips the update on the device by the same rules; `recovery` does the rest. All inputs
are the same on every rank, so all ranks decide alike.
"""

import math
import statistics

from i3dist.checkpoint.format import GuardState
from i3dist.config import GuardSettings
from i3dist.engine.interface import StepResult

NOT_FINITE = "not finite"
SPIKE = "spike"


class Guard:
    """Decides by settings and by the steps so far (`state`, which checkpoints save)."""

    def __init__(self, settings: GuardSettings, state: GuardState | None = None):
        self.settings = settings
        self.state = state or GuardState()

    def limit(self) -> float:
        """The gradient norm above which the next step is skipped."""
        settings, state = self.settings, self.state
        enough = len(state.norms) == settings.spike_window
        if not settings.spike_factor or not enough or state.spikes >= settings.spike_steps:
            return math.inf
        return settings.spike_factor * statistics.median(state.norms)

    def judge(self, stepped: StepResult) -> str | None:
        """Record a step; returns why it was skipped, or None."""
        state = self.state
        if stepped.updated:
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
        """Whether too many consecutive steps were not finite (`guard.bad_steps`)."""
        return self.state.bad >= self.settings.bad_steps

    def rolls_back(self) -> bool:
        """Whether the answer to that is to roll back; otherwise the run stops."""
        return self.gives_up() and len(self.state.rolled_back_to) < self.settings.rollbacks

    def rolled_back(self, now: int, to: int, taken: int) -> None:
        """Record that weights and optimizer were restored from an earlier step.

        Args:
            now: the last step.
            to: the checkpoint's step.
            taken: how many steps up to the checkpoint updated the weights.
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
