"""Attention of one token of each row over the row's chunk and history, as Triton kernels.

Keys are cut into splits, which are read side by side: a head of a single row alone would keep one
multiprocessor busy, and the others idle. A second kernel joins what the splits have read. Keys that
the token does not see are not read.

History is read as keys and values, or as the sub-latents that these would be made of. Sub-latents
are the same for all heads, so they are fewer bytes: a query goes through the matrix that makes keys
of sub-latents, and the softmax's sum of sub-latents through the one that makes values (multi-head
latent attention: DeepSeek-AI, 2024, arXiv:2405.04434). A slot is added to keys and values after
that matrix. So it is a logit of the query, and its sum of shares has a value.

Notation: B rows, H heads, D channels of a head with padding, C history chunks, M keys of each, T
tokens of a chunk, S = C M + T keys, R channels of a sub-latent, Y channels of a token's projection.
`attend_step` in `i3dist.inference.steps` is the same in PyTorch.
"""

# Kernels are untyped.
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops.attention import NEVER
from i3dist.ops.rows_triton import _start_next, early
from i3dist.ops.triton_keys import compute_keys

TILE = 32  # keys that a program reads at once; of 64 a thread's registers do not hold its part
STAGES = 3  # tiles that are on their way or in use
FEW = 4  # rows up to which splits are short, and history is read as keys
SHORT, LONG = 64, 256  # least keys of a split
MOST_SPLITS = 32  # about, of all keys: one program joins them
LEAST_DOT = 16  # rows and columns of a product on matrix units
MOST_SUMS = 5_120  # of channels, of all heads, that the registers of a program hold
# Of a tile: shared memory of a GPU since 2020 (99 KiB or more) has room for two, and for queries.
MOST_BYTES = 40_960


class Latents(NamedTuple):
    """How sub-latents are read."""

    tile: int  # of a chunk's, by a program
    chunks: int  # by a program, one after the other; more where there are many
    warps: int  # of a program
    stages: int  # tiles that are on their way or in use


LATENTS = Latents(64, 4, 4, 3)
# What `_join` is told where there are none.
NO_LATENTS = {"R": 0, "M": 0} | dict.fromkeys(
    ("WIDE", "SLOTS", "N", "PARTS", "CUTS", "PARTS_ROOM"), 1
)

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


class History(NamedTuple):
    """Sub-latents, and what makes keys and values of them."""

    latents: Tensor  # [B, C, M, R], chunks as a ring
    absorb: Tensor  # [H, D, R + M], keys of sub-latents' channels, then of slots
    unfold: Tensor  # [H, R + M, D], values of the same


