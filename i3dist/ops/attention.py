"""Attention over [latents of earlier chunks, tokens of this chunk], in the device's form.

Letters: N rows (chunks), H heads, T query tokens, S keys, C history chunks, M latents, D width.

What a query sees is decided once for all blocks and heads. `attention_bias` writes it out as a
matrix that is added to the logits: it reads like the rule, serves any device and any part of a
chunk, and is the oracle. `block_visibility` says the same as a rule over positions, from which a
fused kernel computes only the tiles where something is seen.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class BlockVisibility(NamedTuple):
    """Who sees what, for the fused kernel."""

    mask: BlockMask
    log_gate: Tensor  # scalar fp32, added to the logits of history
    history: int  # how many of the first keys are history


Visibility = Tensor | BlockVisibility


def attention_bias(own: Tensor, history: Tensor, gate: Tensor, latents: int) -> Tensor:
    """Additive bias on the logits of [history latents, own tokens]: [N, 1, T, C * M + S] fp32.

    Gate g adds log g to history, so g = 0 masks it out. A token always sees itself, so no row is
    masked completely.

    Args:
        own: [N, T, S] bool, which tokens of the chunk a query sees.
        history: [N, T, C] bool, which earlier chunks it sees, oldest first.
        gate: scalar g in [0, 1].
        latents: M.
    """
    never = torch.tensor(float("-inf"), device=own.device)
    past = torch.where(history, gate.float().log(), never).repeat_interleave(latents, dim=-1)
    return torch.cat([past, torch.where(own, 0.0, never)], dim=-1).unsqueeze(1)


def block_visibility(
    segments: Tensor, depth: Tensor, gate: Tensor, chunks: int, latents: int
) -> BlockVisibility:
    """The same for whole chunks, as a rule over positions.

    Args:
        segments: [N, T] from `segment_ids`.
        depth: [N] int, how many chunks before each belong to segment 0's document.
        gate: scalar g in [0, 1].
        chunks: C.
        latents: M.
    """
    rows, length = segments.shape
    history = chunks * latents

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        age = chunks - key // latents
        past = (segments[row, query] == 0) & (age <= depth[row])
        position = (key - history).clamp(min=0)
        own = (position <= query) & (segments[row, position] == segments[row, query])
        return torch.where(key < history, past, own)

    mask = _create_mask(segments.is_cuda)(
        sees, rows, None, length, history + length, device=segments.device
    )
    return BlockVisibility(mask, gate.float().log(), history)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, visible: Visibility, scale: float
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017) of what is visible.

    Args:
        query: [N, H, T, D/H].
        keys: [N, H, S, D/H].
        values: [N, H, S, D/H].
        visible: from `attention_bias`, or `block_visibility` in compiled code.
        scale: factor of the logits.
    """
    if isinstance(visible, Tensor):
        # On a CPU PyTorch's backward is faster in fp32 than in bf16.
        low = query.dtype == torch.bfloat16 and not query.is_cuda
        dtype = torch.float32 if low else query.dtype
        q, k, v, bias = (x.to(dtype) for x in (query, keys, values, visible))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return mixed.to(query.dtype)
    log_gate, history = visible.log_gate, visible.history

    def gated(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(key < history, score + log_gate, score)

    return flex_attention(
        query,
        keys,
        values,
        score_mod=gated if history else None,
        block_mask=visible.mask,
        scale=scale,
    )


@functools.cache
def _create_mask(fused: bool) -> Callable[..., BlockMask]:
    """The mask's constructor, compiled where a GPU would otherwise run a kernel for each term."""
    return torch.compile(create_block_mask, dynamic=False) if fused else create_block_mask
