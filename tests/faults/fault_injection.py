"""launch/train.py with a fault: INJECT_FAULT="KIND RANK STEP..." says what goes wrong, and where.

With WRITE_LATE=N the disk is slow: checkpoints are written N steps after they were begun. For KIND
"stall" it names shards in place of steps: before one is read, the pipe STALL_IN/NUMBER is, to its
end. Then limits are learned after few steps, and are low. KIND "alone" hangs in a step, or for
step 0 in the start; only that rank has a limit, ALONE_SECONDS, and tells nobody on its host.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from i3dist.distributed.held_signals import hold

hold()  # as launch/train.py does, before torch is imported and starts threads

from torch import Tensor  # noqa: E402

from i3dist.checkpoint import writer  # noqa: E402
from i3dist.checkpoint.async_saver import AsyncSaver  # noqa: E402
from i3dist.data import shards  # noqa: E402
from i3dist.data.folder import Folder  # noqa: E402
from i3dist.data.manifest import Manifest  # noqa: E402
from i3dist.distributed import patience  # noqa: E402
from i3dist.distributed.neighbours import Neighbours  # noqa: E402
from i3dist.engine.interface import Engine  # noqa: E402
from i3dist.model.state import LaneState  # noqa: E402
from i3dist.training.start_times import StartTimes  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.faults.own_network import set_link  # noqa: E402

KIND, RANK, *STEPS = os.environ["INJECT_FAULT"].split()

LATE = int(os.environ.get("WRITE_LATE", "0"))

ALONE_SECONDS = 4.0

end = StartTimes.end
forward, step = Engine.__call__, Engine.step
write, wait, read_shard = writer.save, AsyncSaver.wait, shards.read_shard
waited_for = threading.Event()  # set while training only waits for a checkpoint
taken = micro_batches = 0  # steps so far, and forward passes of the current step


def faulty_forward(self: Engine, *inputs: object) -> tuple[Tensor, LaneState]:
    global micro_batches
    micro_batches += 1
    losses, state = forward(self, *inputs)
    if KIND == "stall" or os.environ["RANK"] != RANK or str(taken + 1) not in STEPS:
        return losses, state
    if KIND in ("hang", "alone"):
        hang_here()
    elif KIND == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif KIND == "unlink":  # see own_network.py
        set_link(up=False)
    elif KIND == "kill":  # where a step has several micro-batches
        if micro_batches == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        losses = losses * float(KIND)
        state.latents[0, -1] = float("nan")
    return losses, state


def counted_step(self: Engine, *inputs: object) -> object:
    global taken, micro_batches
    taken, micro_batches = taken + 1, 0
    if KIND == "alone" and str(taken + 1) in STEPS:
        be_impatient()
    return step(self, *inputs)


def late_write(*what: Any, **more: Any) -> Path:
    until = taken + LATE
    while taken < until and not waited_for.is_set():
        time.sleep(0.005)
    return write(*what, **more)


def observed_wait(self: AsyncSaver) -> None:
    waited_for.set()
    try:
        wait(self)
    finally:
        waited_for.clear()


def stalled_read(folder: Folder, manifest: Manifest, index: int) -> shards.ShardTokens:
    if os.environ["RANK"] == RANK and str(index) in STEPS and manifest.split == "train":
        Path(os.environ["STALL_IN"], str(index)).read_bytes()
    return read_shard(folder, manifest, index)


def hanging_end(self: StartTimes, part: str) -> None:
    """As on a file system that blocks, after the ranks have met."""
    if part != "model":
        end(self, part)
        return
    be_impatient()
    end(self, part)
    if os.environ["RANK"] == RANK:
        hang_here()


def be_impatient() -> None:
    if os.environ["RANK"] == RANK:
        patience.Patience.limit = lambda self, work: ALONE_SECONDS


def hang_here() -> None:
    time.sleep(3600)


Engine.__call__, Engine.step = faulty_forward, counted_step
writer.save, AsyncSaver.wait = late_write, observed_wait
if KIND == "alone":
    Neighbours.tell = lambda self: None
    if "0" in STEPS:
        StartTimes.end = hanging_end
if KIND == "stall":
    shards.read_shard = stalled_read
    patience.FIRST_STEPS, patience.STEPS_TO_LEARN, patience.TIMES = 1, 3, 2
    patience.STEP_SECONDS, patience.OTHER_SECONDS = 3.0, 8.0
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
