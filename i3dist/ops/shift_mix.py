"""Residual, LayerNorm, token shift and learned mixes: what an RWKV-4 layer does to its input.

Letters: N sequences, T tokens, D channels, P channels with padding, M mixes. With
weight g and bias b, per token:

    normed_t = LayerNorm(x_t) = g (x_t - mean_t) / sqrt(variance_t + eps) + b
    before_t = normed_{t-1};  the carried shift at t = 0;  0 where the token restarts
    mixed_i,t = before_t + (normed_t - before_t) mix_i

`norm_shift_mix_naive` says the same in PyTorch's own operators: it serves the CPU and is the
oracle. On CUDA it would read and write every intermediate; there the work is a pair of Triton
kernels, one operator to PyTorch, which `torch.compile` holds without a graph break.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None  # PyTorch's CPU wheel comes without it


def norm_shift_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    restart: Tensor,
    shift: Tensor,
    channels: int,
    eps: float,
    branch: Tensor | None = None,
    goes_on: bool = True,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Normalised x, mixed with the previous token's in as many ways as there are mixes.

    Where there is a branch, x stands for x + branch throughout, rounded to x's dtype.

    Differentiable in all floating-point tensors. Nothing before a restart reaches what follows it,
    in values or in gradients, bit for bit. Results and gradients are 0 in padded channels.

    Args:
        x: [N, T, P] bf16, fp32 or fp64; T >= 1.
        weight: [P], LayerNorm's scale.
        bias: [P], LayerNorm's offset.
        mixes: [M, P], the share of the present token in each result; M >= 1.
        restart: [N, T] bool, true where nothing came before the token.
        shift: [N, P] in x's dtype, the normalised token before the first: zeros, or an earlier
            call's second result.
        channels: D <= P. Statistics are over the first D channels; the parameters, x, shift and
            branch are 0 in the others.
        eps: added to the variance.
        branch: [N, T, P] in x's dtype: what a residual connection adds to x first; None is 0.
        goes_on: whether the third result is used, and so has a gradient.

    Returns:
        M tensors [N, T, P], the last token's normed [N, P], and x + branch [N, T, P] or, without a
        branch, x; in x's dtype. The CUDA kernels compute in fp32 and round once. The stream is to
        go on from the third result, not from x: gradients are then added in the kernel.

    Raises:
        ValueError: a shape or dtype is wrong, or T = 0.
    """
    _check(x, weight, bias, mixes, restart, shift, channels, branch)
    inputs = x, weight, bias, mixes, restart, shift, channels, eps, branch
    if has_kernels(x):
        total, last, *mixed = _NormShiftMix.apply(goes_on, *inputs)
    else:
        mixed, last, total = norm_shift_mix_naive(*inputs)
    return tuple(mixed), last, total if goes_on else total.detach()


def has_kernels(x: Tensor) -> bool:
    """Whether `norm_shift_mix` of x runs as CUDA kernels."""
    return _TRITON and x.is_cuda and x.dtype != torch.float64


