"""What a run does about steps that went wrong: skip them, count them, stop where they do not end.

Its decisions follow from figures that all ranks share, so all ranks decide alike.
"""

import math
import operator
import statistics
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from i3dist.config import GuardSettings
from i3dist.engine import Stepped

NOT_FINITE = "not finite"
SPIKE = "spike"


class GuardState(BaseModel):
    """What later decisions depend on, as saved in a checkpoint's state.json.

    It never changes: each step makes a new one, so whoever holds one may read it at any later time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    skipped: int = 0
    """Steps of the run that updated nothing, or whose updates were given up by rolling back."""
    bad: int = 0
    """Steps in a row, up to the last, whose loss or gradient was not finite."""
    spikes: int = 0
    """Steps in a row, up to the last, that were skipped for their norm."""
    idle: Annotated[int, Field(exclude_if=operator.not_)] = 0
    """Steps in a row, up to the last, that updated nothing, for whatever reason; checkpoints of
    earlier versions do not count them."""
    norms: tuple[float, ...] = ()
    """The newest norms of steps that were taken; only kept where spikes are looked for."""
    rolled_back_to: tuple[int, ...] = ()
    """Steps of the checkpoints that the run was rolled back to."""
    rolled_back_at: Annotated[tuple[int, ...], Field(exclude_if=operator.not_)] = ()
    """The last step before each of these; checkpoints of earlier versions do not name it."""

    def may_roll_back_to(self, step: int, now: int) -> bool:
        """Whether the checkpoint of `step` is one to roll back to after step `now`.

        It must be from before the steps at hand that updated nothing, since one made among them has
        the weights of now, and from no future that an earlier rolling back gave up.
        """
        given_up = zip(reversed(self.rolled_back_to), reversed(self.rolled_back_at), strict=False)
        return (
            step <= now - max(self.idle, self.bad)
            and step not in self.rolled_back_to
            and not any(to <= step <= at for to, at in given_up)
        )


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
