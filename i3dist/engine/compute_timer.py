"""How long a rank computes by itself in a step, before it can wait for another."""

import time
from typing import Any

import torch

from i3dist.distributed.devices import uses_cuda


class ComputeTimer:
    """Times from a step's data to its first gradients. Never makes the host wait for a GPU.

    On a GPU it marks both moments in the stream. What is timed is then the device's work, or the
    time that the host takes to launch it, whichever is longer.
    """

    def __init__(self) -> None:
        self._began: Any = None
        self._ended: Any = None

    def start(self) -> None:
        """A micro-batch begins; only the first of a step counts."""
        self._began = self._began or _now()

    def stop(self) -> None:
        """Gradients are about to be exchanged; only the first exchange of a step counts."""
        self._ended = self._ended or _now()

    def take(self) -> float:
        """Seconds of a step whose results have come from the device; 0 if they are not known."""
        began, ended = self._began, self._ended
        self._began = self._ended = None
        if began is None or ended is None:
            return 0.0
        return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000


def _now() -> Any:
    """The time, or an event in a GPU's stream."""
    if not uses_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
