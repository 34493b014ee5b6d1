"""Attention of one token of each row over the row's chunk and history, as Triton kernels.

Keys are cut into splits, which are read side by side: a head of a single row alone would keep one
multiprocessor busy, and the others idle. A second kernel joins what the splits have read. Keys that
the token does not see are not read.

Notation: B rows, H heads, D channels of a head with padding, C history chunks, M keys of each, T
tokens of a chunk, S = C M + T keys, Y channels that a token projects to. `attend_step` in
`i3dist.inference.steps` is the same in PyTorch.
"""

# Kernels are untyped.
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops.attention import NEVER
from i3dist.ops.step_triton import _start_next, early

TILE = 32  # keys that a program reads at once; of 64 a thread's registers do not hold its part
FEW = 4  # rows up to which splits are short
SHORT, LONG = 64, 256  # least keys of a split
MOST_SPLITS = 32  # about, of all keys: one program joins them


# Of each row, [B]: tokens of its chunk, the first that the newest sees, whether its document began
# in the chunk, chunks before of that document, and the slot of the oldest chunk in a ring of C.
Place = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Heads(NamedTuple):
    """What attention is made of."""

    heads: int  # H
    channels: int  # of a head, without those of ages and padding
    chunks: int  # C
    length: int  # T
    scale: float  # of the logits
    age_bias: Tensor  # [H C]
    reserve_bias: Tensor | None  # [H]; None has one softmax for chunk and history
    joined: Tensor | None  # scalar fp32, the share in which two softmaxes are one; None is 0


