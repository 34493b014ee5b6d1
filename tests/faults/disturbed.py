"""launch/train.py with a fault: DISTURB="KIND RANK STEP..." names what goes wrong where.

With WRITE_LATE=N checkpoints are written as to a slow disk, N steps after they were begun.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from torch import Tensor

from i3dist.checkpoint.async_saver import Saver
from i3dist.engine.interface import Engine
from i3dist.model.state import LaneState

ROOT = Path(__file__).parents[2]
KIND, RANK, *STEPS = os.environ["DISTURB"].split()

LATE = int(os.environ.get("WRITE_LATE", "0"))

forward, step = Engine.__call__, Engine.step
write, wait = Saver._write, Saver.wait
waited_for = threading.Event()  # as long as training does nothing but wait for a checkpoint
taken = micro_batches = 0  # steps so far, and forwards of the step at hand


def disturbed_forward(self: Engine, *inputs: object) -> tuple[Tensor, LaneState]:
    global micro_batches
    micro_batches += 1
    losses, state = forward(self, *inputs)
    if os.environ["RANK"] != RANK or str(taken + 1) not in STEPS:
        return losses, state
    if KIND == "hang":
        hang_here()
    elif KIND == "kill":  # where a step has several micro-batches
        if micro_batches == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        losses = losses * float(KIND)
        state.latents[0, -1] = float("nan")
    return losses, state


def disturbed_step(self: Engine, *inputs: object) -> object:
    global taken, micro_batches
    taken, micro_batches = taken + 1, 0
    return step(self, *inputs)


def late_write(self: Saver, *what: object) -> None:
    until = taken + LATE
    while taken < until and not waited_for.is_set():
        time.sleep(0.005)
    write(self, *what)


def noted_wait(self: Saver) -> None:
    waited_for.set()
    try:
        wait(self)
    finally:
        waited_for.clear()


def hang_here() -> None:
    time.sleep(3600)


Engine.__call__, Engine.step = disturbed_forward, disturbed_step
Saver._write, Saver.wait = late_write, noted_wait
sys.path.insert(0, str(ROOT))
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
