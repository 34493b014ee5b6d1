"""What a run does about a step that went wrong: skip it, roll back, or give up.

`guard` says why a step was skipped; `Engine.step` has then left the weights as they were. What
remains: clean the lanes, roll back after too many such steps, and stop if that did not help.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from i3dist.checkpoint import store
from i3dist.distributed.console import print_rank_0
from i3dist.engine.interface import StepResult
from i3dist.errors import UserError
from i3dist.model.state import LaneState
from i3dist.training.checkpointer import Checkpointer
from i3dist.training.guard import NOT_FINITE, Guard
from i3dist.training.progress import Progress


@dataclass
class Recovery:
    """Acts on the guard's decisions, alike on every rank."""

    guard: Guard
    progress: Progress
    checkpointer: Checkpointer
    empty_lanes: Callable[[], LaneState]  # this rank's lanes before they have read anything

    def after(self, stepped: StepResult) -> str | None:
        """Judge a step. If it was skipped, clean the lanes, and roll back if it is time to.

        Returns:
            Why the step was skipped, as the ledger says it; None if it was not.
        """
        reason = self.guard.judge(stepped)
        if reason is None:
            return None
        progress = self.progress
        print_rank_0(f"step {progress.step} is skipped: {reason} (norm {stepped.norm:.4g})")
        if reason == NOT_FINITE:
            progress.lane_state = progress.lane_state.finite(self.empty_lanes())
        to = self.roll_back() if self.guard.rolls_back() else None
        return reason if to is None else f"{reason}, rolled back to step {to}"

    def roll_back(self) -> int | None:
        """Restore weights and optimizer from the newest checkpoint that the guard allows.

        Data continue from the current position. Lanes lose their history, because it comes from the
        weights that are given up. Without such a checkpoint nothing changes.

        Returns:
            The checkpoint's step.
        """
        state, now = self.guard.state, self.progress.step
        past = self.checkpointer.load_newest(partial(state.may_roll_back_to, now=now))
        if past is None:
            return None
        self.progress.lane_state = self.empty_lanes()
        print_rank_0(
            f"{state.bad} bad steps in a row: weights and optimizer are those of step {past.step} "
            f"again, and training continues after step {now}"
        )
        self.guard.rolled_back(now, past.step, past.taken)
        return past.step

    def failure(self) -> UserError:
        """The error to end a run with when the guard gives up."""
        guard, allowed = self.guard.state, self.guard.settings.rollbacks
        tried = len(guard.rolled_back_to)
        none_left = ", and no checkpoint from before them is left to try" * (tried < allowed)
        return UserError(
            f"loss or gradient was not finite in {guard.bad} steps in a row, up to step "
            f"{self.progress.step}, so the run stops (guard.bad_steps), rolled back {tried} of "
            f"{allowed} times (guard.rollbacks){none_left}; to continue past such steps, raise "
            "guard.bad_steps; if every step is like this, start over with --fresh and a lower "
            f"optimizer.lr{self._from_good_weights()}"
        )

    def _from_good_weights(self) -> str:
        """Another way out, as words, if there is a checkpoint from before the bad steps."""
        folder, state = self.checkpointer.saver.folder, self.guard.state
        for step in store.steps(folder):
            if state.may_roll_back_to(step, now=self.progress.step):
                good = store.place(folder, step)
                return f", or with another run.path, train.init_from={good} and a lower rate"
        return ""
