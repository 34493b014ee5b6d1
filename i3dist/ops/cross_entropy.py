"""Token losses from hidden states. Letters: N tokens, D width, V vocabulary.

Logits are the largest tensor of a step: N x V, in fp32 ten times a block's activations at the
card's size. `token_losses_naive` is the definition, and what a compiler fuses by itself;
`token_losses` otherwise goes through the tokens in slices and keeps only each one's log-sum-exp and
the logits as the matrix product gave them.
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
    """loss_n = log sum_v e^z_nv - z_n,target, with z = hidden head^T;
    dloss_n / dz_nv = softmax(z_n)_v - [v = target]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, head)
        rows = max(1, SLICE_ELEMENTS // head.shape[0])
        normalisers = torch.cat([_widen(part).logsumexp(-1) for part in logits.split(rows)])
        used = targets != IGNORE
        chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(hidden, head, targets, logits, normalisers)
        ctx.rows = rows
        return torch.where(used, normalisers - chosen, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, head, targets, logits, normalisers = ctx.saved_tensors
        weights = torch.where(targets != IGNORE, grad, 0.0).unsqueeze(-1)
        grad_logits = torch.empty_like(logits)
        slices = (x.split(ctx.rows) for x in (logits, normalisers, weights, targets, grad_logits))
        for part, normaliser, weight, target, out in zip(*slices, strict=True):
            share = (_widen(part) - normaliser.unsqueeze(-1)).exp_().mul_(weight)
            share.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), -weight)
            out.copy_(share)
        return grad_logits @ head, grad_logits.T @ hidden, None


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
