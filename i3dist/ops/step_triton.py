"""A layer for one token of each row, as Triton kernels: the CUDA form of a decoding step.

A step of a single row reads each weight once, and takes as long as the weights take to arrive, if
nothing stands between its products. So every program of a product computes what stands before it
(LayerNorm, token shift, mixes) once more, while its weights are on their way, and what stands after
it (WKV, activations, gates, the residual stream) is computed by the program that has the results.
An RWKV layer is four such kernels. With several rows that would be too much work for each program.
So what stands before a product is a kernel of its own, of a program for each row; a product whose
outputs are few is cut along its inputs, and the next kernel adds the parts.

Notation: B rows, P channels with padding, F hidden channels, N outputs of a program. A row is a
tuple of pieces of W channels, because Triton's tensors are powers of two long.
`i3dist.inference.steps` has the same steps in PyTorch.
"""

# Kernels are untyped, and tuples of pieces grow.
# mypy: disable-error-code="no-untyped-def, assignment"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops.rows_triton import (
    CHANNEL_MIX,
    GELU,
    NONE,
    PARTS,
    _round,
    _start_next,
    early,
    rows_product,
)
from i3dist.ops.shift_mix import Norm
from i3dist.ops.triton_keys import compute_keys
from i3dist.ops.wkv_naive import EMPTY_MAXIMUM, MAX_SLIP

# Token shift: the normalised tokens before, [B, P], which change; whether nothing stands before,
# [B] bool; the share of the token in each of M inputs, [M, P].
Shift = tuple[Tensor, Tensor, Tensor]


class Plan(NamedTuple):
    """How a product is spread over the device."""

    outputs: int  # N
    width: int  # W
    warps: int  # of a program


class Residual(NamedTuple):
    """The residual stream: x + gate * the sum of parts, which the next kernel computes."""

    x: Tensor  # [B, P]
    parts: Tensor | None = None  # [cuts, B, P] of a product; fp32, or one of x's dtype
    gate: Tensor | None = None  # [B, P], its rows at any distance


# The fastest of 12 to 18 on an H200.
TIME_MIX, NORMED_PRODUCT, ADD_PRODUCT = Plan(8, 256, 4), Plan(16, 256, 4), Plan(8, 1024, 4)
# Of several rows: channels at once, and warps.
NORM_MIX, WKV_ROWS = (2048, 16), (256, 4)


@triton.jit
def _row(pointer, limit, P: tl.constexpr, W: tl.constexpr):
    """A row in fp32; 0 from channel `limit` on."""
    row = ()
    for first in tl.static_range(0, P, W):
        channel = first + tl.arange(0, W)
        row += (tl.load(pointer + channel, mask=channel < limit, other=0.0).to(tl.float32),)
    return row


@triton.jit
def _store(pointer, row, P: tl.constexpr, W: tl.constexpr, when=True):
    for c in tl.static_range(len(row)):
        channel = c * W + tl.arange(0, W)
        tl.store(pointer + channel, row[c].to(pointer.dtype.element_ty), (channel < P) & when)


@triton.jit
def _normed(row, slope, offset, D, eps, x, W: tl.constexpr):
    """LayerNorm of a row, rounded."""
    # Pieces are added before threads add theirs: these must wait for each other.
    total, squares = 0.0, 0.0
    for c in tl.static_range(len(row)):
        total += row[c]
    mean = tl.sum(total) / D
    centred = ()
    for c in tl.static_range(len(row)):
        centred += (tl.where(c * W + tl.arange(0, W) < D, row[c] - mean, 0.0),)
        squares += centred[c] * centred[c]
    scale = 1.0 / tl.sqrt(tl.sum(squares) / D + eps)
    normed = ()
    for c in tl.static_range(len(row)):
        normed += (_round(centred[c] * scale * slope[c] + offset[c], x),)
    return normed


@triton.jit
def _mixed(normed, before, share, x):
    """A row mixed with the one before, rounded."""
    mixed = ()
    for c in tl.static_range(len(normed)):
        mixed += (_round(before[c] + share[c] * (normed[c] - before[c]), x),)
    return mixed


