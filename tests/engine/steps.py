"""A small engine, its data and its steps, for tests of both engines."""

from collections.abc import Callable

import torch
from torch import Tensor

from i3dist.config import ModelSettings, OptimizerSettings, TrainSettings
from i3dist.engine.interface import Engine, StepResult
from i3dist.engine.setup import read_engine_config
from i3dist.engine.stock import StockEngine
from i3dist.engine.zero2 import Zero2Engine
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from tests.conftest import ROOT
from tests.model.conftest import SMALL
from tests.model.streams import BOS, depth_of, stream

ENGINES: dict[str, Callable[..., Engine]] = {"zero2": Zero2Engine, "stock": StockEngine}
ZERO2 = ROOT / "configs" / "zero2.json"
Batch = tuple[Tensor, Tensor, Tensor]


def new_model(seed: int = 0) -> I3LM:
    torch.manual_seed(seed)
    return I3LM(ModelSettings.model_validate(SMALL), BOS)


def build(
    micro_batches: int = 1,
    bf16: bool = True,
    seed: int = 0,
    kind: Callable[..., Engine] = Zero2Engine,
    clip: float = 1e9,
    optimizer: str = "adamw",
) -> Engine:
    config = read_engine_config(ZERO2) | {"bf16": {"enabled": bf16}}
    if not bf16:
        del config["data_types"]
    settings = OptimizerSettings(decay_steps=10, kind=optimizer)
    engine = kind(new_model(seed), config, settings, TrainSettings(clip=clip))
    engine.accumulate(micro_batches)
    return engine


def batch(rows: int, seed: int = 0) -> Batch:
    """Tokens, targets and depth."""
    length, vocab = SMALL["chunk_length"], SMALL["vocab_size"]
    tokens = torch.cat([stream(seed + i, 4, length, vocab, 30) for i in range(rows)])
    return tokens, tokens.roll(-1, -1), depth_of(tokens)


def backward(engine: Engine, data: Batch, rows: int, targets: int | None = None) -> Tensor:
    """All of `data` in micro-batches of `rows`; returns the sum of losses."""
    count = torch.tensor(targets or data[0].numel())
    total = torch.zeros(())
    for start in range(0, len(data[0]), rows):
        tokens, wanted, depth = (part[start : start + rows] for part in data)
        state = LaneState.empty(len(tokens), engine.model.settings, engine.device, engine.dtype)
        losses, _ = engine(tokens, wanted, depth, state, torch.tensor(1.0))
        engine.backward(losses.sum(), count)
        total += losses.detach().sum()
    return total


def step(engine: Engine, data: Batch, rows: int, lr: float = 1e-2) -> StepResult:
    """One optimizer step over `data` in micro-batches of `rows`."""
    loss = backward(engine, data, rows)
    return engine.step(lr, loss.view(1))


def snapshot(engine: Engine) -> dict[str, dict[str, Tensor]]:
    return {f.name: {k: t.clone() for k, t in f.tensors.items()} for f in engine.snapshot()}
