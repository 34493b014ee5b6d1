"""Tiny runs of the trainer: their settings, and an engine that writes down what it is given."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from i3dist.config import Settings
from i3dist.engine.interface import StepResult
from i3dist.engine.zero2 import Zero2Engine
from i3dist.model.state import LaneState
from i3dist.training.trainer import Trainer
from tests.known import CHUNK, MODEL, PAD, Known

STEPS, LANES, K, WINDOWS, ROWS = 11, 4, 2, 2, 2
LATENTS, HISTORY = 2, 2
PEAK, FLOOR, WARMUP, DECAY = 1e-3, 0.2, 3, 9
OFF, RAMP = 2, 3
VALUES = {
    **MODEL,
    "model.latents": LATENTS,
    "model.history_chunks": HISTORY,
    "compression.off_steps": OFF,
    "compression.ramp_steps": RAMP,
    "compression.join_after": 4000,
    "compression.join_steps": 2000,
    "optimizer.lr": PEAK,
    "optimizer.min_lr_ratio": FLOOR,
    "optimizer.warmup_steps": WARMUP,
    "optimizer.decay_steps": DECAY,
    "train.steps": STEPS,
    "train.lanes": LANES,
    "train.schedule": 2,
    "train.window_chunks": K,
    "train.accumulation": WINDOWS,
    "train.micro_batch": ROWS,
    "data.workers": 0,
    "log.every": 1,
    "log.diagnose_every": 3,
    "validate.every": 4,
    "validate.chunks": 8,
    "validate.samples": 0,
    "checkpoint.every": 4,
    "checkpoint.keep": 9,
}


@dataclass
class Micro:
    """A micro-batch as the engine got it, and what came of it."""

    tokens: Tensor
    targets: Tensor
    depth: Tensor
    before: LaneState
    gate: float
    loss: float
    after: LaneState
    scaled_by: float = math.nan
    taken: float = math.nan


@dataclass
class Step:
    """An optimizer step: its micro-batches, and what `Engine.step` got and returned."""

    micros: list[Micro]
    lr: float
    sums: list[float]
    limit: float
    stepped: StepResult


class Recorder(Zero2Engine):
    """An engine that writes down what it is given; the loss of steps in `bad` is NaN."""

    bad: frozenset[int] = frozenset()

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.micros: list[Micro] = []
        self.steps: list[Step] = []

    def __call__(
        self, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        before = state.map(torch.clone)
        losses, after = super().__call__(tokens, targets, depth, state, gate)
        if len(self.steps) in self.bad and len(self.micros) == 1:
            losses = losses * math.nan
        loss = float(losses.detach().sum())
        kept = [part.clone() for part in (tokens, targets, depth)]
        self.micros.append(Micro(*kept, before, float(gate), loss, after.map(torch.clone)))
        return losses, after

    def backward(self, loss_sum: Tensor, targets: Tensor) -> None:
        self.micros[-1].taken = float(loss_sum.detach())
        self.micros[-1].scaled_by = float(targets)
        super().backward(loss_sum, targets)

    def step(self, lr: float, sums: Tensor | None = None, limit: float = math.inf) -> StepResult:
        assert sums is not None
        given = sums.tolist()
        stepped = super().step(lr, sums, limit)
        self.steps.append(Step(self.micros, lr, given, limit, stepped))
        self.micros = []
        return stepped


class Asked:
    """Stands in for `StopRequest`: asked to stop in step `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.votes, self.heard = at, -1, 0.0  # it votes before the first step, too

    def vote(self) -> float:
        self.votes += 1
        return float(self.votes == self.at)

    def count(self, votes: float) -> None:
        self.heard += votes

    def agreed(self) -> bool:
        return self.heard > 0

    def saved(self) -> None:
        pass


@dataclass
class TrainedRun:
    """A trainer, and all that came of it."""

    trainer: Trainer
    engine: Recorder
    tracker: mock.Mock
    data: Known
    done: bool = False
    sent: list[int] = field(default_factory=list)  # lines in the logs when the tracker was told
    first: int = 0  # steps that were taken before
    settings: Settings = field(default_factory=Settings)

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.settings.run.path / f"{name}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def places(self, step: int, window: int) -> list[list[tuple[int, int] | None]]:
        """The (shard, chunk) of every lane in a window of a step, the first of which is 0."""
        index = step * WINDOWS + window
        return [self.trainer.data.schedule.chunks(index, lane) for lane in range(LANES)]

    def wanted(self, step: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, targets [LANES, K, CHUNK] and depth [LANES, K] of a window, from the data."""
        tokens = np.full((LANES, K, CHUNK), PAD)
        targets = np.full((LANES, K, CHUNK), -100)
        depth = np.zeros((LANES, K), np.int64)
        for lane, row in enumerate(self.places(step, window)):
            for k, place in enumerate(row):
                if place is not None:
                    shard, chunk = place
                    tokens[lane, k] = self.data.shards["train"][shard][chunk]
                    targets[lane, k] = self.data.targets("train", shard)[chunk]
                    depth[lane, k] = self.data.depth("train", shard)[chunk]
        return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(depth)


Start = Callable[..., TrainedRun]


def rate(step: int) -> float:
    """Linear over WARMUP steps up to PEAK, then half a cosine down to FLOOR of it at DECAY."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    share = min(step - WARMUP, DECAY - WARMUP) / (DECAY - WARMUP)
    return PEAK * FLOOR + (PEAK - PEAK * FLOOR) * (1 + math.cos(math.pi * share)) / 2


def gate(step: int) -> float:
    """0 for OFF steps; then a RAMPth more with each step, up to 1."""
    return min(max(step - OFF + 1, 0), RAMP) / RAMP
