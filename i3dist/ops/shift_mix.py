"""Residual, LayerNorm, token shift and learned mixes: what an RWKV-4 layer does to its input.

Notation: N sequences, T tokens, D channels, P channels with padding, M mixes; the equations are in
`i3dist.ops.shift_mix_naive`, which runs on the CPU. On CUDA it would read and write every
intermediate, so there a pair of Triton kernels does the work. They are one operator to PyTorch:
`torch.compile` has no graph break here.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i3dist.ops.ahead import compile_ahead, wait_for
from i3dist.ops.checks import check_dtypes, check_shapes, is_plain
from i3dist.ops.shift_mix_naive import Mixed, MixInputs, MixSaved, norm_shift_mix_naive

_TRITON = importlib.util.find_spec("triton") is not None  # PyTorch's CPU wheel comes without it


class Norm(NamedTuple):
    """A LayerNorm of padded channels."""

    weight: Tensor  # [P], scale
    bias: Tensor  # [P], offset
    channels: int  # D <= P; statistics are over the first D, results are 0 in the others
    eps: float  # added to the variance


def norm_shift_mix(inputs: MixInputs, goes_on: bool = True) -> Mixed:
    """Normalised x + branch, mixed with the previous token's once for each row of `mixes`.

    x + branch is rounded to x's dtype first. The CUDA kernels compute in fp32 and round once.
    Differentiable in all floating-point tensors. Nothing before a restart reaches what follows it,
    in values or in gradients, bit for bit. Results and gradients are 0 in padded channels.

    Args:
        inputs: what is read.
        goes_on: whether `total` is used and so has a gradient. The residual stream must go on from
            `total`, not from x: the kernel then adds both gradients.

    Raises:
        ValueError: a shape or dtype is wrong, or T = 0.
    """
    _check(inputs)
    if has_kernels(inputs.x) and is_plain():
        mixed, last, _, total = _kernels().forward(inputs)
        total = inputs.x if inputs.branch is None else total
    elif has_kernels(inputs.x):
        total, last, *mixed = _NormShiftMix.apply(goes_on, *inputs)
    else:
        mixed, last, total = norm_shift_mix_naive(inputs)
    return Mixed(tuple(mixed), last, total if goes_on else total.detach())


def has_kernels(x: Tensor) -> bool:
    """Whether `norm_shift_mix` of x, of any shape, runs as CUDA kernels."""
    return _TRITON and x.is_cuda and x.dtype != torch.float64


def _check(inputs: MixInputs) -> None:
    x, weight, bias, mixes, restart, shift, channels, _, branch = inputs
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
        "branch": (branch, (rows, length, width)),
    }
    check_shapes("norm_shift_mix", wanted)
    check_dtypes("norm_shift_mix", {"x": x, "shift": shift, "branch": branch}, restart)


@functools.cache
def _kernels() -> ModuleType:
    from i3dist.ops import shift_mix_triton

    return shift_mix_triton


_READ = "Tensor x, Tensor weight, Tensor bias, Tensor mixes, Tensor restart, Tensor shift"


@torch.library.custom_op(
    "i3dist::norm_shift_mix",
    mutates_args=(),
    schema=f"({_READ}, SymInt channels, float eps, Tensor? branch)"
    " -> (Tensor[], Tensor, Tensor, Tensor)",
)
def _norm_shift_mix(*inputs: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The mixed, the last normed, each token's mean and reciprocal deviation [2, N, T] fp32, and
    x + branch (no elements if there is no branch).

    One tensor per mix, not a stack: then their gradients need no copy.
    """
    return wait_for(_kernels().forward)(MixInputs(*inputs))


@torch.library.custom_op(
    "i3dist::norm_shift_mix_backward",
    mutates_args=(),
    schema=f"(Tensor[] grad_mixed, Tensor grad_last, {_READ}, Tensor statistics, SymInt channels, "
    "Tensor? grad_total) -> (Tensor, Tensor, Tensor)",
)
def _norm_shift_mix_backward(
    grad_mixed: list[Tensor], grad_last: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and shift, and summands [:, 2 + M, P] fp32 of weight's, bias's and mixes'.

    The gradient of x is that of x + branch, and includes `grad_total`, the last argument.
    """
    *saved, grad_total = rest
    return wait_for(_kernels().backward)(grad_mixed, grad_last, MixSaved(*saved), grad_total)


@_norm_shift_mix.register_fake
def _norm_shift_mix_fake(*inputs: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    x, _, _, mixes, restart, shift, _, _, branch = inputs
    compile_ahead(_kernels().forward, MixInputs(*inputs))
    mixed = [x.new_empty(x.shape) for _ in range(mixes.shape[0])]
    statistics = x.new_empty(2, *restart.shape, dtype=torch.float32)
    total = x.new_empty(0 if branch is None else x.shape)
    return mixed, shift.new_empty(shift.shape), statistics, total


@_norm_shift_mix_backward.register_fake
def _norm_shift_mix_backward_fake(
    grad_mixed: list[Tensor], grad_last: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, mixes, _, shift, *_ = rest
    *saved, grad_total = rest
    compile_ahead(_kernels().backward, grad_mixed, grad_last, MixSaved(*saved), grad_total)
    rows, length, width = x.shape
    programs = _kernels().backward_programs(rows * length)
    summands = x.new_empty(programs, 2 + mixes.shape[0], width, dtype=torch.float32)
    return x.new_empty(x.shape), shift.new_empty(shift.shape), summands


class _NormShiftMix(torch.autograd.Function):
    """The kernels and their gradients.

    They are not registered with the operator: an operator cannot return x itself, and without a
    branch x is the total.
    """

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
        # Where the total is not used, its gradient is a tensor of zeros.
        x, shift, summands = _norm_shift_mix_backward(
            list(grad_mixed), grad_last, *saved, ctx.channels, grad_total if ctx.goes_on else None
        )
        _, weight, bias, mixes, *_ = saved
        total = summands.sum(0)  # in a fixed order: the same bits in every run
        parameters = total[0].to(weight.dtype), total[1].to(bias.dtype), total[2:].to(mixes.dtype)
        return None, x, *parameters, None, shift, None, None, x if ctx.branches else None
