"""A residual connection and LayerNorm (Ba et al., 2016, arXiv:1607.06450) of padded channels.

Notation: P channels with padding. On a GPU it runs as `norm_shift_mix` with one mix that takes the
present token only: that is LayerNorm. PyTorch's compiler takes three times as long for rows wider
than 1,024 (docs/performance.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.ops.shift_mix import MixInputs, Norm, has_kernels, norm_shift_mix


def add_and_norm(
    x: Tensor, norm: Norm, branch: Tensor | None = None, goes_on: bool = True
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + branch, and x + branch; in x's dtype, 0 in padded channels.

    The residual stream must go on from the second result, not from x: the kernel then adds both
    gradients.

    Args:
        x: [..., P].
        norm: the LayerNorm.
        branch: [..., P] in x's dtype; None is 0.
        goes_on: whether the second result is used, and so has a gradient.
    """
    if not (has_kernels(x) and x.numel()):
        normed, total = add_and_norm_naive(x, norm, branch)
        return normed, total if goes_on else total.detach()
    weight, bias, channels, eps = norm
    flat = x.reshape(1, -1, x.shape[-1])
    all_present = torch.ones_like(weight)[None]
    restart = torch.ones(flat.shape[:2], dtype=torch.bool, device=x.device)
    shift = torch.zeros_like(flat[:, 0])
    branch = None if branch is None else branch.reshape(flat.shape)
    (normed,), _, total = norm_shift_mix(
        MixInputs(flat, weight, bias, all_present, restart, shift, channels, eps, branch), goes_on
    )
    return normed.view(x.shape), total.view(x.shape)


def add_and_norm_naive(
    x: Tensor, norm: Norm, branch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: [..., P] -> two of [..., P], as `add_and_norm`."""
    weight, bias, channels, eps = norm
    if branch is not None:
        x = x + branch
    inner = x[..., :channels]
    normed = F.layer_norm(inner, (channels,), weight[:channels], bias[:channels], eps)
    padding = x.shape[-1] - channels
    return F.pad(normed, (0, padding)) if padding else normed, x  # a pad of 0 would copy
