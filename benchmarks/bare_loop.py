"""The training step of a plain PyTorch program without DeepSpeed, to compare the engine with."""

from typing import Any

import torch
from torch import Tensor, nn

from i3dist.config import OptimizerSettings
from i3dist.engine.flat_parameters import FlatModel
from i3dist.model.lm import by_decay
from i3dist.optim.optimizers import OPTIMIZERS


class BareLoop:
    """bf16 parameters, with fp32 copies, gradients and AdamW state as one flat tensor each.

    It has the engine's interface. Clipping is a factor inside AdamW; a step never waits for the
    device.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, clip: float):
        """Take over the model; its parameters become bf16 and its buffers stay."""
        self.model, self.clip = model, clip
        matrices = {"decayed"} if isinstance(model, FlatModel) else set(by_decay(model)[0])
        named = sorted(model.named_parameters(), key=lambda item: item[0] not in matrices)
        self.parameters = [parameter for _, parameter in named]
        sizes = [parameter.numel() for parameter in self.parameters]
        master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.gradient = torch.zeros_like(master)
        self.masters, self.gradients = (
            [part.view_as(p) for part, p in zip(flat.split(sizes), self.parameters, strict=True)]
            for flat in (master, self.gradient)
        )
        for parameter in self.parameters:
            parameter.data = parameter.data.bfloat16()
        in_matrices = sum(p.numel() for name, p in named if name in matrices)
        parts = [
            part.split([in_matrices, len(master) - in_matrices]) for part in (master, self.gradient)
        ]
        for weights, gradients in zip(*parts, strict=True):
            weights.grad = gradients
        groups = [
            {"params": [weights], "weight_decay": decay}
            for weights, decay in zip(parts[0], (settings.weight_decay, 0.0), strict=True)
        ]
        self.optimizer = OPTIMIZERS.of("adamw").build(groups, settings, master.is_cuda)
        self._accumulated = False

    def prepare(self, *inputs: Any) -> None:
        """Nothing: kernels are launched one by one."""

    def close(self) -> None:
        """Let go of the model."""

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward."""
        return self.model(*inputs)

    def backward(self, loss_sum: Tensor, targets: Tensor) -> None:
        """Add one micro-batch's share to the fp32 gradient of the mean over `targets`."""
        (loss_sum / targets.clamp(min=1).to(loss_sum.dtype)).backward()
        # None where a part of the model is not trained.
        new = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        add = torch._foreach_add_ if self._accumulated else torch._foreach_copy_
        add(self.gradients, new)
        self._accumulated = True
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip and update; returns the gradient's norm, on the device."""
        norm = torch.linalg.vector_norm(self.gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.grad_scale = (norm / self.clip).clamp(min=1.0)  # type: ignore[attr-defined]
        self.optimizer.found_inf = torch.zeros_like(norm)  # type: ignore[attr-defined]
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)
        self._accumulated = False
        return norm
