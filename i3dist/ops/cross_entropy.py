"""Token losses from hidden states. Letters: N tokens, D width, V vocabulary.

Logits are the largest tensor of a step: N x V, in fp32 ten times a block's activations at the
card's size. `token_losses_naive` is the definition, and what a compiler fuses by itself;
`token_losses` otherwise goes through the tokens in slices, and keeps the logits only as the matrix
product gave them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target that is not trained on

SLICE_ELEMENTS = 2**20  # logits of a slice: 4 MiB in fp32, so that it stays in a cache


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in nats, fp32 (fp64 of fp64); 0 where the target is `IGNORE`.

    Args:
        hidden: [..., D].
        head: [V, D] output projection.
        targets: [...] int64.
    """
    if torch.compiler.is_compiling():
        return token_losses_naive(hidden, head, targets)
    losses = _SlicedLosses.apply(hidden.flatten(0, -2), head, targets.flatten())
    return losses.view(targets.shape)


def token_losses_naive(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The definition; arguments and results are those of `token_losses`."""
    logits = _widen(F.linear(hidden, head))
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(targets.shape)


class _SlicedLosses(torch.autograd.Function):
    """loss_n = (max_n - z_n,target) + log sum_v e^(z_nv - max_n), with z = hidden head^T;
    dloss_n / dz_nv = softmax(z_n)_v - [v = target]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, head)
        rows = max(1, SLICE_ELEMENTS // head.shape[0])
        peaks = _widen(logits.amax(-1, keepdim=True))
        slices = zip(logits.split(rows), peaks.split(rows), strict=True)
        sums = [(_widen(z) - peak).exp_().sum(-1, keepdim=True) for z, peak in slices]
        log_sums = torch.cat(sums).log()
        chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1))
        ctx.save_for_backward(hidden, head, targets, logits, peaks, log_sums)
        ctx.rows = rows
        losses = ((peaks - chosen) + log_sums).squeeze(-1)
        return losses.masked_fill(targets == IGNORE, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, head, targets, logits, peaks, log_sums = ctx.saved_tensors
        weights = grad.masked_fill(targets == IGNORE, 0.0).unsqueeze(-1)
        chosen = targets.clamp(min=0).unsqueeze(-1)
        grad_logits = torch.empty_like(logits)
        slices = (
            x.split(ctx.rows) for x in (logits, peaks, log_sums, weights, chosen, grad_logits)
        )
        for z, peak, log_sum, weight, target, out in zip(*slices, strict=True):
            share = (_widen(z) - peak).sub_(log_sum).exp_().mul_(weight)
            out.copy_(share.scatter_add_(-1, target, -weight))
        return grad_logits @ head, grad_logits.T @ hidden, None


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
