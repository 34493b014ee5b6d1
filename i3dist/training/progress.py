"""Where a run stands."""

from dataclasses import dataclass

from torch import Tensor

from i3dist.model.state import LaneState


@dataclass
class Progress:
    """Where this rank of a run stands; all parts of a trainer share one."""

    last_step: int  # train.steps
    lane_state: LaneState  # of this rank's lanes
    tokens_seen: Tensor  # scalar int64, on the device so that counting does not wait for it
    step: int = 0  # optimizer steps taken
    windows: int = 0  # windows that the job has read

    @property
    def done(self) -> bool:
        """Whether the run has taken its last step."""
        return self.step == self.last_step

    def due(self, every: int) -> bool:
        """Whether an interval of `every` steps (0: none) ends with this step, or the run does."""
        return self.done or (every > 0 and self.step % every == 0)
