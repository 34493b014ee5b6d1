"""Layers for a single token of a single row, as Triton kernels: the CUDA form of a decoding step.

With one row every product reads each weight once, so a kernel takes as long as its weights take to
arrive. What stands before a product (LayerNorm, token shift, mixes) is computed by every program
again while its weights are on their way; what stands after it (WKV, activations, gates, the
residual stream) by the program that has the results. So an RWKV layer is four kernels.

Notation: P channels with padding, F hidden channels, N outputs of a program. Vectors are [1, P].
`i3dist.inference.steps` has the same steps in PyTorch.
"""

# Kernels are untyped.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops.shift_mix import Norm
from i3dist.ops.wkv_naive import EMPTY_MAXIMUM, MAX_SLIP

OUTPUTS = 4  # N; some 300 programs for the card's width, two for each multiprocessor
PIECE = 1024  # inputs that a program of `_add_product` multiplies at once

NONE, GELU, CHANNEL_MIX = range(3)  # activations of `_normed_product`


# Token shift: the normalised token before, [1, P], which `add_product` changes; whether nothing
# stands before, [1] bool; the share of the token in each of M inputs, [M, P].
Shift = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _normed(x, weight, bias, D, eps, P: tl.constexpr, W: tl.constexpr):
    """LayerNorm of a row, rounded to the row's dtype; 0 from channel D on. W is a power of two."""
    channel = tl.arange(0, W)
    inside = channel < D
    row = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, row - tl.sum(row) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / D + eps)
    slope = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return (centred * scale * slope + offset).to(x.dtype.element_ty)


