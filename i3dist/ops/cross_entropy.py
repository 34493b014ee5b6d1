"""Token losses from hidden states. Notation: N tokens, D width, V vocabulary.

Logits are the largest tensor of a step: N x V in fp32, ten times a block's activations at the
default size. `token_losses_naive` is the definition; a compiler fuses it by itself. Without a
compiler `token_losses` works on slices of the tokens and recomputes their logits in the backward
pass, which is cheaper than keeping them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from i3dist.ops.precision import multipliable, widen

IGNORE = -100  # a target that is not trained on

SLICE_ELEMENTS = 2**21  # logits of a slice: 8 MiB in fp32


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in nats, fp32 (fp64 of fp64); 0 where the target is `IGNORE`.

    Args:
        hidden: [..., D].
        head: [V, D] output projection.
        targets: [...] int64.
    """
    if torch.compiler.is_compiling():
        return token_losses_naive(hidden, head, targets)
    rows = multipliable(hidden).flatten(0, -2)
    losses = _SlicedLosses.apply(rows, multipliable(head), targets.flatten())
    return losses.view(targets.shape)


def token_losses_naive(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The definition; arguments and results are those of `token_losses`."""
    logits = widen(F.linear(multipliable(hidden), multipliable(head)))
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(targets.shape)


class _SlicedLosses(torch.autograd.Function):
    """loss_n = (max_n - z_n,target) + log sum_v e^(z_nv - max_n), with z = hidden head^T;
    dloss_n / dz_nv = softmax(z_n)_v - [v = target]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        ctx.rows = max(1, SLICE_ELEMENTS // head.shape[0])
        chosen = targets.clamp(min=0).unsqueeze(-1)
        losses, normalisers = [], []
        for h, target in zip(hidden.split(ctx.rows), chosen.split(ctx.rows), strict=True):
            z = widen(F.linear(h, head))
            peak = z.amax(-1, keepdim=True)
            own = peak - z.gather(-1, target)
            log_sum = z.sub_(peak).exp_().sum(-1, keepdim=True).log_()
            losses.append(own + log_sum)
            normalisers.append(torch.cat([peak, log_sum], dim=-1))
        ctx.save_for_backward(hidden, head, targets, torch.cat(normalisers))
        return torch.cat(losses).squeeze(-1).masked_fill_(targets == IGNORE, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, head, targets, normalisers = ctx.saved_tensors
        weights = grad.masked_fill(targets == IGNORE, 0.0).unsqueeze(-1)
        chosen = targets.clamp(min=0).unsqueeze(-1)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(widen(head))
        slices = (x.split(ctx.rows) for x in (hidden, normalisers, weights, chosen, grad_hidden))
        for h, normaliser, weight, target, out in zip(*slices, strict=True):
            peak, log_sum = normaliser.split(1, dim=-1)
            share = widen(F.linear(h, head)).sub_(peak).sub_(log_sum).exp_().mul_(weight)
            grad_z = share.scatter_add_(-1, target, -weight).to(h.dtype)
            torch.mm(grad_z, head, out=out)
            grad_head += grad_z.T @ h
        return grad_hidden, grad_head.to(head.dtype), None
