"""The metrics of training: each is a function of an interval's `Figures`, under a name.

A metric of your own, in a file that `--extend` names, shows up in metrics.jsonl and MLflow:

    from i3dist.tracking.metrics import METRICS

    @METRICS.register("bits_per_token")
    def bits_per_token(figures):
        return figures.mean_loss / math.log(2)
"""

import logging
import math
from collections.abc import Callable
from functools import cache
from operator import attrgetter

from i3dist.errors import reason
from i3dist.registry import Registry
from i3dist.tracking.interval import Figures

log = logging.getLogger(__name__)

Metric = Callable[[Figures], float | None]  # None: not known, and left out

METRICS: Registry[Metric] = Registry("metric", reserved=("step", "time"))  # each line's own

for _name in (
    "loss",
    "mean_loss",
    "gradient_norm",
    "gate",
    "joined",
    "learning_rate",
    "elapsed",
    "tokens_seen",
    "skipped_steps",
    "tokens_per_second",
    "mfu",
):
    METRICS.register(_name)(attrgetter(_name))


@METRICS.register("perplexity")
def perplexity(figures: Figures) -> float:
    """e^loss of the last step, without overflow."""
    return math.exp(min(figures.loss, 700.0))


@METRICS.register("step_time")
def step_time(figures: Figures) -> float:
    """Seconds per step."""
    return figures.seconds / figures.steps_taken


@METRICS.register("data_wait")
def data_wait(figures: Figures) -> float:
    """Share of the time that rank 0 waits for data."""
    return figures.waited / figures.seconds


@METRICS.register("active_latents")
def active_latents(figures: Figures) -> float:
    """Latents that a chunk sees: none while the gate is closed."""
    return figures.latents if figures.gate > 0 else 0.0


@METRICS.register("slowest_rank")
def slowest_rank(figures: Figures) -> int | None:
    """The rank that computes longest by itself, in a job of several."""
    return figures.slowest.rank if figures.slowest and len(figures.ranks) > 1 else None


@METRICS.register("slowest_compute")
def slowest_compute(figures: Figures) -> float | None:
    """Seconds that the slowest rank computes by itself in a step."""
    return figures.slowest.seconds if figures.slowest else None


@METRICS.register("fastest_compute")
def fastest_compute(figures: Figures) -> float | None:
    """Seconds that the fastest rank computes by itself in a step."""
    return figures.fastest.seconds if figures.fastest else None


@METRICS.register("gpu_clock")
def gpu_clock(figures: Figures) -> float | None:
    """Lowest clock of the job's GPUs, MHz."""
    return min((rank.clock for rank in figures.ranks if rank.clock), default=None)


@METRICS.register("gpu_temperature")
def gpu_temperature(figures: Figures) -> float | None:
    """Highest temperature of the job's GPUs, degrees Celsius."""
    return max((rank.temperature for rank in figures.ranks if rank.temperature), default=None)


def measure(figures: Figures) -> dict[str, float]:
    """Every metric by name. One that fails is left out and costs a warning."""
    found = {}
    for name, metric in METRICS.items():
        try:
            value = metric(figures)
            if value is not None:
                found[name] = value if isinstance(value, int) else float(value)
        except Exception as error:
            _warn(f"metric {name} is left out: {reason(error)}")
    return found


@cache  # says the same thing once
def _warn(message: str) -> None:
    log.warning(message)
