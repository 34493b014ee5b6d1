"""launch/train.py that records what each rank holds after it has continued, in RECORDING.

Files and tensors have the names that they have in a checkpoint.
"""

import os
import runpy
import sys
from pathlib import Path

from i3dist.checkpoint.format import RunState, tensors_of_rank
from i3dist.checkpoint.writer import write_files
from i3dist.training.checkpointer import Checkpointer

ROOT = Path(__file__).parents[2]
RECORDING = Path(os.environ["RECORDING"])

restore = Checkpointer.restore


def recorded_restore(self: Checkpointer, path: Path, state: RunState) -> None:
    restore(self, path, state)
    RECORDING.mkdir(exist_ok=True)
    lanes = (self.lanes, self.progress.lane_state)
    rank = self.saver.job.rank
    write_files(RECORDING, tensors_of_rank(rank, self.engine.snapshot(), lanes))


Checkpointer.restore = recorded_restore
sys.path.insert(0, str(ROOT))
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
