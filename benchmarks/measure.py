"""Times the optimizer steps of a contestant of benchmarks/train_throughput.py."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import kernels
import torch
from results import Row
from torch import Tensor, nn

from i3dist.errors import UserError
from i3dist.tracking.mfu import job_peak_flops

FEW = (2, 4)  # warm-up and timed steps of a contestant that takes seconds for each


class Prepared(NamedTuple):
    """A contestant, ready to run."""

    model: nn.Module
    step: Callable[[], Tensor]  # takes an optimizer step, returns its loss
    tokens: int  # of a step
    flops_per_token: float
    waits: list[float] | None = None  # seconds that each step waited for data
    close: Callable[[], None] = lambda: None  # frees what it holds


@dataclass(frozen=True)
class Case:
    """A contestant at one shape."""

    contestant: str
    shape: str
    prepare: Callable[[], Prepared]
    few: bool = False  # too slow for as many steps as the others take


def measure(case: Case, warm_up: int, timed: int, peak: float, profiled: bool = False) -> Row:
    """Time a contestant, and check that it learns.

    Args:
        case: the contestant.
        warm_up: steps before the clock starts.
        timed: steps that are timed.
        peak: FLOP/s of the best matrix product.
        profiled: whether to print its GPU kernels and their times afterwards.

    Raises:
        UserError: its loss is not finite, or does not fall on a batch that is used again and again.
        torch.OutOfMemoryError: it does not fit into memory.
    """
    ready = case.prepare()
    if case.few:
        warm_up, timed = FEW
    try:
        losses, times, memory = time_steps(ready.step, warm_up, timed)
        if profiled:
            kernels.show(kernels.kernels(ready.step), f"{case.contestant}, {case.shape}")
    finally:
        ready.close()
    falls = losses[-1] < losses[0] or ready.waits is not None
    if not (falls and all(map(math.isfinite, losses))):
        raise UserError(f"{case.contestant}, {case.shape}: it does not learn, its loss is {losses}")
    return Row(
        contestant=case.contestant,
        shape=case.shape,
        parameters=sum(p.numel() for p in ready.model.parameters()),
        tokens=ready.tokens,
        ms=statistics.median(times),
        flops_per_token=ready.flops_per_token,
        peak=peak,
        memory_gib=memory,
        first_loss=losses[0],
        last_loss=losses[-1],
        data_wait=1e3 * sum(ready.waits[warm_up:]) / sum(times) if ready.waits else None,
        sheet=job_peak_flops(world_size=1),
    )


def time_steps(
    step: Callable[[], Tensor], warm_up: int, timed: int
) -> tuple[list[float], list[float], float | None]:
    """Losses and milliseconds of the timed steps, and the GPU memory that they reserved, in GiB.

    Reserved, not allocated, because the memory of a recorded graph counts as free between replays.
    """
    cuda = torch.cuda.is_available()
    for _ in range(warm_up):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    losses, marks = [], [mark()]
    for _ in range(timed):
        losses.append(step())
        marks.append(mark())
    curve = torch.stack(losses).tolist()  # waits for the device
    times = [milliseconds(a, b) for a, b in itertools.pairwise(marks)]
    return curve, times, torch.cuda.max_memory_reserved() / 2**30 if cuda else None


def mark() -> Any:
    """The present time; on a GPU, an event on its clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(first: Any, second: Any) -> float:
    """Time between two marks; both must have passed."""
    return 1e3 * (second - first) if isinstance(first, float) else first.elapsed_time(second)


def free() -> None:
    """Free the memory of the last contestant."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
