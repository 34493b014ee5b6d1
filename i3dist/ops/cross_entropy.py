"""Token losses from hidden states. Notation: N tokens, D width, V vocabulary, S tokens of a slice.

With z = hidden head^T, the logits:

    loss_n = (max_n - z_n,target) + log sum_v e^(z_nv - max_n)
    dloss_n / dz_nv = softmax(z_n)_v - [v = target]

N x V logits would be the largest tensor of a step. `token_losses_naive`, the definition, computes
them at once; `token_losses` computes them slice by slice and never keeps them:

- Eager code computes a slice's logits again in the backward pass.
- Compiled code computes the gradients in the forward pass, as if each loss had an upstream gradient
  of 1, and scales them in the backward pass. That saves one of four matrix products, and needs one
  upstream gradient for all tokens: the head's gradient has already been summed over them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from i3dist.ops.compiled import Compiled
from i3dist.ops.precision import compute_dtype, multipliable, widen

IGNORE = -100  # a target that is not trained on

SLICE_ELEMENTS = 2**21  # logits of a slice: 8 MiB in fp32, which fits into a CPU's cache
# On a GPU 16,384 tokens at V = 32,000: 1 GiB in bf16. With fewer tokens the hidden states' gradient
# has too few output tiles for a matrix product, and the head's is read and written more often.
SLICE_ELEMENTS_ON_GPU = 2**14 * 32_000


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in nats, fp32 (fp64 of fp64); 0 where the target is `IGNORE`.

    If compiled, all losses whose target is not `IGNORE` must have the same upstream gradient, as
    they have if their sum is differentiated; otherwise the gradient of `head` is NaN.

    Args:
        hidden: [..., D].
        head: [V, D] output projection, in hidden's dtype.
        targets: [...] int64.
    """
    inputs = multipliable(hidden).flatten(0, -2), multipliable(head), targets.flatten()
    if not is_compiling():
        losses = _Recomputed.apply(*inputs)
    elif torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        losses = _Scaled.apply(*inputs)
    else:
        losses, *_ = _fused(*inputs, None)
    return losses.view(targets.shape)


