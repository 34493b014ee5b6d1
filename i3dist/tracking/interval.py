"""What is counted between two reports, without waiting for the device."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from i3dist.config import Settings
from i3dist.data.lanes import Batch, StepCounts
from i3dist.model.lm import I3LM
from i3dist.tracking.mfu import job_peak_flops, per_token
from i3dist.tracking.stragglers import RankFigures, Stragglers

MEASURED_LANES = 4  # or as many as there are


@dataclass(frozen=True)
class Figures:
    """What metrics are computed from: the steps since the last report, of the whole job."""

    step: int
    """Optimizer steps taken."""
    steps: int
    """Optimizer steps of the whole run (train.steps)."""
    loss: float
    """Mean cross-entropy of the last step, nats per token. A continued run reports the very same
    as an uninterrupted one."""
    mean_loss: float
    """Mean cross-entropy over the interval, nats per token; steps that are not finite left out."""
    gradient_norm: float
    """Of the last step's gradient, before clipping."""
    gate: float
    """Gate g of history in the last step, 0 to 1."""
    learning_rate: float
    """Of the last step."""
    latents: float
    """Latents of history that a chunk of the last step may see, mean over chunks."""
    tokens: float
    """Inputs of the interval, padding left out."""
    seconds: float
    """That the interval's steps took; validation and saving left out."""
    steps_taken: int
    """Steps of the interval."""
    waited: float
    """Of `seconds`, what rank 0 waited for data."""
    elapsed: float
    """Seconds since this process began to train, with everything."""
    eta: float
    """Seconds until the run ends, at the pace since this process began to train."""
    tokens_seen: int
    """Inputs of the whole run so far."""
    skipped_steps: int
    """Steps of the whole run that were skipped as bad."""
    joined: float | None = None
    """Share j in which two softmaxes were one in the last step, 0 to 1; None if they never are."""
    ranks: Sequence[RankFigures] = ()
    """Of each rank; none if they are not known yet."""
    flops_per_token: float | None = None
    """Floating-point operations of forward and backward (see `mfu`); None if the GPU is unknown."""
    peak_flops: float | None = None
    """FLOP/s of all GPUs of the job, by their data sheet; None if the GPU is unknown."""

    @property
    def tokens_per_second(self) -> float:
        """Inputs of the whole job per second of training."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (see `mfu`), 0 to 1; None if the GPU is unknown."""
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return self.flops_per_token * self.tokens_per_second / self.peak_flops

    @property
    def slowest(self) -> RankFigures | None:
        """The rank that computes longest by itself."""
        return max(self.ranks, key=lambda rank: rank.seconds, default=None)

    @property
    def fastest(self) -> RankFigures | None:
        """The rank that computes shortest."""
        return min(self.ranks, key=lambda rank: rank.seconds, default=None)


class Interval:
    """The steps since the last report; adding one does not wait for the device."""

    def __init__(
        self,
        model: I3LM | None = None,
        world_size: int = 1,
        stragglers: Stragglers | None = None,
    ) -> None:
        """Begin with the first step of this process; `model` is what a rank trains."""
        self._stragglers = stragglers
        self._model = model
        self._peak_flops = job_peak_flops(world_size)
        self._began, self._taken = time.perf_counter(), 0
        self.restart()

    def restart(self) -> None:
        """Begin the next interval. The clock of the whole run goes on."""
        self._started = time.perf_counter()
        if self._stragglers is not None:
            self._stragglers.restart()
        self._steps = 0
        self._waited = 0.0  # seconds, for data
        self._tokens: Tensor | float = 0.0
        self._loss_sum = 0.0
        self._targets: Tensor | float = 0.0
        self._last: tuple[float, StepCounts, float] | None = None
        self._batch: Batch | None = None

    def add(
        self, loss_sum: float, counts: StepCounts, norm: float, batch: Batch | None = None
    ) -> None:
        """Add one step: the job's loss sum, its counts, the gradient's norm, a batch of it."""
        self._steps += 1
        self._taken += 1
        self._tokens = self._tokens + counts.tokens
        if math.isfinite(loss_sum):
            self._loss_sum += loss_sum
            self._targets = counts.targets + self._targets
        self._last, self._batch = (loss_sum, counts, norm), batch

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Leave out of the speed what is not training: validation and saving."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count as waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def figures(
        self, step: int, settings: Settings, tokens_seen: int, skipped_steps: int
    ) -> Figures:
        """Figures of the interval, which ends with `step`. Waits for the device."""
        assert self._last is not None
        loss_sum, counts, norm = self._last
        loss = float(loss_sum / counts.targets.clamp(min=1))
        now = time.perf_counter()
        elapsed, compression = now - self._began, settings.compression
        return Figures(
            step=step,
            steps=settings.train.steps,
            loss=loss,
            mean_loss=self._loss_sum / max(1.0, float(self._targets)),
            gradient_norm=norm,
            gate=compression.gate_at(step - 1),
            joined=compression.joined_at(step - 1) if settings.joins else None,
            learning_rate=settings.optimizer.lr_at(step - 1),
            latents=float(counts.latents / counts.chunks.clamp(min=1)),
            tokens=float(self._tokens),
            seconds=now - self._started,
            steps_taken=self._steps,
            waited=self._waited,
            elapsed=elapsed,
            eta=elapsed / self._taken * (settings.train.steps - step),
            tokens_seen=tokens_seen,
            skipped_steps=skipped_steps,
            ranks=self._stragglers.figures() if self._stragglers is not None else (),
            flops_per_token=self._flops_per_token(),
            peak_flops=self._peak_flops,
        )

    def _flops_per_token(self) -> float | None:
        """Of some lanes of the last step; the masks of all would take much memory."""
        if self._peak_flops is None or self._model is None or self._batch is None:
            return None
        return per_token(self._model, self._batch.rows(0, MEASURED_LANES)).flops