@triton.jit
def _mixed(normed, before, mix, restart, P: tl.constexpr, W: tl.constexpr):
    """A row mixed with the one before, in fp32 after rounding."""
    channel = tl.arange(0, W)
    inside = channel < P
    share = tl.load(mix + channel, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(before + channel, mask=inside, other=0.0).to(tl.float32)
    old = tl.where(restart, 0.0, old)
    return (old + share * (normed.to(tl.float32) - old)).to(normed.dtype).to(tl.float32)


@triton.jit
def _weights(weight, first, N: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """Rows first, first + 1, ... of a matrix of P columns: [N, W]."""
    row, column = first + tl.arange(0, N)[:, None], tl.arange(0, W)[None, :]
    return tl.load(weight + row * P + column, mask=column < P, other=0.0)


@triton.jit
def _product(weights, row, dtype: tl.constexpr):
    """[N, W] times a row [W], rounded to dtype, in fp32."""
    return tl.sum(weights.to(tl.float32) * row[None, :], axis=1).to(dtype).to(tl.float32)


@triton.jit
def _time_mix(
    x, norm_weight, norm_bias, D, eps, before, restart, mixes, projections, decay, bonus, state,
    y, fresh, EMPTY: tl.constexpr, SLIP: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """sigmoid(r) WKV of N channels, and their state; `fresh` is the normalised row."""
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * N
    for_key = _weights(projections, first, N, P, W)
    for_value = _weights(projections + P * P, first, N, P, W)
    for_receptance = _weights(projections + 2 * P * P, first, N, P, W)
    begins = tl.load(restart) != 0
    normed = _normed(x, norm_weight, norm_bias, D, eps, P, W)
    if first == 0:
        tl.store(fresh + tl.arange(0, W), normed, mask=tl.arange(0, W) < P)
    k = _product(for_key, _mixed(normed, before, mixes, begins, P, W), dtype)
    v = _product(for_value, _mixed(normed, before, mixes + P, begins, P, W), dtype)
    r = _product(for_receptance, _mixed(normed, before, mixes + 2 * P, begins, P, W), dtype)

    channel = first + tl.arange(0, N)
    w, u = tl.load(decay + channel), tl.load(bonus + channel)
    a = tl.where(begins, 0.0, tl.load(state + channel))
    b = tl.where(begins, 0.0, tl.load(state + P + channel))
    m = tl.where(begins, EMPTY, tl.load(state + 2 * P + channel))
    top = tl.maximum(m, u + k)
    past, present = tl.exp(m - top), tl.exp(u + k - top)
    read = (past * a + present * v) / (past * b + present)
    tl.store(y + channel, (read / (1.0 + tl.exp(-r))).to(dtype))

    aged = w + m
    slip = tl.minimum(tl.maximum((m - aged) + w, -SLIP), SLIP)
    top = tl.maximum(aged, k)
    past, present = tl.exp(aged - top + slip), tl.exp(k - top)
    tl.store(state + channel, past * a + present * v)
    tl.store(state + P + channel, past * b + present)
    tl.store(state + 2 * P + channel, top)


@triton.jit
def _normed_product(
    x, norm_weight, norm_bias, D, eps, before, restart, mixes, weight, y, fresh, F,
    KIND: tl.constexpr, P: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N outputs of a product of a normalised row, with an activation."""
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * N
    weights = _weights(weight, first, N, P, W)
    normed = _normed(x, norm_weight, norm_bias, D, eps, P, W)
    if KIND == 2:  # CHANNEL_MIX: keys, then receptances
        if first == 0:
            tl.store(fresh + tl.arange(0, W), normed, mask=tl.arange(0, W) < P)
        receptance = first >= F
        mix = mixes + tl.where(receptance, P, 0)
        result = _product(weights, _mixed(normed, before, mix, tl.load(restart) != 0, P, W), dtype)
        positive = tl.maximum(result, 0.0)
        result = tl.where(receptance, 1.0 / (1.0 + tl.exp(-result)), positive * positive)
    else:
        result = _product(weights, normed.to(tl.float32), dtype)
        if KIND == 1:  # GELU
            result = 0.5 * result * (1.0 + tl.erf(result * 0.7071067811865476))
    tl.store(y + first + tl.arange(0, N), result.to(dtype))


@triton.jit
def _add_product(
    x, y, weight, gate, out, before, fresh,
    GATED: tl.constexpr, SHIFTED: tl.constexpr, K: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N channels of x + gate * (weight y)."""
    dtype: tl.constexpr = x.dtype.element_ty
    channel = tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros([N, W], tl.float32)
    for first in tl.static_range(0, K, W):
        column = first + tl.arange(0, W)
        inside = column < K
        part = tl.load(
            weight + channel[:, None] * K + column[None, :], mask=inside[None, :], other=0.0
        )
        row = tl.load(y + column, mask=inside, other=0.0).to(tl.float32)
        total += part.to(tl.float32) * row[None, :]
    result = tl.sum(total, axis=1).to(dtype).to(tl.float32)
    if GATED:
        result = (result * tl.load(gate + channel).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(out + channel, (tl.load(x + channel).to(tl.float32) + result).to(dtype))
    if SHIFTED:
        tl.store(before + channel, tl.load(fresh + channel))


def time_mix(
    x: Tensor, norm: Norm, shift: Shift, projections: Tensor, curves: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated WKV of one token, which changes the state.

    Args:
        x: [1, P], the residual stream.
        norm: of the branch.
        shift: with three mixes.
        projections: [3, P, P], of keys, values and receptances.
        curves: [2, P] fp32, decay and bonus.
        state: [1, 3, P] fp32.

    Returns:
        What the output projection multiplies, [1, P], and the normalised token, [1, P].
    """
    y, fresh = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[1]
    _time_mix[(width // OUTPUTS,)](
        x, norm.weight, norm.bias, norm.channels, norm.eps, *shift, projections, *curves, state,
        y, fresh, EMPTY=EMPTY_MAXIMUM, SLIP=MAX_SLIP,
        P=width, W=triton.next_power_of_2(width), N=OUTPUTS,
    )  # fmt: skip
    return y, fresh


def channel_mix(
    x: Tensor, norm: Norm, shift: Shift, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared ReLU of the keys [1, F], sigmoid of the receptances [1, P], and the normalised token
    [1, P], of x [1, P] with two mixes; `weight` [F + P, P] has the rows of both."""
    rows, width = weight.shape
    y, fresh = x.new_empty(1, rows), torch.empty_like(x)
    _normed_product[(rows // OUTPUTS,)](
        x, norm.weight, norm.bias, norm.channels, norm.eps, *shift, weight, y, fresh, rows - width,
        KIND=CHANNEL_MIX, P=width, W=triton.next_power_of_2(width), N=OUTPUTS,
    )  # fmt: skip
    return y[:, : rows - width], y[:, rows - width :], fresh


def normed_product(x: Tensor, norm: Norm, weight: Tensor, gelu: bool = False) -> Tensor:
    """weight [F, P] times the normalised x [1, P], through GELU if asked: [1, F]."""
    rows, width = weight.shape
    y = x.new_empty(1, rows)
    _normed_product[(rows // OUTPUTS,)](
        x, norm.weight, norm.bias, norm.channels, norm.eps, x, x, x, weight, y, x, rows,
        KIND=GELU if gelu else NONE, P=width, W=triton.next_power_of_2(width), N=OUTPUTS,
    )  # fmt: skip
    return y


def add_product(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    shift: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x + gate * (weight y).

    Args:
        x: [1, P], the residual stream.
        y: [1, K].
        weight: [P, K].
        gate: [1, P]; None is 1.
        shift: where a token shift is kept, and what it becomes now that nobody reads it.
    """
    out, (rows, inputs) = torch.empty_like(x), weight.shape
    before, fresh = shift or (x, x)
    _add_product[(rows // OUTPUTS,)](
        x, y, weight, x if gate is None else gate, out, before, fresh,
        GATED=gate is not None, SHIFTED=shift is not None,
        K=inputs, W=min(PIECE, triton.next_power_of_2(inputs)), N=OUTPUTS,
    )  # fmt: skip
    return out
