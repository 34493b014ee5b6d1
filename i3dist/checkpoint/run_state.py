"""Where a run stands: the content of a checkpoint's state.json."""

import operator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class GuardState(BaseModel):
    """What the guard's later decisions depend on. Immutable: each step makes a new one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    skipped: int = 0
    """Steps that updated nothing, or whose updates were lost by rolling back."""
    bad: int = 0
    """Consecutive steps, up to the last, whose loss or gradient was not finite."""
    spikes: int = 0
    """Consecutive steps, up to the last, that were skipped for a large gradient norm."""
    idle: Annotated[int, Field(exclude_if=operator.not_)] = 0
    """Consecutive steps, up to the last, that updated nothing for either reason; missing in
    checkpoints of earlier versions."""
    norms: tuple[float, ...] = ()
    """The newest gradient norms of steps that were taken; only kept with guard.spike_factor."""
    rolled_back_to: tuple[int, ...] = ()
    """Steps of the checkpoints that the run was rolled back to."""
    rolled_back_at: Annotated[tuple[int, ...], Field(exclude_if=operator.not_)] = ()
    """The last step before each rollback; missing in checkpoints of earlier versions."""

    def may_roll_back_to(self, step: int, now: int) -> bool:
        """Whether the run may roll back to the checkpoint of `step` after step `now`.

        It must be older than the last consecutive steps that updated nothing, because one saved
        among them has the current weights. It must not have been used for a rollback, nor be from
        a future that an earlier rollback gave up.
        """
        given_up = zip(reversed(self.rolled_back_to), reversed(self.rolled_back_at), strict=False)
        return (
            step <= now - max(self.idle, self.bad)
            and step not in self.rolled_back_to
            and not any(to <= step <= at for to, at in given_up)
        )


class RunState(BaseModel):
    """Where a run stands: the content of state.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Optimizer steps taken."""
    windows: int
    """Windows that the job has read; the next one has this index."""
    tokens_seen: int
    """Input tokens so far, without padding and idle lanes."""
    settings: dict[str, Any]
    """The run's resolved settings."""
    data: str
    """Fingerprint of the data, both splits."""
    engine: dict[str, Any]
    """The part of the engine's settings that affects numbers."""
    guard: GuardState = GuardState()
    """Which steps were skipped, and what later decisions depend on."""

    @property
    def taken(self) -> int:
        """Steps that updated the weights."""
        return self.step - self.guard.skipped
