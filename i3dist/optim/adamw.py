"""AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) of flat tensors, in one pass over memory.

PyTorch's fused AdamW, which this equals to rounding, also writes the clipped gradient back where it
is asked to clip; without that a step on a GPU takes two thirds of the time (docs/performance.md).
"""

import math
from typing import Any

import torch
from torch import Tensor


def update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place.

    Args:
        weight: [E].
        gradient: [E]; left as it is.
        exp_avg: [E], running mean of the gradient.
        exp_avg_sq: [E], running mean of its square.
        step: scalar, steps taken before.
        lr: scalar.
        grad_scale: scalar that the gradient is divided by.
        found_inf: scalar; unless 0 nothing changes.
        betas: of the running means.
        eps: added to the denominator.
        weight_decay: share of the weight that a step of learning rate 1 takes away.
    """
    beta1, beta2 = betas
    taken = found_inf == 0
    scaled = gradient / grad_scale
    mean = beta1 * exp_avg + (1 - beta1) * scaled
    square = beta2 * exp_avg_sq + (1 - beta2) * scaled * scaled
    count = step + 1
    # 1 - beta^count, without cancellation.
    seen1, seen2 = (-torch.expm1(count * math.log(max(beta, 1e-30))) for beta in betas)
    direction = mean / seen1 / ((square / seen2).sqrt() + eps)
    new = weight - lr * (direction + weight_decay * weight)
    for old, value in ((weight, new), (exp_avg, mean), (exp_avg_sq, square), (step, count)):
        old.copy_(torch.where(taken, value, old))


class FlatAdamW(torch.optim.AdamW):
    """torch's AdamW with `update`, compiled, as its step.

    Takes `grad_scale` and `found_inf` as attributes, as torch's fused one does.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._update = torch.compile(update, dynamic=False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            options = {key: group[key] for key in ("betas", "eps", "weight_decay")}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros((), device=weight.device)
                    state |= {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
                self._update(
                    weight,
                    weight.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["step"],
                    torch.full((), group["lr"], device=weight.device),
                    self.grad_scale,
                    self.found_inf,
                    **options,
                )