def token_losses_naive(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The definition, with logits [..., V]; arguments and results are those of `token_losses`."""
    logits = widen(F.linear(multipliable(hidden), multipliable(head)))
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(targets.shape)


def slice_rows(vocab: int, on_gpu: bool) -> int:
    """Tokens of a slice."""
    return max(1, (SLICE_ELEMENTS_ON_GPU if on_gpu else SLICE_ELEMENTS) // vocab)


class _Recomputed(torch.autograd.Function):
    """Eager losses: backward starts again from the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, head, targets)
        return _in_slices(hidden, head, targets, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, head, targets = ctx.saved_tensors
        _, grad_hidden, grad_head = _in_slices(hidden, head, targets, grad)
        return grad_hidden, grad_head.to(head.dtype), None


class _Scaled(torch.autograd.Function):
    """Compiled losses: forward computes the gradients of their sum, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        ones = torch.ones_like(targets, dtype=compute_dtype(hidden))
        losses, grad_hidden, grad_head = _fused(hidden, head, targets, ones)
        ctx.save_for_backward(grad_hidden, grad_head, targets)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_head, targets = ctx.saved_tensors
        dtype, ignored = grad_hidden.dtype, targets == IGNORE
        grad_hidden = grad_hidden * grad.masked_fill(ignored, 0.0).unsqueeze(-1)
        return grad_hidden.to(dtype), (grad_head * _common(grad, ignored)).to(dtype), None


def _common(grad: Tensor, ignored: Tensor) -> Tensor:
    """The number, a scalar tensor, that `grad` [N] is wherever `ignored` [N] is false.

    NaN if there are several, which the engine treats as any gradient that is not finite; raising an
    error would wait for the device. 0 if all tokens are ignored.
    """
    least = grad.masked_fill(ignored, math.inf).amin()
    most = grad.masked_fill(ignored, -math.inf).amax()
    return most.masked_fill(least < most, math.nan).masked_fill(least > most, 0.0)


def _in_slices(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their weighted sum.

    Args:
        hidden: [N, D].
        head: [V, D].
        targets: [N] int64.
        weights: [N] in `compute_dtype`; None if no gradients are wanted.
        fused: whether to run what is not a matrix product as one compiled kernel.

    Returns:
        Losses [N] in `compute_dtype`, the gradient [N, D] in hidden's dtype, and the gradient
        [V, D] in `compute_dtype`, in which slices are added up. Without weights the gradients have
        no elements.
    """
    ignored, wanted = targets == IGNORE, weights is not None
    losses = hidden.new_empty(len(hidden), 1, dtype=compute_dtype(hidden))
    grad_hidden = hidden.new_empty(hidden.shape if wanted else 0)
    grad_head = losses.new_zeros(head.shape if wanted else 0)
    chosen = targets.clamp(min=0).unsqueeze(-1)
    if weights is not None:
        weights = weights.masked_fill(ignored, 0.0).unsqueeze(-1)
    rows = slice_rows(len(head), hidden.is_cuda)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        h, target = hidden[part], chosen[part]
        if weights is None:
            losses[part] = _slice(h, head, target, None, fused)[0]
            continue
        losses[part], grad_z = _slice(h, head, target, weights[part], fused)
        torch.mm(grad_z, head, out=grad_hidden[part])
        _add_product(grad_head, grad_z.T, h)
        del grad_z  # before the next slice has logits
    return losses.squeeze(-1).masked_fill_(ignored, 0.0), grad_hidden, grad_head


def _slice(
    h: Tensor, head: Tensor, target: Tensor, weight: Tensor | None, fused: bool
) -> tuple[Tensor, Tensor]:
    """Losses [S, 1], and the gradient of their weighted sum in the logits [S, V], in h's dtype.

    Args:
        h: [S, D].
        head: [V, D].
        target: [S, 1] int64, at least 0.
        weight: [S, 1]; without it the second result means nothing.
        fused: as in `_in_slices`.
    """
    z = F.linear(h, head)
    own = widen(z.gather(-1, target))
    losses = (_compiled_softmax() if fused else _softmax_)(z, own, weight)
    if weight is not None:
        # The target's softmax is e^-loss. Indexed outside the kernel, which then needs one pass.
        z.scatter_(-1, target, losses.neg().exp_().mul_(weight).sub_(weight).to(z.dtype))
    return losses, z


def _softmax_(z: Tensor, own: Tensor, weight: Tensor | None) -> Tensor:
    """Losses [S, 1] of logits z [S, V], of which the targets' are own [S, 1].

    Overwrites z; if a weight [S, 1] is given, with weight * softmax(z).
    """
    x = widen(z)
    peak = x.amax(-1, keepdim=True)
    x = x.sub_(peak)
    exponentials = x.exp_() if weight is None else x.exp()
    log_sum = exponentials.sum(-1, keepdim=True).log_()
    if weight is not None:
        z.copy_(x.sub_(log_sum).exp_().mul_(weight))
    return peak - own + log_sum


@functools.cache
def _compiled_softmax() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """`_softmax_` as one kernel. Compiled for each shape, so that a shape has the same rounding in
    every run, whatever other shapes came before it."""
    return Compiled(_softmax_)


def call_kernels(hidden: Tensor, head: Tensor, targets: Tensor) -> None:
    """Call the compiled kernel as training does, for `compiled.noting`.

    `token_losses` does not, unless it is itself compiled. The arguments are those of `_in_slices`.
    """
    rows, weights = slice_rows(len(head), hidden.is_cuda), torch.ones_like(targets).to(hidden)
    parts = (x.split(rows) for x in (hidden, targets.unsqueeze(-1), widen(weights).unsqueeze(-1)))
    for h, target, weight in zip(*parts, strict=True):
        _slice(h, head, target, weight, fused=True)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may be fp32 and a and b bf16.

    On a GPU the product is added before it is rounded to bf16, and without another pass.
    """
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@torch.library.custom_op(
    "i3dist::token_losses",
    mutates_args=(),
    schema="(Tensor hidden, Tensor head, Tensor targets, Tensor? weights)"
    " -> (Tensor, Tensor, Tensor)",
)
def _fused(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_in_slices` with its kernel compiled.

    One operator to PyTorch: a compiler that saw the slices might keep several in memory.
    """
    return _in_slices(hidden, head, targets, weights, fused=True)


@_fused.register_fake
def _fused_fake(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wanted = compute_dtype(hidden), weights is not None
    return (
        hidden.new_empty(len(hidden), dtype=dtype),
        hidden.new_empty(hidden.shape if wanted else 0),
        head.new_empty(head.shape if wanted else 0, dtype=dtype),
    )
