"""An optimizer whose step is one elementwise function of flat tensors."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from i3dist.ops.compiled import Compiled

Groups = Iterable[dict[str, Any]]  # torch's parameter groups: "params", and options of their own


def fresh_state(weight: Tensor, names: tuple[str, ...], steps: int = 0) -> dict[str, Tensor]:
    """Optimizer state of a weight after `steps` steps that left no trace.

    Returns:
        "step", a scalar fp32, and for each of `names` zeros of the weight's shape and dtype.
    """
    count = torch.tensor(float(steps), device=weight.device)
    return {"step": count, **{name: torch.zeros_like(weight) for name in names}}


class FlatOptimizer(torch.optim.Optimizer):
    """Runs `update` on every tensor that has a gradient.

    The attributes `grad_scale` and `found_inf` mean what they mean to PyTorch's fused optimizers:
    the gradient is divided by the one, and nothing changes unless the other is 0.
    """

    grad_scale: Tensor  # scalar
    found_inf: Tensor  # scalar

    def __init__(
        self,
        groups: Groups,
        update: Callable[..., None],
        states: tuple[str, ...],
        compiled: bool,
        **options: Any,
    ):
        """Optimize parameter groups.

        Args:
            groups: of flat tensors.
            update: changes its arguments in place: weight, gradient, one tensor for each of
                `states`, step count, learning rate, grad_scale, found_inf; then options by name.
            states: names of the tensors, as long as the weight, that are kept between steps.
            compiled: whether to compile `update`.
            options: "lr", and what else `update` takes.
        """
        super().__init__(groups, options)
        self._states = states
        self._update = Compiled(update) if compiled else update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            options = {key: group[key] for key in self.defaults if key != "lr"}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state |= fresh_state(weight, self._states)
                self._update(
                    weight,
                    weight.grad,
                    *(state[name] for name in self._states),
                    state["step"],
                    torch.full((), group["lr"], device=weight.device),
                    self.grad_scale,
                    self.found_inf,
                    **options,
                )
