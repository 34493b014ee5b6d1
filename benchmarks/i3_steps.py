"""Optimizer steps of i3 for the benchmarks: through the engine or in a plain PyTorch loop.

Also i3 with one thing changed: without history, or with WKV as a scripted loop.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bare_loop import BareLoop
from torch import Tensor, nn
from wkv import scripted_loop

from i3dist.config import ModelSettings, OptimizerSettings, TrainSettings
from i3dist.data.lanes import Batch
from i3dist.distributed.job import Job
from i3dist.engine.flat_parameters import FlatModel
from i3dist.model import rwkv
from i3dist.model.lm import I3LM, Below
from i3dist.model.segments import segment_ids
from i3dist.model.state import LaneState
from i3dist.ops.attention import KeysValues
from i3dist.ops.wkv import WkvInputs
from i3dist.training.counts import count_step

ENGINE_CONFIG = Path(__file__).parent.parent / "configs" / "zero2.json"


@dataclass(frozen=True)
class Shape:
    """An optimizer step."""

    lanes: int
    micro_batch: int  # lanes at once
    window: int = 8
    accumulation: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read "16" (16 lanes in one micro-batch) or "32x16" (32 lanes in micro-batches of 16)."""
        lanes, _, micro_batch = text.partition("x")
        try:
            shape = cls(int(lanes), int(micro_batch or lanes))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not LANES or LANESxROWS") from None
        if shape.lanes < 4 or shape.micro_batch < 1 or shape.lanes % shape.micro_batch:
            raise argparse.ArgumentTypeError(f"{text!r}: 4 lanes or more, in equal micro-batches")
        return shape

    def __str__(self) -> str:
        rows = f" by {self.micro_batch}" if self.micro_batch < self.lanes else ""
        times = f", {self.accumulation} times" if self.accumulation > 1 else ""
        chunks = f"{self.window} chunk" + ("s" if self.window > 1 else "")
        return f"{self.lanes} lanes{rows} x {chunks}{times}"

    @property
    def micro_batches(self) -> int:
        """Of one step."""
        return self.accumulation * self.lanes // self.micro_batch

    @property
    def chunks(self) -> int:
        """Of one step."""
        return self.lanes * self.window * self.accumulation


class I3Steps:
    """Takes optimizer steps as the trainer does."""

    def __init__(self, loop: Any, model: I3LM, shape: Shape, device: torch.device):
        """`loop` is an `Engine` or a `BareLoop` of the model."""
        self.loop, self.model, self.shape = loop, model, shape
        dtype = model.head.weight.dtype
        self.state = LaneState.empty(shape.lanes, model.settings, device, dtype)
        self.gate = torch.ones((), device=device)
        self.norm: Tensor | float = 0.0  # of the last step's gradient, before clipping
        rows = (shape.micro_batch, shape.window)
        tokens = torch.zeros(*rows, model.settings.chunk_length, dtype=torch.long, device=device)
        state = self.state.rows(0, shape.micro_batch)
        loop.prepare(tokens, tokens[..., 0], state, self.gate)

    def __call__(self, batches: list[Batch], lr: float, pad_id: int) -> Tensor:
        """One step over successive windows; returns its mean loss, on the device."""
        counts = count_step(batches, pad_id, self.model.settings)
        loss_sum = torch.zeros((), device=self.gate.device)
        for batch in batches:
            states = []
            for start in range(0, self.shape.lanes, self.shape.micro_batch):
                rows = (start, start + self.shape.micro_batch)
                tokens, targets, depth = batch.rows(*rows)
                state = self.state.rows(*rows)
                losses, state = self.loop(tokens, targets, depth, state, self.gate)
                self.loop.backward(losses.sum(), counts.targets)
                loss_sum += losses.detach().sum()
                states.append(state)
            self.state = LaneState.concatenate(states)
        stepped = self.loop.step(lr)
        self.norm = stepped.norm if isinstance(stepped, tuple) else stepped
        return loss_sum / counts.targets

    def close(self) -> None:
        """Free the model."""
        self.loop.close()


Loop = Callable[[I3LM, Shape, torch.device], I3Steps]


def in_engine(
    model: I3LM,
    shape: Shape,
    device: torch.device,
    train: TrainSettings | None = None,
    **changes: str,
) -> I3Steps:
    """Steps through the engine, compiled as `launch/train.py` does; changes of its file."""
    from i3dist.engine import setup  # other contestants need no DeepSpeed

    if not torch.distributed.is_initialized():
        setup.start(Job.detect({}))
    if device.type == "cuda":
        model.compile_blocks()
    config = setup.read_engine_config(ENGINE_CONFIG) | changes
    settings, train = OptimizerSettings(), train or TrainSettings()
    loop = setup.build(model, config, settings, train)
    loop.accumulate(shape.micro_batches)
    return I3Steps(loop, model, shape, device)


def in_bare_loop(
    model: I3LM,
    shape: Shape,
    device: torch.device,
    train: TrainSettings | None = None,
    *,
    compiled: bool,
) -> I3Steps:
    """Steps in a plain PyTorch loop; compiled, on flat parameters as in the engine."""
    settings, clip = OptimizerSettings(), (train or TrainSettings()).clip
    if not compiled:
        return I3Steps(BareLoop(model, settings, clip), model, shape, device)
    model.compile_blocks()
    flat = FlatModel(model)
    loop = BareLoop(flat, settings, clip)
    flat.share()
    return I3Steps(loop, model, shape, device)


class Nothing(nn.Identity):
    """In place of a part that is left out."""

    def reset_parameters(self) -> None:
        """It has none."""


class WithoutHistory(I3LM):
    """i3 without compressor and history, and without their parameters: plain causal attention."""

    def __init__(self, settings: ModelSettings, bos_id: int):
        one_softmax = settings.layers.replace("dual-attention", "attention")
        super().__init__(settings.model_copy(update={"layers": one_softmax}), bos_id)
        self.compressor = self.slots = Nothing()  # type: ignore[assignment]

    def below(self, tokens: Tensor, depth: Tensor, state: LaneState) -> tuple[Below, LaneState]:
        """As `I3LM.below`; the state's latents, which nobody reads, stay as they are."""
        segments = segment_ids(tokens, self.bos_id)
        x, carried = self.run_window(tokens, depth, state.layers)
        after = LaneState(state.latents, carried).map(Tensor.detach)
        # As many as there should be, which nobody reads either: a view of one.
        chunks = self.settings.history_chunks + tokens.shape[1]
        return Below(x, segments, depth, state.latents[:, :1].expand(-1, chunks, -1, -1)), after

    @property
    def keys_per_chunk(self) -> int:
        """None, so that attention is to the chunk's own tokens only."""
        return 0

    def history(self, latents: Tensor, seen: Tensor) -> list[KeysValues]:
        """As `I3LM.history`."""
        none = latents.new_empty(len(latents), 0, self.upper[0].attention.inner.computed)
        return [KeysValues(none, none)] * len(self.upper)


@contextmanager
def scripted_wkv() -> Iterator[None]:
    """Inside, RWKV blocks run WKV as a TorchScript loop over time, in fp32."""

    def loop(inputs: WkvInputs) -> tuple[Tensor, Tensor]:
        decay, bonus, k, v, restart, state, receptance = inputs
        y, final = scripted_loop(decay, bonus, k.float(), v.float(), restart, state)
        y = y.to(k.dtype)
        return y if receptance is None else torch.sigmoid(receptance) * y, final

    with mock.patch.object(rwkv, "wkv", loop):
        yield
