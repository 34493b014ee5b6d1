"""Optimizers that `optimizer.kind` chooses by name. To add one, register an `OptimizerKind`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from i3dist.config import OptimizerSettings
from i3dist.optim import adamw, lion
from i3dist.optim.flat import FlatOptimizer, Groups
from i3dist.registry import Registry


@dataclass(frozen=True)
class OptimizerKind:
    """How an optimizer is built, and what of it a checkpoint holds.

    Every element of a tensor must be updated by itself: ranks hold parts of tensors.
    """

    states: tuple[str, ...]
    """Names of the tensors that it keeps for each parameter, with as many elements."""
    build: Callable[[Groups, OptimizerSettings, bool], torch.optim.Optimizer]
    """(parameter groups, settings, whether to compile) -> the optimizer. It honours `grad_scale`
    and `found_inf` as `FlatOptimizer` does; its state is `states` and the scalar "step"."""


OPTIMIZERS: Registry[OptimizerKind] = Registry("optimizer.kind")


def build(
    parameters: Sequence[Sequence[Any]], settings: OptimizerSettings, compiled: bool
) -> torch.optim.Optimizer:
    """The optimizer of tensors with weight decay, and of those without: two lists."""
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in zip(parameters, (settings.weight_decay, 0.0), strict=True)
    ]
    return OPTIMIZERS.of(settings.kind).build(groups, settings, compiled)


def _options(settings: OptimizerSettings) -> dict[str, Any]:
    betas = (settings.beta1, settings.beta2)
    return {"lr": settings.lr, "betas": betas, "weight_decay": settings.weight_decay}


def _adamw(groups: Groups, settings: OptimizerSettings, compiled: bool) -> torch.optim.Optimizer:
    """Ours where it can be compiled, else PyTorch's fused one."""
    options = _options(settings) | {"eps": settings.eps}
    if compiled:
        return FlatOptimizer(groups, adamw.update, adamw.STATES, compiled, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def _lion(groups: Groups, settings: OptimizerSettings, compiled: bool) -> torch.optim.Optimizer:
    return FlatOptimizer(groups, lion.update, lion.STATES, compiled, **_options(settings))


OPTIMIZERS.register("adamw")(OptimizerKind(adamw.STATES, _adamw))
OPTIMIZERS.register("lion")(OptimizerKind(lion.STATES, _lion))
