"""launch/train.py that notes what each rank holds when it has continued, in the folder NOTED.

Files and tensors have the names that they have in a checkpoint.
"""

import os
import runpy
import sys
from pathlib import Path

from i3dist.checkpoint import format as checkpoint
from i3dist.checkpoint.run_state import RunState
from i3dist.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
NOTED = Path(os.environ["NOTED"])

resume = Trainer.resume


def noting_resume(self: Trainer, path: Path, state: RunState) -> None:
    resume(self, path, state)
    NOTED.mkdir(exist_ok=True)
    lanes = (self.lanes, self.lane_state)
    checkpoint._write_share(NOTED, checkpoint._share(self.job.rank, self.engine.snapshot(), lanes))


Trainer.resume = noting_resume
sys.path.insert(0, str(ROOT))
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
