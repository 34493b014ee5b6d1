"""AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101), in one pass over memory.

The result equals PyTorch's fused AdamW to rounding. PyTorch's also writes the clipped gradient back
when it clips; without that write a step on a GPU takes two thirds of the time
(docs/performance.md).
"""

import math

import torch
from torch import Tensor

STATES = ("exp_avg", "exp_avg_sq")  # running means of the gradient and of its square


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
        weight: [E] fp32.
        gradient: [E]; not changed.
        exp_avg: [E], running mean of the gradient.
        exp_avg_sq: [E], running mean of the gradient's square.
        step: scalar, number of steps taken so far.
        lr: scalar, learning rate.
        grad_scale: scalar; the gradient is divided by it.
        found_inf: scalar; unless it is 0 nothing changes.
        betas: decay of the two running means.
        eps: added to the denominator.
        weight_decay: fraction of the weight that a step with learning rate 1 removes.
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
