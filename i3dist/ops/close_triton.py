"""Closing a full chunk: what stands between the products of `RecordsCompressor`, as Triton kernels.

`i3dist.inference.closing` calls them. Kernels of PyTorch's operators would write a chunk's tokens
several times, and what is [S, T] in fp32 a dozen times.

Notation: B rows, G rows whose chunk is full, T tokens of a chunk, C history chunks, M latents, R
sub-latents of a latent, S = M R sub-latents of a chunk, D channels, P with padding, d and p those
of a sub-latent.
"""

# Kernels are untyped, and tuples of pieces grow.
# mypy: disable-error-code="no-untyped-def, assignment"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops.attend_triton import Place
from i3dist.ops.rows_triton import _round
from i3dist.ops.shift_mix import Norm
from i3dist.ops.step_triton import _normed, _row, _store
from i3dist.ops.triton_keys import compute_keys


class Plan(NamedTuple):
    """How `_prepare` reads tokens."""

    tokens: int  # of a program
    stages: int  # tokens that are on their way or in use
    width: int  # W
    warps: int  # of a program


PREPARE = Plan(8, 3, 256, 4)
COMPARED = 32  # scores that a program compares its tokens with at once
WEIGHED = 4  # sub-latents whose shares a program computes


@triton.jit
def _prepare(
    hidden, rows, start, norm_weight, norm_bias, router, normed, scores, T, D, eps,
    NOT_KEPT: tl.constexpr, EACH: tl.constexpr, STAGES: tl.constexpr, P: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """LayerNorm and router scores of EACH tokens; those that are not kept become 0, NOT_KEPT."""
    first, g = tl.program_id(0) * EACH, tl.program_id(1)
    slope, offset = _row(norm_weight, D, P, W), _row(norm_bias, D, P, W)
    weight = _row(router, D, P, W)
    row = tl.load(rows + g)
    begin = tl.load(start + row)
    hidden += row * T * P
    normed += g.to(tl.int64) * T * P
    for i in tl.range(0, EACH, num_stages=STAGES):
        t = first + i
        kept = (t >= begin) & (t < T)
        tokens = _row(hidden + t * P, tl.where(kept, D, 0), P, W)
        result, products = (), 0.0
        values = _normed(tokens, slope, offset, D, eps, hidden, W)
        for c in tl.static_range(len(values)):
            result += (tl.where(kept, values[c], 0.0),)
            products += values[c] * weight[c]
        _store(normed + t * P, result, P, W, t < T)
        tl.store(scores + g * T + t, tl.where(kept, tl.sum(products), NOT_KEPT), t < T)


@triton.jit
def _choose(scores, chosen, sizes, T, S, N: tl.constexpr, EACH: tl.constexpr):
    """The S tokens of a chunk with the highest scores, in order, and 2 sigmoid of these."""
    g = tl.program_id(0)
    scores += g * T
    token = tl.arange(0, N)
    score = tl.load(scores + token, token < T, float("-inf"))
    higher = tl.zeros([N], tl.int32)  # how many are, or are equal and before it
    for first in tl.range(0, N, EACH):
        other = first + tl.arange(0, EACH)
        others = tl.load(scores + other, other < T, float("-inf"))[None, :]
        before = (others == score[:, None]) & (other[None, :] < token[:, None])
        higher += tl.sum((before | (others > score[:, None])).to(tl.int32), axis=1)
    picked = (higher < S) & (token < T)
    number = tl.cumsum(picked.to(tl.int32)) - 1
    picked = picked & (number < S)  # NaN is higher than nothing
    tl.store(chosen + g * S + number, (g * T + token).to(tl.int64), picked)
    tl.store(sizes + g * S + number, 2.0 / (1.0 + tl.exp(-score)), picked)


@triton.jit
def _weigh(
    logits, chosen, rows, start, prior, shares, scale, S, T, EACH: tl.constexpr, N: tl.constexpr
):
    """The shares of a chunk's tokens in EACH sub-latents."""
    g = tl.program_id(1)
    number, t = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, N)
    there = (number < S)[:, None] & (t < T)[None, :]
    seen = ((t < T) & (t >= tl.load(start + tl.load(rows + g))))[None, :]
    at = (tl.load(chosen + g * S + number, number < S, 0) - g * T).to(tl.int32)
    distance = tl.abs(t[None, :] - at[:, None])
    place = (g * S + number).to(tl.int64)[:, None] * T + t[None, :]
    x = tl.load(logits + place, there, 0.0).to(tl.float32) * scale
    x += tl.load(prior + distance, there, 0.0)
    x = tl.where(seen, x, float("-inf"))
    x = tl.exp(x - tl.max(x, axis=1)[:, None])
    x = x / tl.sum(x, axis=1)[:, None]
    tl.store(shares + place, x.to(shares.dtype.element_ty), there)