@triton.jit
def _attend(
    y, keys, values, age_bias, count, start, opened, depth, oldest, partial, scale, Y,
    H: tl.constexpr, D: tl.constexpr, POWER: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr, PAST: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, LEAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What a head reads of one split: the largest logit, the softmax's denominator, and the sum of
    values. The first split of the chunk also reads the token itself, and keeps it."""
    split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, POWER)
    there, own, first = channel < D, split >= PAST, split == PAST
    _start_next(EARLY)
    position, begin = tl.load(count + b).to(tl.int32) - 1, tl.load(start + b).to(tl.int32)
    asked = y + b * Y + h * D + channel
    query = tl.load(asked, channel < FIRST, 0.0).to(tl.float32)
    key = tl.load(asked + H * D, there, 0.0)
    value = tl.load(asked + 2 * H * D, there, 0.0)
    keys += (b * H + h).to(tl.int64) * (C * M + T) * D
    values += (b * H + h).to(tl.int64) * (C * M + T) * D
    place = (C * M + position) * D + channel
    tl.store(keys + place, key, there & first)
    tl.store(values + place, value, there & first)
    if PAST:
        reach = tl.where(tl.load(opened + b) != 0, 0, tl.load(depth + b).to(tl.int32))
        turn = tl.load(oldest + b).to(tl.int32)
    start_of = tl.where(own, C * M + (split - PAST) * SPLIT, split * SPLIT)
    end = tl.minimum(start_of + SPLIT, tl.where(own, C * M + T, C * M))
    # Each of the N keys of a tile has its own running softmax: threads need not meet in the loop.
    most = tl.full([N], LEAST, tl.float32)
    total, mixed = tl.zeros([N], tl.float32), tl.zeros([N, POWER], tl.float32)
    for offset in tl.range(0, SPLIT, N, num_stages=STAGES):
        number = start_of + offset + tl.arange(0, N)
        token = number - C * M
        seen = (token >= begin) & (token < position)
        if PAST:
            nth = (number // M - turn + C) % C  # nth chunk, the oldest first
            seen = tl.where(own, seen, C - nth <= reach)
        seen = seen & (number < end)
        where, mask = number[:, None] * D + channel[None, :], seen[:, None] & there[None, :]
        k = tl.load(keys + where, mask, 0.0).to(tl.float32)
        v = tl.load(values + where, mask, 0.0).to(tl.float32)
        logits = tl.sum(k * query[None, :], axis=1) * scale
        if PAST:
            aged = seen & (split < PAST)
            logits += tl.load(y + b * Y + h * D + FIRST + nth, aged, 0.0).to(tl.float32)
            logits += tl.load(age_bias + h * C + nth, aged, 0.0).to(tl.float32)
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(most, logits)
        kept, shares = tl.exp(most - higher), tl.exp(logits - higher)
        total = total * kept + shares
        mixed = mixed * kept[:, None] + shares[:, None] * v
        most = higher
    itself = tl.where(first, tl.sum(query * key.to(tl.float32)) * scale, LEAST)
    highest = tl.maximum(tl.max(most), itself)
    shares, share = tl.exp(most - highest), tl.where(first, tl.exp(itself - highest), 0.0)
    mixed = tl.sum(mixed * shares[:, None], axis=0) + share * value.to(tl.float32)
    place = partial + ((b * H + h) * SPLITS + split) * (D + 2)
    tl.store(place + channel, mixed, there)
    tl.store(place + D, highest)
    tl.store(place + D + 1, tl.sum(total * shares) + share)


@triton.jit
def _attend_latents(
    asked, latents, y, age_bias, opened, depth, oldest, partial, scale, B, Y,
    H: tl.constexpr, ROOM: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, N: tl.constexpr,
    EACH: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, LEAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """What all heads read of N slots in EACH chunks: sums of sub-latents and of each slot's shares,
    the largest logit, and the softmax's denominator. R channels are WIDE and some of REST."""
    block, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, slot = tl.arange(0, ROOM), block * N + tl.arange(0, N)
    wide, rest = tl.arange(0, WIDE)[None, :], WIDE + tl.arange(0, REST)[None, :]
    there, slotted = (head < H)[:, None], slot < M
    _start_next(EARLY)
    reach = tl.where(tl.load(opened + b) != 0, 0, tl.load(depth + b).to(tl.int32))
    turn = tl.load(oldest + b).to(tl.int32)
    place = asked + (head[:, None] * B + b) * (R + M)
    query = tl.load(place + wide, there, 0.0)
    query_rest = tl.load(place + rest, there & (rest < R), 0.0)
    bias = tl.load(place + R + slot[None, :], there & slotted[None, :], 0.0).to(tl.float32)
    most, total = tl.full([ROOM], LEAST, tl.float32), tl.zeros([ROOM], tl.float32)
    slots = tl.zeros([ROOM, N], tl.float32)
    mixed, mixed_rest = tl.zeros([ROOM, WIDE], tl.float32), tl.zeros([ROOM, REST], tl.float32)
    for i in tl.range(0, EACH, num_stages=STAGES):
        chunk = split * EACH + i
        nth = (chunk - turn + C) % C  # the oldest first
        seen = (chunk < C) & (C - nth <= reach)
        mask = slotted & seen
        of = latents + ((b * C + chunk).to(tl.int64) * M + slot[:, None]) * R
        key = tl.load(of + wide, mask[:, None], 0.0)
        key_rest = tl.load(of + rest, mask[:, None] & (rest < R), 0.0)
        age = tl.load(y + b * Y + head * D + FIRST + nth, (head < H) & seen, 0.0).to(tl.float32)
        age += tl.load(age_bias + head * C + nth, (head < H) & seen, 0.0).to(tl.float32)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        logits = tl.dot(query_rest, tl.trans(key_rest), logits, input_precision="ieee")
        logits = (logits + bias) * scale + age[:, None]
        logits = tl.where(mask[None, :], logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, axis=1))
        kept, shares = tl.exp(most - higher), tl.exp(logits - higher[:, None])
        total, most = total * kept + tl.sum(shares, axis=1), higher
        slots = slots * kept[:, None] + shares
        low = shares.to(key.dtype)
        mixed = tl.dot(low, key, mixed * kept[:, None], input_precision="ieee")
        mixed_rest = tl.dot(low, key_rest, mixed_rest * kept[:, None], input_precision="ieee")
    part = block * SPLITS + split
    place = partial + ((head * B + b) * tl.num_programs(0) * SPLITS + part) * (R + N + 2)
    tl.store(place[:, None] + wide, mixed, there)
    tl.store(place[:, None] + rest, mixed_rest, there & (rest < R))
    tl.store(place[:, None] + R + tl.arange(0, N)[None, :], slots, there)
    tl.store(place + R + N, most, head < H)
    tl.store(place + R + N + 1, total, head < H)