@triton.jit
def _attend(
    y, keys, values, age_bias, count, start, opened, depth, oldest, partial, scale, Y,
    H: tl.constexpr, D: tl.constexpr, POWER: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr, PAST: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What a head reads of one split: the largest logit, the softmax's denominator, and the sum of
    values. The first split of the chunk also reads the token itself, and keeps it."""
    split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, POWER)
    there, own, first = channel < D, split >= PAST, split == PAST
    _start_next(EARLY)
    position, begin = tl.load(count + b).to(tl.int32) - 1, tl.load(start + b).to(tl.int32)
    reach = tl.where(tl.load(opened + b) != 0, 0, tl.load(depth + b).to(tl.int32))
    turn = tl.load(oldest + b).to(tl.int32)
    asked = y + b * Y + h * D + channel
    query = tl.load(asked, channel < FIRST, 0.0).to(tl.float32)
    key = tl.load(asked + H * D, there, 0.0)
    value = tl.load(asked + 2 * H * D, there, 0.0)
    keys += (b * H + h).to(tl.int64) * (C * M + T) * D
    values += (b * H + h).to(tl.int64) * (C * M + T) * D
    place = (C * M + position) * D + channel
    tl.store(keys + place, key, there & first)
    tl.store(values + place, value, there & first)
    most = tl.where(first, tl.sum(query * key.to(tl.float32)) * scale, LEAST)
    total = tl.where(first, 1.0, 0.0)
    mixed = tl.where(first, value.to(tl.float32), 0.0)
    start_of = tl.where(own, C * M + (split - PAST) * SPLIT, split * SPLIT)
    end = tl.minimum(start_of + SPLIT, tl.where(own, C * M + T, C * M))
    for offset in range(0, SPLIT, N):
        number = start_of + offset + tl.arange(0, N)
        token, nth = number - C * M, (number // M - turn + C) % C  # nth chunk, the oldest first
        seen = tl.where(own, (token >= begin) & (token < position), C - nth <= reach)
        seen = seen & (number < end)
        where, mask = number[:, None] * D + channel[None, :], seen[:, None] & there[None, :]
        k = tl.load(keys + where, mask, 0.0).to(tl.float32)
        v = tl.load(values + where, mask, 0.0).to(tl.float32)
        aged = seen & (split < PAST)
        age = tl.load(y + b * Y + h * D + FIRST + nth, aged, 0.0).to(tl.float32)
        age += tl.load(age_bias + h * C + nth, aged, 0.0).to(tl.float32)
        logits = tl.sum(k * query[None, :], axis=1) * scale + age
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits))
        kept, shares = tl.exp(most - higher), tl.exp(logits - higher)
        total = total * kept + tl.sum(shares)
        mixed = mixed * kept + tl.sum(shares[:, None] * v, axis=0)
        most = higher
    place = partial + ((b * H + h) * SPLITS + split) * (D + 2)
    tl.store(place + channel, mixed, there)
    tl.store(place + D, most)
    tl.store(place + D + 1, total)


@triton.jit
def _of_branch(mixed, most, total, mask, LEAST: tl.constexpr):
    """Some splits as one: [POWER], and its largest logit and denominator."""
    highest = tl.max(tl.where(mask, most, LEAST))
    share = tl.where(mask, tl.exp(most - highest), 0.0)
    return tl.sum(mixed * share[:, None], axis=0), highest, tl.sum(total * share)


@triton.jit
def _join(
    partial, y, reserve_bias, joined, out, Y,
    H: tl.constexpr, D: tl.constexpr, POWER: tl.constexpr, PAST: tl.constexpr,
    SPLITS: tl.constexpr, ROOM: tl.constexpr, APART: tl.constexpr, JOINED: tl.constexpr,
    LEAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What a head has read of chunk and history."""
    h, b = tl.program_id(0), tl.program_id(1)
    split, channel = tl.arange(0, ROOM), tl.arange(0, POWER)
    there = split < SPLITS
    _start_next(EARLY)
    place = partial + ((b * H + h) * SPLITS + split) * (D + 2)
    mask = there[:, None] & (channel < D)[None, :]
    mixed = tl.load(place[:, None] + channel[None, :], mask, 0.0)
    most, total = tl.load(place + D, there, LEAST), tl.load(place + D + 1, there, 0.0)
    own, own_most, own_total = _of_branch(mixed, most, total, there & (split >= PAST), LEAST)
    past, past_most, past_total = _of_branch(mixed, most, total, split < PAST, LEAST)
    if APART:
        lead = past_most + tl.log(past_total) - own_most - tl.log(own_total)
        reserve = tl.load(y + b * Y + 3 * H * D + h).to(tl.float32) + tl.load(reserve_bias + h)
        share = 1.0 / (1.0 + tl.exp(reserve - lead))
        read = own / own_total
        added = past / past_total
        if JOINED:
            added -= read * tl.load(joined)
        # Without history its total is 0, and the logarithm of that no number.
        read += tl.where(past_total > 0, added * share, 0.0)
    else:
        highest = tl.maximum(own_most, past_most)
        for_own, for_past = tl.exp(own_most - highest), tl.exp(past_most - highest)
        read = (own * for_own + past * for_past) / (own_total * for_own + past_total * for_past)
    tl.store(out + (b * H + h) * D + channel, read.to(out.dtype.element_ty), channel < D)


def attend(y: Tensor, keys: Tensor, values: Tensor, place: Place, parts: Heads) -> Tensor:
    """What attention reads for one token of each row, [B, H D]; adds the token to its chunk.

    Args:
        y: [B, Y], what the token projects to: queries, keys and values [H, D] each, then reserves
            [H] where there are two softmaxes.
        keys: [B, H, S, D]; changes.
        values: the same.
        place: where the rows are, with this token counted.
        parts: of the attention.
    """
    (rows, heads, size, channels), width = keys.shape, y.shape[1]
    history = size - parts.length
    least = SHORT if rows <= FEW else LONG
    span = max(least, triton.next_power_of_2(triton.cdiv(size, MOST_SPLITS)))
    past = triton.cdiv(history, span)
    splits = past + triton.cdiv(parts.length, span)
    power = triton.next_power_of_2(channels)
    partial = torch.empty(rows, heads, splits, channels + 2, device=y.device)
    out = y.new_empty(rows, heads * channels)
    warps = {"num_warps": min(16, max(4, power * TILE // 1024)), **early()}
    sizes = {"H": heads, "D": channels, "POWER": power, "PAST": past, "SPLITS": splits}
    _attend[(splits, heads, rows)](
        y, keys, values, parts.age_bias, *place, partial, parts.scale, width,
        FIRST=parts.channels, C=parts.chunks, M=history // parts.chunks, T=parts.length,
        SPLIT=span, N=TILE, LEAST=NEVER, **sizes, **warps,
    )  # fmt: skip
    bias, share = (y if part is None else part for part in (parts.reserve_bias, parts.joined))
    _join[(heads, rows)](
        partial, y, bias, share, out, width, ROOM=triton.next_power_of_2(splits),
        APART=bias is not y, JOINED=share is not y, LEAST=NEVER, **sizes, **warps,
    )  # fmt: skip
    return out