def norm_shift_mix_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    restart: Tensor,
    shift: Tensor,
    channels: int,
    eps: float,
    branch: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The equations; arguments and results are those of `norm_shift_mix`."""
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
    return mixed, normed[:, -1], x


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    restart: Tensor,
    shift: Tensor,
    channels: int,
    branch: Tensor | None,
) -> None:
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"norm_shift_mix: x must be [N, T, P] with T >= 1, got {list(x.shape)}")
    rows, length, width = x.shape
    if mixes.ndim != 2 or mixes.shape[0] == 0:
        raise ValueError(f"norm_shift_mix: mixes must be [M >= 1, P], got {list(mixes.shape)}")
    if not 1 <= channels <= width:
        raise ValueError(f"norm_shift_mix: channels must be 1 to {width}, got {channels}")
    wanted = {
        "weight": (weight, (width,)),
        "bias": (bias, (width,)),
        "mixes": (mixes, (mixes.shape[0], width)),
        "restart": (restart, (rows, length)),
        "shift": (shift, (rows, width)),
        "branch": (x if branch is None else branch, (rows, length, width)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"norm_shift_mix: {name} must be {list(shape)}, got {list(tensor.shape)}"
            )
    if shift.dtype != x.dtype or restart.dtype != torch.bool:
        raise ValueError(
            f"norm_shift_mix: x and shift must share a dtype and restart be bool, got {x.dtype}, "
            f"{shift.dtype} and {restart.dtype}"
        )
    if branch is not None and branch.dtype != x.dtype:
        raise ValueError(
            f"norm_shift_mix: branch and x must share a dtype, got {branch.dtype} and {x.dtype}"
        )


@functools.cache
def _kernels() -> ModuleType:
    from i3dist.ops import shift_mix_triton

    return shift_mix_triton


@torch.library.custom_op("i3dist::norm_shift_mix", mutates_args=())
def _norm_shift_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    restart: Tensor,
    shift: Tensor,
    channels: int,
    eps: float,
    branch: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The mixed, the last normed, each token's mean and reciprocal deviation [2, N, T] fp32, and
    x + branch (no elements if there is no branch).

    One tensor a mix, not a stack: their gradients then come as they are, uncopied.
    """
    return _kernels().forward(x, weight, bias, mixes, restart, shift, channels, eps, branch)


@torch.library.custom_op("i3dist::norm_shift_mix_backward", mutates_args=())
def _norm_shift_mix_backward(
    grad_mixed: list[Tensor],
    grad_last: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    restart: Tensor,
    shift: Tensor,
    statistics: Tensor,
    channels: int,
    grad_total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and shift, and summands [:, 2 + M, P] fp32 of weight's, bias's and mixes'.

    x is with its branch, if any; then so is its gradient, and includes `grad_total`.
    """
    forward = x, weight, bias, mixes, restart, shift, statistics, channels
    return _kernels().backward(grad_mixed, grad_last, *forward, grad_total)


@_norm_shift_mix.register_fake
def _norm_shift_mix_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    restart: Tensor,
    shift: Tensor,
    channels: int,
    eps: float,
    branch: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    mixed = [x.new_empty(x.shape) for _ in range(mixes.shape[0])]
    statistics = x.new_empty(2, *restart.shape, dtype=torch.float32)
    total = x.new_empty(0 if branch is None else x.shape)
    return mixed, shift.new_empty(shift.shape), statistics, total


@_norm_shift_mix_backward.register_fake
def _norm_shift_mix_backward_fake(
    grad_mixed: list[Tensor],
    grad_last: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    restart: Tensor,
    shift: Tensor,
    statistics: Tensor,
    channels: int,
    grad_total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, width = x.shape
    programs = _kernels().backward_programs(rows * length)
    summands = x.new_empty(programs, 2 + mixes.shape[0], width, dtype=torch.float32)
    return x.new_empty(x.shape), shift.new_empty(shift.shape), summands


class _NormShiftMix(torch.autograd.Function):
    """The kernels and their gradients. Not registered with the operator: an operator cannot return
    x itself, which is the total where there is no branch."""

    @staticmethod
    def forward(ctx: Any, goes_on: bool, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.channels, _, branch = inputs
        ctx.goes_on, ctx.branches = goes_on, branch is not None
        mixed, last, statistics, total = _norm_shift_mix(x, *inputs)
        total = total if ctx.branches else x.view_as(x)
        ctx.save_for_backward(total if ctx.branches else x, *tensors, statistics)
        return total, last, *mixed

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor, grad_last: Tensor, *grad_mixed: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # Where the total ends here, its gradient is a tensor of zeros.
        x, shift, summands = _norm_shift_mix_backward(
            list(grad_mixed), grad_last, *saved, ctx.channels, grad_total if ctx.goes_on else None
        )
        _, weight, bias, mixes, *_ = saved
        total = summands.sum(0)  # in a fixed order: the same bits in every run
        parameters = total[0].to(weight.dtype), total[1].to(bias.dtype), total[2:].to(mixes.dtype)
        return None, x, *parameters, None, shift, None, None, x if ctx.branches else None