@triton.jit
def _of_branch(mixed, most, total, mask, LEAST: tl.constexpr):
    """Some splits as one: [POWER], and its largest logit and denominator."""
    highest = tl.max(tl.where(mask, most, LEAST))
    share = tl.where(mask, tl.exp(most - highest), 0.0)
    return tl.sum(mixed * share[:, None], axis=0), highest, tl.sum(total * share)


@triton.jit
def _weigh(
    own_most, own_total, past_most, past_total, reserve, joined,
    APART: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """What the sums of values of chunk and history are multiplied by."""
    if APART:
        lead = past_most + tl.log(past_total) - own_most - tl.log(own_total)
        # Without history its total is 0, and the logarithm of that no number.
        share = tl.where(past_total > 0, 1.0 / (1.0 + tl.exp(reserve - lead)), 0.0)
        for_own = 1.0
        if JOINED:
            for_own -= share * joined
        for_own, for_past = for_own / own_total, share / tl.where(past_total > 0, past_total, 1.0)
    else:
        highest = tl.maximum(own_most, past_most)
        for_own, for_past = tl.exp(own_most - highest), tl.exp(past_most - highest)
        whole = own_total * for_own + past_total * for_past
        for_own, for_past = for_own / whole, for_past / whole
    return for_own, for_past


@triton.jit
def _join(
    partial, of_latents, y, reserve_bias, joined, out, weighted, B, Y,
    H: tl.constexpr, D: tl.constexpr, POWER: tl.constexpr, PAST: tl.constexpr,
    SPLITS: tl.constexpr, ROOM: tl.constexpr, APART: tl.constexpr, JOINED: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr,
    PARTS: tl.constexpr, CUTS: tl.constexpr, PARTS_ROOM: tl.constexpr, LEAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """What a head has read of chunk and history. With sub-latents, of which PARTS programs have
    read some, CUTS of each slot, that of the chunk alone; those and slots become `weighted`."""
    h, b = tl.program_id(0), tl.program_id(1)
    split, channel = tl.arange(0, ROOM), tl.arange(0, POWER)
    there = split < SPLITS
    _start_next(EARLY)
    place = partial + ((b * H + h) * SPLITS + split) * (D + 2)
    mask = there[:, None] & (channel < D)[None, :]
    mixed = tl.load(place[:, None] + channel[None, :], mask, 0.0)
    most, total = tl.load(place + D, there, LEAST), tl.load(place + D + 1, there, 0.0)
    own, own_most, own_total = _of_branch(mixed, most, total, there & (split >= PAST), LEAST)
    if R:
        part, wide = tl.arange(0, PARTS_ROOM), tl.arange(0, WIDE)
        parted = part < PARTS
        of_latents += (h * B + b) * PARTS * (R + N + 2)
        place = of_latents + part * (R + N + 2)
        mixed = tl.load(place[:, None] + wide[None, :], parted[:, None] & (wide < R)[None, :], 0.0)
        most = tl.load(place + R + N, parted, LEAST)
        total = tl.load(place + R + N + 1, parted, 0.0)
        past, past_most, past_total = _of_branch(mixed, most, total, parted, LEAST)
    else:
        past, past_most, past_total = _of_branch(mixed, most, total, split < PAST, LEAST)
    reserve, share = 0.0, 0.0
    if APART:
        reserve = tl.load(y + b * Y + 3 * H * D + h).to(tl.float32) + tl.load(reserve_bias + h)
        if JOINED:
            share = tl.load(joined)
    for_own, for_past = _weigh(
        own_most, own_total, past_most, past_total, reserve, share, APART, JOINED
    )
    read = own * for_own
    if R:
        weighted += (h * B + b) * (R + M)
        tl.store(weighted + wide, (past * for_past).to(out.dtype.element_ty), wide < R)
        slot, cut = tl.arange(0, SLOTS), tl.arange(0, PARTS_ROOM)
        mask = (cut < CUTS)[:, None] & (slot < M)[None, :]
        place = of_latents + (slot[None, :] // N * CUTS + cut[:, None]) * (R + N + 2) + R
        shares = tl.load(place + slot[None, :] % N, mask, 0.0)
        shares *= tl.exp(tl.load(place + N, mask, LEAST) - past_most)
        shares = tl.sum(shares, axis=0) * for_past
        tl.store(weighted + R + slot, shares.to(out.dtype.element_ty), slot < M)
    else:
        read += past * for_past
    tl.store(out + (b * H + h) * D + channel, read.to(out.dtype.element_ty), channel < D)


class _Splits(NamedTuple):
    """How keys of a buffer [B, H, S, D] are cut."""

    span: int  # keys of a split
    past: int  # splits of history
    whole: int  # number of all

    @classmethod
    def of(cls, keys: Tensor, length: int) -> "_Splits":
        """Of keys whose last `length` are the chunk's."""
        rows, _, size, _ = keys.shape
        least = SHORT if rows <= FEW else LONG
        span = max(least, triton.next_power_of_2(triton.cdiv(size, MOST_SPLITS)))
        past = triton.cdiv(size - length, span)
        return cls(span, past, past + triton.cdiv(length, span))


def attend(
    y: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Place,
    parts: Heads,
    history: History | None = None,
) -> Tensor:
    """What attention reads for one token of each row, [B, H D]; adds the token to its chunk.

    Args:
        y: [B, Y], what the token projects to: queries, keys and values [H, D] each, then reserves
            [H] where there are two softmaxes.
        keys: [B, H, S, D]; changes.
        values: the same.
        place: where the rows are, with this token counted.
        parts: of the attention.
        history: where it is sub-latents; keys and values are then the chunk's alone.
    """
    (rows, heads, size, channels), width = keys.shape, y.shape[1]
    splits, past = _Splits.of(keys, parts.length), size - parts.length
    power = triton.next_power_of_2(channels)
    sizes = {"H": heads, "D": channels, "POWER": power, "PAST": splits.past, "SPLITS": splits.whole}
    warps = {"num_warps": min(16, max(4, power * TILE // 1024)), "LEAST": NEVER, **early()}
    read = None if history is None else _read_latents(y, place, parts, history)
    partial = torch.empty(rows, heads, splits.whole, channels + 2, device=y.device)
    _attend[(splits.whole, heads, rows)](
        y, keys, values, parts.age_bias, *place, partial, parts.scale, width,
        FIRST=parts.channels, C=parts.chunks, M=past // parts.chunks, T=parts.length,
        SPLIT=splits.span, N=TILE, STAGES=_stages(power, keys.element_size()), **sizes, **warps,
    )  # fmt: skip
    out = y.new_empty(rows, heads * channels)
    bias, share = (y if part is None else part for part in (parts.reserve_bias, parts.joined))
    of_latents, weighted, numbers = (partial, out, NO_LATENTS) if read is None else read
    _join[(heads, rows)](
        partial, of_latents, y, bias, share, out, weighted, rows, width,
        ROOM=triton.next_power_of_2(splits.whole), APART=bias is not y, JOINED=share is not y,
        **numbers, **sizes, **warps,
    )  # fmt: skip
    if history is not None:
        by_head = out.view(rows, heads, channels).transpose(0, 1)
        by_head.baddbmm_(weighted, history.unfold)
    return out


def reads_latents(rows: int, heads: int, channels: int, size: int) -> bool:
    """Whether history is read as sub-latents of so many channels, of `size` bytes each."""
    room, held = max(LEAST_DOT, triton.next_power_of_2(heads)), sum(_cut(channels))
    fits = room * held <= MOST_SUMS and LATENTS.tile * held * size <= MOST_BYTES
    return rows > FEW and channels % LEAST_DOT == 0 and fits


def _stages(channels: int, size: int) -> int:
    """Tiles of keys and values that are on their way or in use, of a head's channels of `size`
    bytes each."""
    return min(STAGES, 1 + 2 * MOST_BYTES // (2 * TILE * channels * size))


def _cut(channels: int) -> tuple[int, int]:
    """Channels of sub-latents as powers of two, the last not full."""
    wide = 1 << (channels.bit_length() - 1)
    return wide, max(LEAST_DOT, triton.next_power_of_2(channels - wide))


def _programs(keys: int, chunks: int) -> tuple[int, int, int]:
    """Programs for a chunk's sub-latents, programs for chunks, and how many chunks each reads."""
    blocks = triton.cdiv(keys, LATENTS.tile)
    each = max(LATENTS.chunks, triton.cdiv(blocks * chunks, MOST_SPLITS))
    return blocks, triton.cdiv(chunks, each), each


def _read_latents(
    y: Tensor, place: Place, parts: Heads, history: History
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """What programs have read of history; room for what becomes of it, and sizes of both."""
    (rows, chunks, keys, channels), width = history.latents.shape, y.shape[1]
    heads, each = history.absorb.shape[:2]
    plan, (blocks, cuts, read_by_each) = LATENTS, _programs(keys, chunks)
    queries = y[:, : heads * each].view(rows, heads, each).transpose(0, 1)
    asked = torch.bmm(queries, history.absorb)  # [H, B, R + M]
    read = torch.empty(heads, rows, blocks * cuts, channels + plan.tile + 2, device=y.device)
    wide, rest = _cut(channels)
    _attend_latents[(blocks, cuts, rows)](
        asked, history.latents, y, parts.age_bias, *place[2:], read, parts.scale, rows, width,
        H=heads, ROOM=max(LEAST_DOT, triton.next_power_of_2(heads)), D=each, FIRST=parts.channels,
        C=chunks, M=keys, R=channels, WIDE=wide, REST=rest, N=plan.tile, EACH=read_by_each,
        SPLITS=cuts, STAGES=plan.stages, LEAST=NEVER, num_warps=plan.warps, **early(),
    )  # fmt: skip
    return read, torch.empty_like(asked), {
        "R": channels, "M": keys, "WIDE": triton.next_power_of_2(channels),
        "SLOTS": triton.next_power_of_2(keys), "N": plan.tile, "PARTS": blocks * cuts,
        "CUTS": cuts, "PARTS_ROOM": triton.next_power_of_2(blocks * cuts),
    }  # fmt: skip


compute_keys(globals())
