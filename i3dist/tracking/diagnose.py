"""What attention does with history while the model trains, and what latents hold.

Nothing here computes a gradient or changes a tensor, so training continues bit for bit the same.

Notation: B lanes, K chunks of a window, N = B x K, T tokens, C history chunks, S keys, H heads,
D width.
"""

import math

import torch
from torch import Tensor

from i3dist.model.attention import Attention, AttentionBlock, window_bias
from i3dist.model.lm import I3LM, Below
from i3dist.model.segments import chunks_seen, history_mask
from i3dist.model.state import LaneState
from i3dist.ops.attention import Window, seen_by_chunk, split_heads
from i3dist.ops.cross_entropy import IGNORE
from i3dist.ops.precision import widen
from i3dist.tracking.series import AGE


@torch.no_grad()
def diagnose(
    model: I3LM, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
) -> dict[str, float]:
    """Diagnose a window of B lanes; arguments are those of `I3LM.forward`, [B, K, T] and so on.

    Returns:
        Figures by name: ``attention_age_01`` and so on, see `attention_by_age`; ``effective_rank``
        of the latents of the window's chunks.
    """
    # A shape used once in a while is not worth compiling. As a decorator this would have every
    # process import torch's compiler.
    with torch.compiler.set_stance("force_eager"):
        below, _ = model.below(tokens, depth, state)
        used = targets != IGNORE
        latents = below.latents[:, model.settings.history_chunks :][used.any(-1)]
        shares = attention_by_age(model, below, used, gate).tolist()
        ages = {f"{AGE}{age:02d}": share for age, share in enumerate(shares, start=1)}
        rank = effective_rank(model.width.trim(latents).flatten(0, 1))
        return {**ages, "effective_rank": rank}


def attention_by_age(model: I3LM, below: Below, used: Tensor, gate: Tensor) -> Tensor:
    """Share of a query's attention that goes to the latents 1, 2, ... C chunks before its own.

    Where history has a softmax of its own, it is times the share with which history is added. Mean
    over blocks, heads and the queries that may see them; NaN if none may.

    Args:
        model: the model.
        below: the window.
        used: [B, K, T] bool, the queries that count.
        gate: scalar g in [0, 1] of history.

    Returns:
        [C] fp64, age 1 first.
    """
    segments, chunks = below.segments.flatten(0, 1), model.settings.history_chunks
    seen = history_mask(segments, below.depth.flatten(), chunks)
    window = Window(below.segments, below.depth, chunks, model.keys_per_chunk)
    bias = window_bias(window, gate)
    counted = seen & used.flatten(0, 1).unsqueeze(-1)  # [N, T, C]
    total = torch.zeros(chunks, dtype=torch.float64, device=bias.device)
    x, looked_at = below.x, 0
    shown = chunks_seen(below.segments, below.depth, chunks, gate)
    history = model.history(below.latents, shown)
    for block, past in zip(model.upper, history, strict=True):
        before = x
        x, own = block(x, past, None, bias)
        if not isinstance(block, AttentionBlock):
            continue
        looked_at += 1
        normed = block.norm_attention(before)
        queries = block.attention.queries(normed).flatten(0, 1)
        reserve = block.attention.reserve_of(normed).flatten(0, 1)
        keys = seen_by_chunk(past.keys, own.keys, bias).flatten(0, 1)
        # Chunk by chunk: a window's logits would be the largest tensor of all.
        for n, mask in enumerate(bias):
            mass = attention_mass(block.attention, queries[n], keys[n], mask, reserve[n], chunks)
            total += (mass[:, :chunks] * counted[n]).sum(0)
    return (total / (counted.sum((0, 1)) * looked_at)).flip(0)


def attention_mass(
    attention: Attention,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    reserve: Tensor,
    chunks: int,
) -> Tensor:
    """Shares of each query's attention: history by chunk, and the own chunk. Mean over heads.

    Args:
        attention: the block's attention.
        queries: [T, D].
        keys: [S, D], of C chunks and then of T tokens.
        bias: [1, T, S], from `attention_bias`.
        reserve: [T, H], taken off the logits of history.
        chunks: C.

    Returns:
        [T, C + 1] fp32: chunks of history, the oldest first, then the own chunk; rows sum to 1.
    """
    query, key = (split_heads(x, attention.heads) for x in (queries * attention.scale, keys))
    logits = widen(query @ key.transpose(-1, -2)) + bias
    size = len(keys) - len(queries)
    logits[..., :size] -= reserve.transpose(0, 1).unsqueeze(-1)
    past, own = logits.softmax(-1).mean(0).tensor_split([size], dim=-1)
    return torch.cat([past.unflatten(-1, (chunks, -1)).sum(-1), own.sum(-1, keepdim=True)], dim=-1)


def effective_rank(rows: Tensor) -> float:
    """Number of directions that rows [n, D] spread over: 1 to min(n, D); NaN if all are 0.

    exp of the entropy of the singular values, divided by their sum (Roy & Vetterli, 2007, "The
    effective rank: a measure of effective dimensionality", EUSIPCO).
    """
    if not (rows.isfinite().all() and rows.any()):
        return math.nan
    values = torch.linalg.svdvals(rows.double())
    return float(torch.special.entr(values / values.sum()).sum().exp())
