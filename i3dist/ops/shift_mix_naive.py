"""Residual, LayerNorm, token shift and learned mixes in PyTorch's own operators.

Notation: N sequences, T tokens, D channels, P channels with padding, M mixes. With scale g and
offset b of the LayerNorm (Ba et al., 2016, arXiv:1607.06450), per token:

    normed_t = LayerNorm(x_t) = g (x_t - mean_t) / sqrt(variance_t + eps) + b
    before_t = normed_{t-1};  the carried shift at t = 0;  0 where the token restarts
    mixed_i,t = before_t + (normed_t - before_t) mix_i

This form runs on the CPU, and is the oracle of the CUDA kernels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MixInputs(NamedTuple):
    """The inputs of `norm_shift_mix`. x, parameters, shift and branch are 0 in padded channels."""

    x: Tensor  # [N, T, P] bf16, fp32 or fp64; T >= 1
    weight: Tensor  # [P], LayerNorm's scale
    bias: Tensor  # [P], LayerNorm's offset
    mixes: Tensor  # [M, P], the share of the present token in each result; M >= 1
    restart: Tensor  # [N, T] bool, true where nothing came before the token
    shift: Tensor  # [N, P] in x's dtype, the normed token before the first: zeros, or a result
    channels: int  # D <= P; LayerNorm's statistics are over the first D channels
    eps: float  # added to the variance
    branch: Tensor | None = None  # [N, T, P] in x's dtype, is added to x first; None is 0


class Mixed(NamedTuple):
    """The results of `norm_shift_mix`, in x's dtype."""

    mixed: tuple[Tensor, ...]  # M of [N, T, P]
    last: Tensor  # [N, P], the last token's normed: the shift of what follows
    total: Tensor  # [N, T, P], x + branch, from which the residual stream goes on


class MixSaved(NamedTuple):
    """What the backward kernel of `norm_shift_mix` reads besides gradients."""

    x: Tensor  # with its branch, if any
    weight: Tensor
    bias: Tensor
    mixes: Tensor
    restart: Tensor
    shift: Tensor
    statistics: Tensor  # [2, N, T] fp32, each token's mean and reciprocal deviation
    channels: int


def norm_shift_mix_naive(inputs: MixInputs) -> Mixed:
    """The equations; arguments and results are those of `norm_shift_mix`."""
    x, weight, bias, mixes, restart, shift, channels, eps, branch = inputs
    weight, bias, mixes = (p[..., :channels].to(x.dtype) for p in (weight, bias, mixes))
    padding = x.shape[-1] - channels

    def pad(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, padding)) if padding else tensor  # a pad of 0 would copy

    if branch is not None:
        x = pad(x[..., :channels] + branch[..., :channels])
    normed = pad(F.layer_norm(x[..., :channels], (channels,), weight, bias, eps))
    shift = pad(shift[:, :channels])
    before = torch.cat([shift.unsqueeze(1), normed[:, :-1]], dim=1)
    before = before.masked_fill(restart.unsqueeze(-1), 0.0)
    mixed = tuple(torch.lerp(before, normed, mix) for mix in pad(mixes))
    return Mixed(mixed, normed[:, -1], x)
