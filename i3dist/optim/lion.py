"""Lion (Chen et al., 2023, arXiv:2302.06675, algorithm 2): the sign of a momentum."""

import torch
from torch import Tensor

STATES = ("exp_avg",)  # running mean of the gradient


def update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    *,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """One step, in place; the arguments are those of `adamw.update`: [E] each, and scalars.

    The first beta weighs the running mean in the direction, the second in its own update.
    """
    beta1, beta2 = betas
    taken = found_inf == 0
    scaled = gradient / grad_scale
    direction = (beta1 * exp_avg + (1 - beta1) * scaled).sign()
    mean = beta2 * exp_avg + (1 - beta2) * scaled
    new = weight - lr * (direction + weight_decay * weight)
    for old, value in ((weight, new), (exp_avg, mean), (step, step + 1)):
        old.copy_(torch.where(taken, value, old))
