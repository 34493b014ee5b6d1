"""The lines that a run prints. Steps and losses stand below each other."""

import math
import sys
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import track

from i3dist.cli.amounts import duration, short
from i3dist.inference.evaluate import Evaluation, TokenLosses
from i3dist.tracking.history import history_gain, other_history_gain
from i3dist.tracking.interval import Figures
from i3dist.tracking.stragglers import SLOW, RankFigures


def report_line(figures: Figures) -> str:
    """An interval as one line of at most 100 columns; "mfu" only if the GPU's peak is known."""
    return (
        f"step {_place(figures.step, figures.steps)}  loss {figures.mean_loss:.4f}  "
        f"lr {figures.learning_rate:.1e}  norm {figures.gradient_norm:4.2f}  "
        f"{short(figures.tokens_per_second)} tok/s  "
        + ("" if figures.mfu is None else f"MFU {figures.mfu:3.0%}  ")
        + f"time {duration(figures.elapsed)}  ETA {duration(figures.eta)}"
    )


def straggler_line(figures: Figures) -> str | None:
    """The slowest and the fastest rank as one line, if they differ by 10%; else None.

    Times are those in which a rank computes by itself in a step, without waiting for others.
    """
    slowest, fastest = figures.slowest, figures.fastest
    if slowest is None or fastest is None or slowest.seconds < SLOW * fastest.seconds:
        return None
    return (
        f"rank {_place(figures.step, figures.steps)}  slowest {_rank(slowest)}  "
        f"fastest {_rank(fastest)}"
    )


def _rank(rank: RankFigures) -> str:
    gpu = f", {rank.clock:.0f} MHz, {rank.temperature:.0f} C" if rank.clock else ""
    return f"{rank.rank} on {rank.host}: {1000 * rank.seconds:.0f} ms{gpu}"


def validation_line(step: int, steps: int, result: Evaluation) -> str:
    """A validation as one line. Gains of history are in nats per token."""
    gain, other = history_gain(result), other_history_gain(result)
    return (
        f"eval {_place(step, steps)}  loss {result.loss:.4f}  bits/byte {result.bits_per_byte:.4f}"
        + ("" if gain is None else f"  history gain {gain:+.4f}")
        + ("" if other is None else f" (another document's {other:+.4f})")
    )


def diagnosis_line(step: int, steps: int, found: Mapping[str, float]) -> str:
    """A diagnosis as one line: shares of attention that the newest and the oldest chunk of history
    get ("-" if no query sees so far back), rank of latents, norm of the compressor's gradient.
    """
    ages = [value for name, value in found.items() if name.startswith("attention_")]
    newest, oldest = ("-" if math.isnan(age) else f"{age:.4f}" for age in (ages[0], ages[-1]))
    return (
        f"diag {_place(step, steps)}  attention newest {newest}, oldest {oldest}  "
        f"latent rank {found['effective_rank']:.1f}  "
        f"compressor norm {found['compressor_gradient_norm']:.1e}"
    )


def progress_bar(batches: Iterator[TokenLosses], total: int) -> Iterator[TokenLosses]:
    """Show on a terminal how many of an evaluation's batches are done."""
    console, off = Console(stderr=True), not sys.stderr.isatty()
    return iter(track(batches, "evaluating", total, console=console, transient=True, disable=off))


def _place(step: int, steps: int) -> str:
    return f"{step:>{len(str(steps))}}/{steps}"
