"""Training through DeepSpeed's public API alone: its reduction, norm, clipping, optimizer step.

It shows what `Zero2Engine` gains (benchmarks/engines.py), and it trains with versions of DeepSpeed
that `Zero2Engine` does not know. Losses equal those of `Zero2Engine` to rounding: DeepSpeed casts
the sum over ranks back to bf16, and clips by norm + 1e-6.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from i3dist.checkpoint.format import Fragment
from i3dist.config import OptimizerSettings, TrainSettings
from i3dist.distributed import collectives
from i3dist.engine.deepspeed_internals import deepspeed, initialize
from i3dist.engine.interface import Engine, StepResult, check_applied, check_states, complete
from i3dist.model.lm import I3LM, by_decay
from i3dist.model.state import LaneState
from i3dist.optim.flat import fresh_state


class StockEngine(Engine):
    """DeepSpeed as its documentation describes it, on the model's own parameters."""

    def __init__(
        self,
        model: I3LM,
        config: dict[str, Any],
        optimizer: OptimizerSettings,
        train: TrainSettings,
    ):
        """Wrap the model; the arguments are those of `Zero2Engine`."""
        parameters = [[model.get_parameter(name) for name in names] for names in by_decay(model)]
        super().__init__(model, model, parameters, config, optimizer)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._engine = initialize(model, self._optimizer, complete(config, train.clip))
        check_applied(self._engine, config)
        for name, buffer in model.named_buffers():  # some versions cast buffers as well
            buffer.data = buffers[name].to(self.device)
        self._pending = 0  # micro-batches since the last step
        self._link_state()

    def _link_state(self) -> None:
        """Make the optimizer's state accessible, which DeepSpeed does in its first step.

        A step with gradient 0 and learning rate 0 changes no weight. The state exists before it, as
        DeepSpeed links all groups after the first group's step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
            for partition in group["params"]:
                self._optimizer.state[partition] = fresh_state(partition, self._kind.states)
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(torch.stack([p.sum() for p in self.model.parameters()]).sum() * 0)
        self._step(torch.empty(0), math.inf)
        self._set_step_count(0)

    def prepare(self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor) -> None:
        """Nothing: kernels are launched one by one."""

    def _set_step_count(self, steps: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(steps)

    def backward(self, loss_sum: Tensor, targets: Tensor) -> None:
        """See `Engine.backward`. DeepSpeed divides by micro-batches and ranks; that is undone."""
        self._pending += 1
        self._engine.set_gradient_accumulation_boundary(self._pending == self.micro_batches)
        scale = self.micro_batches * self._engine.dp_world_size / targets.clamp(min=1)
        self._compute.stop()  # DeepSpeed exchanges gradients inside of its backward
        self._engine.backward(loss_sum * scale.to(loss_sum.dtype))

    def _step(self, sums: Tensor, limit: float) -> StepResult:
        """Sum `sums` in an exchange of its own, then let DeepSpeed clip and update."""
        figures = collectives.all_sum(sums.clone()).tolist() if len(sums) else []
        skips = not all(map(math.isfinite, figures))
        if not skips and limit < math.inf:
            skips = self.gradient_norm_of("") > limit
        one = torch.ones((), device=self.device)
        self._optimizer.grad_scale = one  # type: ignore[attr-defined]
        self._optimizer.found_inf = one * skips  # type: ignore[attr-defined]
        self._engine.step()
        self._pending = 0
        applied = self._engine.was_step_applied()  # not where DeepSpeed finds an overflow
        norm = float(self._engine.get_global_grad_norm()) if applied else math.inf
        return StepResult(applied and not skips, norm, figures)

    def gradient_norm_of(self, prefix: str) -> float:
        """See `Engine.gradient_norm_of`. Each gradient is gathered whole on every rank."""
        squares = [
            deepspeed.utils.safe_get_full_grad(parameter).float().square().sum()
            for name, parameter in self.model.named_parameters()
            if name.startswith(prefix)
        ]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    @torch.no_grad()
    def snapshot(self) -> Iterator[Fragment]:
        """See `Engine.snapshot`. Each parameter is gathered whole; a rank keeps an equal part."""
        rank, ranks = torch_dist.get_rank(), torch_dist.get_world_size()
        read = deepspeed.utils.safe_get_full_optimizer_state
        fragments = []
        for name, parameter in self.model.named_parameters():
            whole = {"weight": deepspeed.utils.safe_get_full_fp32_param(parameter)}
            whole |= {state: read(parameter, state) for state in self._kind.states}
            start, end = (parameter.numel() * part // ranks for part in (rank, rank + 1))
            share = {k: t.flatten()[start:end].to("cpu", copy=True) for k, t in whole.items()}
            if start < end:
                fragments.append(Fragment(name, start, share))
        return iter(fragments)

    def _copy_weights(self) -> None:
        """See `Engine._copy_weights`."""
        for parameter in self.model.parameters():
            deepspeed.utils.safe_set_full_fp32_param(parameter, parameter.float())

    @torch.no_grad()
    def load(self, state: Mapping[str, dict[str, Tensor]], steps: int) -> None:
        """See `Engine.load`."""
        write = deepspeed.utils.safe_set_full_optimizer_state
        for name, parameter in self.model.named_parameters():
            entry = {key: tensor.view_as(parameter) for key, tensor in state[name].items()}
            check_states(entry, self._kind.states)
            weight = entry.pop("weight")
            parameter.copy_(weight)
            deepspeed.utils.safe_set_full_fp32_param(parameter, weight)
            for key, tensor in entry.items():
                write(parameter, tensor, key)
        self._set_step_count(steps)
