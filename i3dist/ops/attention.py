"""Attention over [latents of earlier chunks, tokens of this chunk], in the device's form.

`attend` has one softmax over both. `attend_apart` has one for each, and returns how much there was
to attend to in each, so that a layer can weigh one against the other.

Notation: B lanes, K chunks of a window, N = B x K, H heads, T query tokens, S own keys, C history
chunks, M keys of an earlier chunk, D channels of all heads.

What a query sees is decided once for all blocks and heads, in one of two forms. `attention_bias`
is a matrix that is added to the logits: it works on any device and for any part of a chunk, and is
the oracle. `block_visibility` is a rule over the positions of a whole lane: a fused kernel computes
only the tiles where the rule sees something. A chunk and the next share most of their history; the
fused form never copies it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from i3dist.ops.compiled import Compiled
from i3dist.ops.order import true_first
from i3dist.ops.precision import widen

TILE = 128  # queries, and keys, of a tile of the fused kernel
NEVER = -1e9  # a logit without weight; a row of them has a softmax and a gradient, one of -inf none


class Window(NamedTuple):
    """Whole chunks of some lanes, and the size of what they see of the past."""

    segments: Tensor  # [B, K, T] from `segment_ids`
    depth: Tensor  # [B, K] int, how many chunks before each belong to segment 0's document
    chunks: int  # C
    keys_per_chunk: int  # M; 0 without history

    @property
    def history(self) -> int:
        """Keys of history, of the C chunks before the window and of all of its own."""
        return (self.chunks + self.segments.shape[1]) * self.keys_per_chunk


class BlockVisibility(NamedTuple):
    """What each query sees, for the fused kernel."""

    mask: BlockMask
    log_gate: Tensor  # scalar fp32, added to the logits of history
    history: int  # number of history keys; they precede a lane's own keys


class ApartVisibility(NamedTuple):
    """What each query sees in each of two softmaxes, for the fused kernel."""

    own: BlockVisibility
    past: BlockVisibility


Visibility = Tensor | BlockVisibility | ApartVisibility


class KeysValues(NamedTuple):
    """What attention reads, heads side by side."""

    keys: Tensor  # [..., S, D]
    values: Tensor  # [..., S, D]


class Branch(NamedTuple):
    """What queries read through one softmax, and its denominator."""

    mixed: Tensor  # [B, K, T, D]; any finite numbers where nothing is seen
    total: Tensor  # [B, K, T, H] fp32, log of the sum of e^logit; about `NEVER`, or -inf, of none


def attention_bias(own: Tensor, history: Tensor, gate: Tensor, keys_per_chunk: int) -> Tensor:
    """Additive bias on the logits of [keys of history, own tokens]: [N, 1, T, C * M + S] fp32.

    Gate g adds log g to history, so g = 0 masks it out. A token always sees itself, so no row is
    masked completely.

    Args:
        own: [N, T, S] bool, which tokens of the chunk a query sees.
        history: [N, T, C] bool, which earlier chunks it sees, oldest first.
        gate: scalar g in [0, 1].
        keys_per_chunk: M.
    """
    never = torch.tensor(float("-inf"), device=own.device)
    past = torch.where(history, gate.float().log(), never).repeat_interleave(keys_per_chunk, dim=-1)
    return torch.cat([past, torch.where(own, 0.0, never)], dim=-1).unsqueeze(1)


def block_visibility(window: Window, gate: Tensor) -> BlockVisibility:
    """The same as a rule over the positions of whole lanes; gate is a scalar g in [0, 1]."""
    segments, depth, chunks, keys_per_chunk = window
    length = segments.shape[2]
    history, per_chunk = window.history, max(1, keys_per_chunk)
    segment, reach = segments.flatten(1), depth.clamp(max=chunks)

    def sees(lane: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        chunk = query // length
        age = chunks + chunk - key // per_chunk
        past = (segment[lane, query] == 0) & (age >= 1) & (age <= reach[lane, chunk])
        position = (key - history).clamp(min=0)
        own = (position <= query) & (position // length == chunk)
        own = own & (segment[lane, position] == segment[lane, query])
        return torch.where(key < history, past, own)

    mask = block_mask(sees, window)
    return BlockVisibility(mask, gate.float().log(), history)


def apart_visibility(window: Window, gate: Tensor) -> ApartVisibility:
    """The same for two softmaxes, each over keys of one sort only; gate is a scalar g in [0, 1]."""
    segments, depth, chunks, keys_per_chunk = window
    length = segments.shape[2]
    segment, reach = segments.flatten(1), depth.clamp(max=chunks)

    def sees(lane: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        chunk = query // length
        age = chunks + chunk - key // keys_per_chunk
        return (segment[lane, query] == 0) & (age >= 1) & (age <= reach[lane, chunk])

    own = block_visibility(window._replace(keys_per_chunk=0), gate)
    mask = block_mask(sees, window, own=False)
    return ApartVisibility(own, BlockVisibility(mask, gate.float().log(), window.history))


def keys_seen(window: Window, own: bool = True) -> Tensor:
    """How many keys of each tile a query sees: [B, K * T, tiles of keys].

    A query sees two runs of keys, so no single key needs testing: the history keys just before its
    chunk, and in its chunk the keys from its document's start up to itself. The second run only
    with `own`; without it there are no keys of tokens.
    """
    segments, depth, chunks, keys_per_chunk = window
    count, length = segments.shape[1:]
    history = window.history
    chunk = torch.arange(count, device=segments.device).unsqueeze(-1)  # [K, 1]
    reach = depth.clamp(max=chunks).unsqueeze(-1) * (segments == 0)  # [B, K, T]
    past = (chunks + chunk) * keys_per_chunk
    runs = [(past - reach * keys_per_chunk, past)]
    if own:
        start = history + chunk * length
        place = torch.arange(length, device=segments.device)
        document = torch.searchsorted(segments, segments)  # ids rise: this is where each begins
        runs.append((start + document, start + place + 1))
    first = torch.arange(0, history + own * count * length, TILE, device=segments.device)
    seen = torch.zeros((), dtype=torch.int64, device=segments.device)
    for start, end in runs:
        start, end = (x.expand(segments.shape).flatten(1).unsqueeze(-1) for x in (start, end))
        seen = seen + (end.minimum(first + TILE) - start.maximum(first)).clamp(min=0)
    return seen


def block_mask(rule: Callable[..., Tensor], window: Window, own: bool = True) -> BlockMask:
    """The tiles in which something is seen, with `rule` for those that are seen in part.

    Equals PyTorch's `create_block_mask` of the rule, which evaluates it for every query and key.

    Args:
        rule: whether (lane, head, query, key), int tensors of one shape, is seen: bool of that
            shape. It must agree with `keys_seen`.
        window: what the rule is about.
        own: whether there are keys of tokens, after those of history.
    """
    compiled = window.segments.is_cuda
    tiles = (_compiled_tiles() if compiled else tiles_seen)(window, own)
    queries = window.segments[0].numel()
    lengths = (queries, window.history + own * queries)
    make: Callable[..., BlockMask] = BlockMask
    return make(lengths, *tiles, BLOCK_SIZE=(TILE, TILE), mask_mod=rule)


def tiles_seen(window: Window, own: bool = True) -> tuple[Tensor, ...]:
    """The tiles of `block_mask`: by query those seen in part, then those seen as a whole, and the
    same by key. Of each the two tensors of `_listed`."""
    seen = keys_seen(window, own)
    tiles = F.pad(seen, (0, 0, 0, -seen.shape[1] % TILE)).unflatten(1, (-1, TILE))
    whole = tiles.amin(2) == TILE
    partly = (tiles.amax(2) > 0) & ~whole
    of_each = (_listed(x) for x in (partly, whole, partly.mT, whole.mT))
    return tuple(part for parts in of_each for part in parts)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[B, rows, columns] bool -> the number of true columns of each row [B, 1, rows], and the
    columns, true ones first [B, 1, rows, columns]; int32."""
    tiles = tiles.unsqueeze(1)
    return tiles.sum(-1, dtype=torch.int32), true_first(tiles).to(torch.int32)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., T, D] -> [..., H, T, D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """[..., H, T, D/H] -> [..., T, D]."""
    return x.transpose(-2, -3).flatten(-2)


def attend(
    query: Tensor,
    past: KeysValues,
    own: KeysValues,
    visible: Visibility,
    heads: int,
    scale: float,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017) of what is visible.

    Args:
        query: [B, K, T, D].
        past: of the C chunks before the window and of all of its own, [B, (C + K) * M, D], oldest
            first; chunk k of K sees chunks k to k + C - 1.
        own: of the chunk's tokens, [B, K, S, D].
        visible: from `attention_bias`, or `block_visibility` in compiled code.
        heads: H.
        scale: factor of the logits.
    """
    if isinstance(visible, Tensor):
        both = (
            seen_by_chunk(*parts, visible).flatten(0, 1) for parts in zip(past, own, strict=True)
        )
        q, k, v = (split_heads(x, heads) for x in (query.flatten(0, 1), *both))
        return merge_heads(_biased(q, k, v, visible, scale)).view_as(query)
    assert isinstance(visible, BlockVisibility)
    both = (torch.cat([p, o.flatten(1, 2)], dim=1) for p, o in zip(past, own, strict=True))
    q, k, v = (split_heads(x, heads) for x in (query.flatten(1, 2), *both))
    return merge_heads(_fused(q, k, v, visible, scale)).view_as(query)


def attend_apart(
    queries: tuple[Tensor, Tensor],
    past: KeysValues,
    own: KeysValues,
    visible: Visibility,
    heads: int,
    scale: float,
) -> tuple[Branch, Branch]:
    """Attention to the chunk's tokens, and to history, each with a softmax of its own.

    Args:
        queries: of the two, [B, K, T, D] each.
        past: as for `attend`, [B, (C + K) * M, D].
        own: as for `attend`, [B, K, S, D].
        visible: from `attention_bias`, or `apart_visibility` in compiled code.
        heads: H.
        scale: factor of the logits.
    """
    by_own, by_past = queries
    if isinstance(visible, ApartVisibility):
        tokens = KeysValues(*(part.flatten(1, 2) for part in own))
        return (
            _fused_branch(by_own, tokens, visible.own, heads, scale),
            _fused_branch(by_past, past, visible.past, heads, scale),
        )
    assert isinstance(visible, Tensor)
    size = visible.shape[-1] - own.keys.shape[2]
    chunks = KeysValues(*(history_by_chunk(part, own.keys.shape[1], size) for part in past))
    return (
        _biased_branch(by_own, own, visible[..., size:], heads, scale),
        _biased_branch(by_past, chunks, visible[..., :size], heads, scale),
    )


def seen_by_chunk(past: Tensor, own: Tensor, visible: Tensor) -> Tensor:
    """What each chunk of a window may see, history first.

    past [B, (C + K) * M, D], own [B, K, S, D], visible [..., C * M + S] -> [B, K, C * M + S, D].
    """
    size = visible.shape[-1] - own.shape[2]
    return torch.cat([history_by_chunk(past, own.shape[1], size), own], dim=2)


def history_by_chunk(past: Tensor, window: int, size: int) -> Tensor:
    """Of each of a window's K chunks: past [B, (C + K) * M, D] -> [B, K, C * M, D]; size C * M."""
    step = (past.shape[1] - size) // window
    # Slices, not `unfold`, whose gradient is summed by atomic additions on a GPU.
    return torch.stack([past[:, k * step : k * step + size] for k in range(window)], dim=1)


def _biased(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[N, H, T, D/H] of each chunk by itself."""
    # On a CPU the backward pass is faster in fp32 than in bf16.
    low = query.dtype == torch.bfloat16 and not query.is_cuda
    dtype = torch.float32 if low else query.dtype
    q, k, v, bias = (x.to(dtype) for x in (query, keys, values, bias))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return mixed.to(query.dtype)


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, visible: BlockVisibility, scale: float
) -> Tensor:
    """[B, H, K * T, D/H] of a whole lane."""
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


def _biased_branch(
    query: Tensor, read: KeysValues, bias: Tensor, heads: int, scale: float
) -> Branch:
    """One branch of each chunk by itself; read [B, K, S, D], bias [N, 1, T, S]."""
    q, k, v = (split_heads(x.flatten(0, 1), heads) for x in (query, *read))
    logits = widen(q @ k.transpose(-1, -2)).mul_(scale).add_(bias).clamp_(min=NEVER)
    shares = logits.softmax(-1)
    mixed = merge_heads(shares.to(v.dtype) @ v)
    if logits.requires_grad:
        total = logits.logsumexp(-1)
    else:  # the same from the largest logit's share, in a quarter of the time on a CPU
        total = logits.amax(-1) - shares.amax(-1).log()
    return Branch(mixed.view_as(query), _by_query(total, query))


def _fused_branch(
    query: Tensor, read: KeysValues, visible: BlockVisibility, heads: int, scale: float
) -> Branch:
    """One branch of a whole lane; read [B, S, D]."""
    q, k, v = (split_heads(x, heads) for x in (query.flatten(1, 2), *read))
    mixed, more = flex_attention(
        q, k, v, block_mask=visible.mask, scale=scale, return_aux=AuxRequest(lse=True)
    )
    assert more.lse is not None
    total = more.lse + visible.log_gate if visible.history else more.lse
    return Branch(merge_heads(mixed).view_as(query), _by_query(total, query))


def _by_query(total: Tensor, query: Tensor) -> Tensor:
    """[rows, H, queries] -> [B, K, T, H], with B, K and T as in the query."""
    return total.transpose(-2, -1).reshape(*query.shape[:3], -1)


@functools.cache
def _compiled_tiles() -> Callable[[Window, bool], tuple[Tensor, ...]]:
    """`tiles_seen`, which would otherwise run one kernel for each term."""
    return Compiled(tiles_seen)