@triton.jit
def _weights(weight, first, rows, N: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """Rows first, first + 1, ... of a matrix [rows, P], in pieces [N, W]."""
    pieces = ()
    for start in tl.static_range(0, P, W):
        output, column = first + tl.arange(0, N)[:, None], start + tl.arange(0, W)[None, :]
        there = (output < rows) & (column < P)
        pieces += (tl.load(weight + output * P + column, mask=there, other=0.0),)
    return pieces


@triton.jit
def _product(weights, row, x, N: tl.constexpr, W: tl.constexpr):
    """Pieces [N, W] times a row: [N], rounded."""
    total = tl.zeros([N, W], tl.float32)
    for c in tl.static_range(len(row)):
        total += weights[c].to(tl.float32) * row[c][None, :]
    return _round(tl.sum(total, axis=1), x)


@triton.jit
def _wkv(k, v, r, w, u, place, begins, there, EMPTY: tl.constexpr, SLIP: tl.constexpr, P):
    """sigmoid(r) WKV of a token; its state is at `place`, and changes."""
    a = tl.where(begins, 0.0, tl.load(place, there, 0.0))
    b = tl.where(begins, 0.0, tl.load(place + P, there, 0.0))
    m = tl.where(begins, EMPTY, tl.load(place + 2 * P, there, 0.0))
    top = tl.maximum(m, u + k)
    past, present = tl.exp(m - top), tl.exp(u + k - top)
    read = (past * a + present * v) / (past * b + present)
    aged = w + m
    slip = tl.minimum(tl.maximum((m - aged) + w, -SLIP), SLIP)
    top = tl.maximum(aged, k)
    past, present = tl.exp(aged - top + slip), tl.exp(k - top)
    tl.store(place, past * a + present * v, there)
    tl.store(place + P, past * b + present, there)
    tl.store(place + 2 * P, top, there)
    return read / (1.0 + tl.exp(-r))


@triton.jit
def _time_mix(
    x, norm_weight, norm_bias, D, eps, before, restart, mixes, projections, decay, bonus, state,
    y, fresh, EMPTY: tl.constexpr, SLIP: tl.constexpr, EARLY: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """sigmoid(r) WKV of N channels of a single row, and their state; `fresh` becomes the normalised
    row."""
    first = tl.program_id(0) * N
    channel = first + tl.arange(0, N)
    for_key = _weights(projections, first, P, N, P, W)
    for_value = _weights(projections + P * P, first, P, N, P, W)
    for_receptance = _weights(projections + 2 * P * P, first, P, N, P, W)
    slope, offset = _row(norm_weight, D, P, W), _row(norm_bias, D, P, W)
    key_share, value_share = _row(mixes, P, P, W), _row(mixes + P, P, P, W)
    receptance_share = _row(mixes + 2 * P, P, P, W)
    w, u = tl.load(decay + channel), tl.load(bonus + channel)
    _start_next(EARLY)
    begins = tl.load(restart) != 0
    old = _row(before, tl.where(begins, 0, P), P, W)
    normed = _normed(_row(x, D, P, W), slope, offset, D, eps, x, W)
    _store(fresh, normed, P, W, first == 0)
    k = _product(for_key, _mixed(normed, old, key_share, x), x, N, W)
    v = _product(for_value, _mixed(normed, old, value_share, x), x, N, W)
    r = _product(for_receptance, _mixed(normed, old, receptance_share, x), x, N, W)
    read = _wkv(k, v, r, w, u, state + channel, begins, channel < P, EMPTY, SLIP, P)
    tl.store(y + channel, read.to(x.dtype.element_ty))


@triton.jit
def _normed_product(
    x, norm_weight, norm_bias, D, eps, before, restart, mixes, weight, y, fresh, F, outputs,
    KIND: tl.constexpr, EARLY: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """N of the outputs of a product of a single normalised row, with an activation. Those of
    CHANNEL_MIX are F keys, then receptances."""
    first = tl.program_id(0) * N
    gate = first >= F
    weights = _weights(weight, first, outputs, N, P, W)
    slope, offset = _row(norm_weight, D, P, W), _row(norm_bias, D, P, W)
    if KIND == 2:  # CHANNEL_MIX
        share = _row(mixes + tl.where(gate, P, 0), P, P, W)
    _start_next(EARLY)
    normed = _normed(_row(x, D, P, W), slope, offset, D, eps, x, W)
    if KIND == 2:  # CHANNEL_MIX
        _store(fresh, normed, P, W, first == 0)
        old = _row(before, tl.where(tl.load(restart) != 0, 0, P), P, W)
        result = _product(weights, _mixed(normed, old, share, x), x, N, W)
        positive = tl.maximum(result, 0.0)
        result = tl.where(gate, 1.0 / (1.0 + tl.exp(-result)), positive * positive)
    else:
        result = _product(weights, normed, x, N, W)
        if KIND == 1:  # GELU
            result = 0.5 * result * (1.0 + tl.erf(result * 0.7071067811865476))
    output = first + tl.arange(0, N)
    tl.store(y + output, result.to(y.dtype.element_ty), output < outputs)


@triton.jit
def _add_product(
    x, y, weight, gate, out, before, fresh,
    GATED: tl.constexpr, SHIFTED: tl.constexpr, EARLY: tl.constexpr,
    P: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """N channels of x + gate * (weight y), of a single row."""
    first = tl.program_id(0) * N
    channel = first + tl.arange(0, N)
    weights = _weights(weight, first, P, N, K, W)
    _start_next(EARLY)
    total = tl.load(x + channel).to(tl.float32)
    result = _product(weights, _row(y, K, K, W), x, N, W)
    if GATED:
        result = _round(result * tl.load(gate + channel).to(tl.float32), x)
    tl.store(out + channel, (total + result).to(x.dtype.element_ty))
    if SHIFTED:
        tl.store(before + channel, tl.load(fresh + channel))


@triton.jit
def _norm_mix(
    x, parts, gate, joined, norm_weight, norm_bias, D, eps, before, restart, mixes, y, B, GATES,
    CUTS: tl.constexpr, GATED: tl.constexpr, MIXES: tl.constexpr, EARLY: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The inputs of a branch, [MIXES, B, P], of one row of several, whose shift changes. Without
    mixes the normalised row. Before that the row becomes `joined` with CUTS parts of a product;
    with MIXES below 0 that is all."""
    b = tl.program_id(0)
    slope, offset = _row(norm_weight, D, P, W), _row(norm_bias, D, P, W)
    shares = ()
    for i in tl.static_range(MIXES):
        shares += (_row(mixes + i * P, P, P, W),)
    _start_next(EARLY)
    # All that is read is asked for before threads first wait for each other.
    row = _row(x + b * P, D, P, W)
    if MIXES > 0:
        old, begins = _row(before + b * P, P, P, W), tl.load(restart + b) != 0
    if CUTS:
        added = ()
        for c in tl.static_range(len(row)):
            channel = c * W + tl.arange(0, W)
            total = tl.zeros([W], tl.float32)
            for cut in tl.static_range(CUTS):
                total += tl.load(parts + (cut * B + b) * P + channel, channel < D, 0.0)
            total = _round(total, x)
            if GATED:
                share = tl.load(gate + b * GATES + channel, channel < D, 0.0).to(tl.float32)
                total = _round(total * share, x)
            added += (_round(row[c] + total, x),)
        row = added
        _store(joined + b * P, row, P, W)
    if MIXES >= 0:
        normed = _normed(row, slope, offset, D, eps, x, W)
        if MIXES == 0:
            _store(y + b * P, normed, P, W)
        else:
            last = ()
            for c in tl.static_range(len(old)):
                last += (tl.where(begins, 0.0, old[c]),)
            for i in tl.static_range(MIXES):
                _store(y + (i * B + b) * P, _mixed(normed, last, shares[i], x), P, W)
            _store(before + b * P, normed, P, W)


@triton.jit
def _wkv_rows(
    inputs, restart, decay, bonus, state, y, B,
    CUTS: tl.constexpr, EMPTY: tl.constexpr, SLIP: tl.constexpr, EARLY: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """sigmoid(r) WKV of W channels of one row of several; inputs are parts of keys, values and
    receptances, [CUTS, 3, B, P]."""
    b, channel = tl.program_id(0), tl.program_id(1) * W + tl.arange(0, W)
    there = channel < P
    w, u = tl.load(decay + channel, there, 0.0), tl.load(bonus + channel, there, 0.0)
    _start_next(EARLY)
    place = inputs + b * P + channel
    k, v, r = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    for cut in tl.static_range(CUTS):
        k += tl.load(place + cut * 3 * B * P, there, 0.0)
        v += tl.load(place + (cut * 3 + 1) * B * P, there, 0.0)
        r += tl.load(place + (cut * 3 + 2) * B * P, there, 0.0)
    begins = tl.load(restart + b) != 0
    read = _wkv(
        _round(k, y), _round(v, y), _round(r, y), w, u, state + b * 3 * P + channel, begins, there,
        EMPTY, SLIP, P,
    )  # fmt: skip
    tl.store(y + b * P + channel, read.to(y.dtype.element_ty), there)


def time_mix(
    stream: Residual, norm: Norm, shift: Shift, projections: Tensor,
    curves: tuple[Tensor, Tensor], state: Tensor, output: Tensor,
) -> Residual:  # fmt: skip
    """The time-mix of a token of each row, added to the residual stream; shift and state change.

    Args:
        stream: the residual stream.
        norm: of the branch.
        shift: with three mixes.
        projections: [3, P, P], of keys, values and receptances.
        curves: decay and bonus, [P] fp32 each.
        state: [B, 3, P] fp32.
        output: [P, P], the output projection.
    """
    x = stream.x
    rows, width = x.shape
    y, constants = torch.empty_like(x), {"EMPTY": EMPTY_MAXIMUM, "SLIP": MAX_SLIP, "P": width}
    if rows > 1:
        x, inputs = norm_mix(stream, norm, shift)
        parts = rows_product(inputs, projections.flatten(0, 1), PARTS, "time", width)
        channels, warps = WKV_ROWS
        _wkv_rows[(rows, triton.cdiv(width, channels))](
            parts, shift[1], *curves, state, y, rows, CUTS=len(parts), **constants, W=channels,
            num_warps=warps, **early(),
        )  # fmt: skip
        return Residual(x, rows_product(y, output, PARTS, "output").squeeze(1))
    fresh, plan = torch.empty_like(x), TIME_MIX
    _time_mix[(width // plan.outputs,)](
        x, norm.weight, norm.bias, norm.channels, norm.eps, *shift, projections, *curves, state,
        y, fresh, **constants, N=plan.outputs, W=plan.width, num_warps=plan.warps, **early(),
    )  # fmt: skip
    return _add_one(x, y, output, shift=(shift[0], fresh))


def channel_mix(
    stream: Residual, norm: Norm, shift: Shift, weight: Tensor, value: Tensor
) -> Residual:
    """The channel-mix of a token of each row, added to the residual stream; the shift changes.

    Args:
        stream: the residual stream.
        norm: of the branch.
        shift: with two mixes.
        weight: [F + P, P], of keys and receptances.
        value: [P, F].
    """
    hidden = value.shape[1]
    if len(stream.x) > 1:
        x, inputs = norm_mix(stream, norm, shift)
        y = rows_product(inputs, weight, CHANNEL_MIX, "hidden", hidden)
        parts = rows_product(y[:, :hidden], value, PARTS, "down").squeeze(1)
        return Residual(x, parts, y[:, hidden:])
    y, fresh = _run_normed_product(stream.x, norm, shift, weight, hidden, CHANNEL_MIX)
    return _add_one(stream.x, y[:, :hidden], value, y[:, hidden:], (shift[0], fresh))


def normed_product(
    stream: Residual,
    norm: Norm,
    weight: Tensor,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Residual, Tensor]:
    """The residual stream, joined, and weight [F, P] times the normalised one, through GELU if
    asked: [B, F].

    The product is rounded to x's dtype, and is in it or in a wider `dtype`.
    """
    kind = GELU if gelu else NONE
    if len(stream.x) > 1:
        x, normed = norm_mix(stream, norm)
        name = "head" if len(weight) > 16_384 else "hidden"
        return Residual(x), rows_product(normed, weight, kind, name, dtype=dtype)
    x = stream.x
    return stream, _run_normed_product(x, norm, (x, x, x), weight, len(weight), kind, dtype)[0]


def _run_normed_product(
    x: Tensor,
    norm: Norm,
    shift: Shift,
    weight: Tensor,
    hidden: int,
    kind: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    (outputs, width), plan = weight.shape, NORMED_PRODUCT
    y, fresh = x.new_empty(1, outputs, dtype=dtype), torch.empty_like(x)
    _normed_product[(triton.cdiv(outputs, plan.outputs),)](
        x, norm.weight, norm.bias, norm.channels, norm.eps, *shift, weight, y, fresh, hidden,
        outputs, KIND=kind, P=width, N=plan.outputs, W=plan.width, num_warps=plan.warps, **early(),
    )  # fmt: skip
    return y, fresh


def norm_mix(stream: Residual, norm: Norm, shift: Shift | None = None) -> tuple[Tensor, Tensor]:
    """The residual stream of several rows, joined, and the inputs [M, B, P] that a shift with M
    mixes makes of the normalised one; the shift changes. Without a shift the normalised one."""
    mixes = 0 if shift is None else len(shift[2])
    y = stream.x.new_empty(max(1, mixes), *stream.x.shape)
    return _run_norm_mix(stream, norm, shift, mixes, y), y if mixes else y[0]


def join(stream: Residual) -> Tensor:
    """The residual stream, [B, P]."""
    x = stream.x
    return _run_norm_mix(stream, Norm(x, x, x.shape[1], 0.0), None, -1, x)


def _run_norm_mix(
    stream: Residual, norm: Norm, shift: Shift | None, mixes: int, y: Tensor
) -> Tensor:
    (rows, width), (x, parts, gate) = stream.x.shape, stream
    if parts is None and mixes < 0:
        return x
    joined, (channels, warps) = x if parts is None else torch.empty_like(x), NORM_MIX
    _norm_mix[(rows,)](
        x, x if parts is None else parts, x if gate is None else gate, joined, norm.weight,
        norm.bias, norm.channels, norm.eps, *(shift or (x, x, x)), y, rows,
        0 if gate is None else gate.stride(0), CUTS=0 if parts is None else len(parts),
        GATED=gate is not None, MIXES=mixes, P=width, W=channels, num_warps=warps, **early(),
    )  # fmt: skip
    return joined


def add_product(stream: Residual, y: Tensor, weight: Tensor, name: str = "output") -> Residual:
    """x + weight [P, K] y [B, K]."""
    if len(stream.x) > 1:
        return Residual(join(stream), rows_product(y, weight, PARTS, name).squeeze(1))
    return _add_one(stream.x, y, weight)


def _add_one(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    shift: tuple[Tensor, Tensor] | None = None,
) -> Residual:
    """x + gate * (weight y) of a single row.

    Args:
        x: [1, P], the residual stream.
        y: [1, K].
        weight: [P, K].
        gate: [1, P]; None is 1.
        shift: where a token shift is kept, and what it becomes now that nobody reads it.
    """
    (width, inputs), plan = weight.shape, ADD_PRODUCT
    out = torch.empty_like(x)
    before, fresh = shift or (x, x)
    _add_product[(triton.cdiv(width, plan.outputs),)](
        x, y, weight, x if gate is None else gate, out, before, fresh,
        GATED=gate is not None, SHIFTED=shift is not None,
        P=width, K=inputs, N=plan.outputs, W=plan.width, num_warps=plan.warps, **early(),
    )  # fmt: skip
    return Residual(out)


compute_keys(globals())
