"""launch/train.py that notes what each rank holds when it has continued, in the folder NOTED.

Files and tensors have the names that they have in a checkpoint.
"""

import os
import runpy
import sys
from pathlib import Path

from safetensors.torch import save_file

from i3dist.checkpoint import RunState
from i3dist.trainer import Trainer

ROOT = Path(__file__).parents[2]
NOTED = Path(os.environ["NOTED"])

resume = Trainer.resume


def noting_resume(self: Trainer, path: Path, state: RunState) -> None:
    resume(self, path, state)
    NOTED.mkdir(exist_ok=True)
    optimizer = {
        f"{kind}/{fragment.start}/{fragment.name}": tensor.clone()
        for fragment in self.engine.snapshot()
        for kind, tensor in fragment.tensors.items()
    }
    lanes = {
        f"{lane}/{name}": tensor[row].clone()
        for name, tensor in self.lane_state.tensors().items()
        for row, lane in enumerate(self.lanes)
    }
    save_file(optimizer, NOTED / f"optimizer-{self.job.rank:05d}.safetensors")
    save_file(lanes, NOTED / f"lanes-{self.job.rank:05d}.safetensors")


Trainer.resume = noting_resume
sys.path.insert(0, str(ROOT))
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
