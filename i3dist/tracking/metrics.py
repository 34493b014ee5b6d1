"""What is measured while training, and how it reads in the terminal."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i3dist.config import ModelSettings
from i3dist.data.lanes import Batch
from i3dist.distributed import collectives
from i3dist.inference.evaluate import ChunkLoss, Evaluation
from i3dist.ops.cross_entropy import IGNORE

# Nats per token that history must save to count as used.
USED_GAIN = 0.001
# Part of the gain that another document's history may keep; what it keeps is no memory.
KEPT_BY_OTHER = 0.5


class StepCounts(NamedTuple):
    """What one optimizer step of the whole job holds; scalars on the device, fp64."""

    targets: Tensor  # positions that are trained on
    tokens: Tensor  # inputs, padding left out
    chunks: Tensor  # chunks with at least one token
    latents: Tensor  # latents that those chunks may see, in sum


def count_step(batches: Sequence[Batch], pad_id: int, model: ModelSettings) -> StepCounts:
    """Count this rank's batches and sum over all ranks."""
    device = batches[0].tokens.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        used = batch.tokens != pad_id
        visible = batch.depth.clamp(max=model.history_chunks) * model.latents
        counts = [(batch.targets != IGNORE), used, used.any(-1), visible]
        sums += torch.stack([count.sum() for count in counts])
    return StepCounts(*collectives.all_sum(sums))


class Interval:
    """The steps since the last report; adding one does not wait for the device."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new interval now."""
        self.started = time.perf_counter()
        self.steps = 0
        self.waited = 0.0  # seconds, for data
        self.tokens: Tensor | float = 0.0
        self.last: tuple[float, StepCounts, float] | None = None

    def add(self, loss_sum: float, counts: StepCounts, norm: float) -> None:
        """Take in one step: the job's loss sum, its counts, the gradient's norm."""
        self.steps += 1
        self.tokens = self.tokens + counts.tokens
        self.last = (loss_sum, counts, norm)

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Leave out what is no training: validation and saving."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count as waiting for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def metrics(self, gate: float) -> dict[str, float]:
        """Figures of the interval.

        Loss, norm and latents are the last step's, so that a continued run reports the very same
        as an uninterrupted one; speed is over all steps of the interval.
        """
        assert self.last is not None
        loss_sum, counts, norm = self.last
        loss = float(loss_sum / counts.targets.clamp(min=1))
        visible = float(counts.latents / counts.chunks.clamp(min=1))
        seconds = time.perf_counter() - self.started
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "gradient_norm": norm,
            "tokens_per_second": float(self.tokens) / seconds,
            "step_time": seconds / self.steps,
            "data_wait": self.waited / seconds,
            "active_latents": visible if gate > 0 else 0.0,
            "gate": gate,
        }


def perplexity(loss: float) -> float:
    """e^loss, without overflow."""
    return math.exp(min(loss, 700.0))


def history_gain(result: Evaluation) -> float:
    """Nats per token that history saves, over chunks that may have any."""
    later = _later_chunks(result)
    return _mean_saved(later, [chunk.loss for chunk in later])


def other_history_gain(result: Evaluation) -> float | None:
    """What `history_gain` keeps with another document's history; None where that is absent."""
    later = _later_chunks(result)
    losses = [c.loss_other_history for c in later if c.loss_other_history is not None]
    return _mean_saved(later, losses) if len(losses) == len(later) > 0 else None


def _later_chunks(result: Evaluation) -> list[ChunkLoss]:
    """Those that may have history."""
    return [chunk for chunk in result.by_chunk if chunk.index > 0]


def _mean_saved(chunks: list[ChunkLoss], losses: list[float]) -> float:
    """Mean over tokens of the loss without history minus `losses`, of which each chunk has one."""
    pairs = zip(chunks, losses, strict=True)
    saved = sum((chunk.loss_without_history - loss) * chunk.tokens for chunk, loss in pairs)
    return saved / max(1, sum(chunk.tokens for chunk in chunks))


def history_warning(result: Evaluation) -> str | None:
    """One line where a model that is trained with history has no memory of it, else None."""
    if not _later_chunks(result):
        return None
    gain, other = history_gain(result), other_history_gain(result)
    if gain < USED_GAIN:
        return f"history is not used (yet): it saves {gain:+.4f} nats per token"
    if other is not None and other > KEPT_BY_OTHER * gain:
        return (
            f"the gain from history is no memory: another document's history keeps {other:+.4f} "
            f"of {gain:+.4f} nats per token"
        )
    return None


def report_line(step: int, steps: int, metrics: dict[str, Any]) -> str:
    """One logging interval as one line."""
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {metrics['loss']:.4f}  "
        f"lr {metrics['learning_rate']:.2e}  norm {metrics['gradient_norm']:.2f}  "
        f"gate {metrics['gate']:.2f}  latents {metrics['active_latents']:.0f}  "
        f"{metrics['tokens_per_second']:,.0f} tok/s  {metrics['step_time'] * 1e3:.0f} ms/step"
    )


def validation_line(step: int, result: Evaluation) -> str:
    """One validation as one line."""
    other = other_history_gain(result)
    return (
        f"validation at step {step}: loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
        f"bits/byte {result.bits_per_byte:.4f}  history gain {history_gain(result):+.4f} nats"
        + ("" if other is None else f", another document's {other:+.4f}")
    )