@triton.jit
def _fold(
    read, queries, norm_weight, norm_bias, latents, normed, D, eps, M, R,
    PART: tl.constexpr, ROOM: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A latent of R sub-latents, plus its query; and its LayerNorm."""
    n = tl.program_id(0)
    row = ()
    for first in tl.static_range(0, P, W):
        channel = first + tl.arange(0, W)
        part, there = n * R + channel // PART, channel < D
        x = tl.load(read + part * ROOM + channel % PART, there, 0.0).to(tl.float32)
        x += tl.load(queries + n % M * D + channel, there, 0.0).to(tl.float32)
        row += (_round(x, latents),)
    slope, offset = _row(norm_weight, D, P, W), _row(norm_bias, D, P, W)
    _store(latents + n * P, row, P, W)
    _store(normed + n * P, _normed(row, slope, offset, D, eps, latents, W), P, W)


@triton.jit
def _finish(
    latents, branch, norm_weight, norm_bias, sizes, rows, oldest, ring, parts, eps, C, M, R,
    PART: tl.constexpr, ROOM: tl.constexpr, P: tl.constexpr, POWER: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """LayerNorm of a sub-latent of latents + branch, times its size, into the place of the oldest
    chunk: as a part of a latent, and with SPLIT as a sub-latent."""
    number = tl.program_id(0)
    n, r = number // R, number % R
    channel = tl.arange(0, POWER)
    there, place = channel < PART, n * P + r * PART + channel
    x = tl.load(latents + place, there, 0.0).to(tl.float32)
    x = _round(x + tl.load(branch + place, there, 0.0).to(tl.float32), latents)
    centred = tl.where(there, x - tl.sum(x) / PART, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / PART + eps)
    slope = tl.load(norm_weight + channel, there, 0.0).to(tl.float32)
    offset = tl.load(norm_bias + channel, there, 0.0).to(tl.float32)
    x = _round(centred * scale * slope + offset, latents)
    x = (x * _round(tl.load(sizes + number), latents)).to(latents.dtype.element_ty)
    row = tl.load(rows + n // M)
    chunk = row * C + tl.load(oldest + row)
    tl.store(ring + (chunk * M + n % M) * P + r * PART + channel, x, there)
    if SPLIT:
        tl.store(parts + ((chunk * M + n % M) * R + r) * ROOM + channel, x, there)


@triton.jit
def _begin(rows, position, start, opened, depth, oldest, G, C, N: tl.constexpr):
    """Moves rows to the start of their next chunk."""
    number = tl.arange(0, N)
    there = number < G
    row = tl.load(rows + number, there, 0)
    before, begun = tl.load(depth + row, there, 0), tl.load(opened + row, there, 0) != 0
    slot = tl.load(oldest + row, there, 0)
    tl.debug_barrier()  # all threads have read what changes: a row may be named twice
    tl.store(oldest + row, (slot + 1) % C, there)
    tl.store(depth + row, tl.where(begun, 1, before + 1), there)
    tl.store(position + row, 0, there)
    tl.store(start + row, 0, there)
    tl.store(opened + row, 0, there)


def prepare(
    hidden: Tensor, rows: Tensor, start: Tensor, norm: Norm, router: Tensor, not_kept: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm and router scores of rows' tokens.

    Args:
        hidden: [B, T, P].
        rows: [G] int64.
        start: [B] int64, each row's first token that is kept.
        norm: the LayerNorm.
        router: [P], what multiplies tokens.
        not_kept: score of tokens before the start.

    Returns:
        [G, T, P], 0 for tokens before the start, and scores [G, T] fp32.
    """
    (_, length, width), count = hidden.shape, len(rows)
    normed = hidden.new_empty(count, length, width)
    scores = hidden.new_empty(count, length, dtype=torch.float32)
    tokens, stages, at_once, warps = PREPARE
    _prepare[(triton.cdiv(length, tokens), count)](
        hidden, rows, start, norm.weight, norm.bias, router, normed, scores, length, norm.channels,
        norm.eps, NOT_KEPT=not_kept, EACH=tokens, STAGES=stages, P=width, W=at_once,
        num_warps=warps,
    )  # fmt: skip
    return normed, scores


def choose(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The S tokens with the highest of scores [G, T] fp32, of equal ones the first.

    Returns:
        Their numbers, in order, counted through all chunks, [G, S] int64; and 2 sigmoid(score),
        [G, S] fp32.
    """
    chunks, length = scores.shape
    chosen = torch.empty(chunks, count, dtype=torch.int64, device=scores.device)
    sizes = scores.new_empty(chunks, count)
    size = triton.next_power_of_2(length)
    _choose[(chunks,)](
        scores, chosen, sizes, length, count, N=size, EACH=min(size, COMPARED), num_warps=8
    )
    return chosen, sizes


def weigh(
    logits: Tensor, chosen: Tensor, rows: Tensor, start: Tensor, prior: Tensor, scale: float
) -> Tensor:
    """Shares of tokens in sub-latents, [G, S, T] in the type of logits; 0 before the start.

    Args:
        logits: [G, S, T], before they are scaled.
        chosen: [G, S] int64, as `choose` gives it.
        rows: [G] int64.
        start: [B] int64.
        prior: [T] fp32, logits by distance from the chosen token.
        scale: of the logits.
    """
    chunks, count, length = logits.shape
    shares = torch.empty_like(logits)
    _weigh[(triton.cdiv(count, WEIGHED), chunks)](
        logits, chosen, rows, start, prior, shares, scale, count, length, EACH=WEIGHED,
        N=triton.next_power_of_2(length), num_warps=4,
    )  # fmt: skip
    return shares


def fold(read: Tensor, queries: Tensor, norm: Norm, part: int) -> tuple[Tensor, Tensor]:
    """Latents of sub-latents, plus queries; and their LayerNorm: [G, M, P] each.

    Args:
        read: [G, S, p].
        queries: [M, D].
        norm: the LayerNorm.
        part: d.
    """
    (chunks, count, room), latents, width = read.shape, len(queries), len(norm.weight)
    folded, normed = (read.new_empty(chunks, latents, width) for _ in range(2))
    _fold[(chunks * latents,)](
        read, queries, norm.weight, norm.bias, folded, normed, norm.channels, norm.eps, latents,
        count // latents, PART=part, ROOM=room, P=width, W=512, num_warps=4,
    )  # fmt: skip
    return folded, normed


def finish(
    latents: Tensor, branch: Tensor, norm: Norm, sizes: Tensor, rows: Tensor, oldest: Tensor,
    ring: Tensor, parts: Tensor | None,
) -> None:  # fmt: skip
    """Write latents [G, M, P] + branch, normalised by sub-latents, in place of the oldest chunk.

    Args:
        latents: of rows' chunks.
        branch: as many, to be added.
        norm: of sub-latents, of d channels and p with padding.
        sizes: [G, S] fp32, which multiply sub-latents.
        rows: [G] int64.
        oldest: [B] int64, the slot of each row's oldest chunk.
        ring: [B, C, M, P]; changes.
        parts: the same as sub-latents, [B, C, S, p]; changes. None is not wanted.
    """
    (_, chunks, count, width), part = ring.shape, norm.channels
    each = sizes.shape[1] // count
    _finish[(sizes.numel(),)](
        latents, branch, norm.weight, norm.bias, sizes, rows, oldest, ring,
        ring if parts is None else parts, norm.eps, chunks, count, each, PART=part,
        ROOM=len(norm.weight), P=width, POWER=triton.next_power_of_2(part),
        SPLIT=parts is not None, num_warps=1,
    )  # fmt: skip


def begin(rows: Tensor, place: Place, chunks: int) -> None:
    """Move rows [G] int64 to the start of their next chunk: `Place.close`; `chunks` is C."""
    size = triton.next_power_of_2(len(rows))
    _begin[(1,)](rows, *place, len(rows), chunks, N=size, num_warps=4)


compute_keys(globals())
