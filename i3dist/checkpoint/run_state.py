"""Where a run stands: what a checkpoint's state.json holds."""

import operator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


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


class RunState(BaseModel):
    """Where a run stands, as saved in a checkpoint's state.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Optimizer steps taken."""
    windows: int
    """Windows of the job that have been read; the next one has this index."""
    tokens_seen: int
    """Tokens that were an input, padding and idle lanes left out."""
    settings: dict[str, Any]
    """The run's resolved settings."""
    data: str
    """Fingerprint of the data, both splits."""
    engine: dict[str, Any]
    """What of the engine's file decides numbers."""
    guard: GuardState = GuardState()
    """Steps that were skipped, and what decides about later ones."""

    @property
    def taken(self) -> int:
        """Steps that updated the weights."""
        return self.step - self.guard.skipped
