"""WKV as a pair of Triton kernels: the CUDA form.

Letters: B rows, T tokens, C channels, N tiles of L tokens. One program per row and group of
channels walks the tiles in order (the backward pass in reverse), with a tile's loads in flight at
once. Inside a tile the recurrence is an associative scan that does not wait for the walk: only the
state that enters the tile does, and it joins afterwards.

A piece of the recurrence is (s, m, a, b): s is the log decay that it puts on whatever stands before
it (minus infinity if it restarts), and e^m (a, b) what it adds. The adjoint obeys the same
recurrence in reverse, each token adding e^-top (g, -g y), so both passes share one scan.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops import wkv_naive

BLOCK = 16  # L: a thread holds a tile's channel in registers
_CHANNELS = 32  # per program: one warp, a thread per channel
_EMPTY = tl.constexpr(wkv_naive.EMPTY_MAXIMUM)
_MAX_SLIP = tl.constexpr(wkv_naive.MAX_SLIP)
# The exponents of products of state and adjoint are below zero but for rounding of two maxima.
_MAX_EXPONENT = tl.constexpr(16.0)


@triton.jit
def _join(m1, a1, b1, s2, m2, a2, b2):
    """What stands before a piece, and then the piece: e^m (a, b) of both."""
    cut = s2 == float("-inf")
    aged = m1 + s2
    slip = tl.minimum(tl.maximum((m1 - aged) + s2, -_MAX_SLIP), _MAX_SLIP)
    m = tl.where(cut, m2, tl.maximum(aged, m2))
    past = tl.exp((aged - m) + slip)
    present = tl.exp(m2 - m)
    # Selected, not multiplied by zero: what is cut off may be infinite.
    a = tl.where(cut, 0.0, past * a1) + present * a2
    b = tl.where(cut, 0.0, past * b1) + present * b2
    return m, a, b


@triton.jit
def _combine(s1, m1, a1, b1, es1, em1, ea1, eb1, s2, m2, a2, b2, es2, em2, ea2, eb2):
    """Two neighbouring pieces as one; e... is the same piece without its last token."""
    m, a, b = _join(m1, a1, b1, s2, m2, a2, b2)
    em, ea, eb = _join(m1, a1, b1, es2, em2, ea2, eb2)
    return s1 + s2, m, a, b, s1 + es2, em, ea, eb


@triton.jit
def _walk(s, m, a, b, carry_m, carry_a, carry_b, step, LAST: tl.constexpr, REVERSE: tl.constexpr):
    """Scan a tile [L, channels]: what each token finds, and the carry [1, channels] that leaves."""
    nothing = tl.zeros_like(a)
    s, m, a, b, es, em, ea, eb = tl.associative_scan(
        (s, m, a, b, nothing, nothing + _EMPTY, nothing, nothing), 0, _combine, reverse=REVERSE
    )
    found_m, found_a, found_b = _join(carry_m, carry_a, carry_b, es, em, ea, eb)
    last = step == LAST
    s = tl.sum(tl.where(last, s, 0.0), axis=0, keep_dims=True)
    m = tl.sum(tl.where(last, m, 0.0), axis=0, keep_dims=True)
    a = tl.sum(tl.where(last, a, 0.0), axis=0, keep_dims=True)
    b = tl.sum(tl.where(last, b, 0.0), axis=0, keep_dims=True)
    carry_m, carry_a, carry_b = _join(carry_m, carry_a, carry_b, s, m, a, b)
    return found_m, found_a, found_b, carry_m, carry_a, carry_b


@triton.jit
def _load_state(state, offset, C, inside):
    """(a, b, m) [1, channels] from [..., 3, C]."""
    a = tl.load(state + offset, mask=inside, other=0.0)
    b = tl.load(state + offset + C, mask=inside, other=0.0)
    m = tl.load(state + offset + 2 * C, mask=inside, other=_EMPTY)
    return a, b, m


@triton.jit
def _store_state(state, offset, C, inside, a, b, m):
    tl.store(state + offset, a, mask=inside)
    tl.store(state + offset + C, b, mask=inside)
    tl.store(state + offset + 2 * C, m, mask=inside)


@triton.jit
def _found(k, v, log_decay, cut, valid, m, a, b, step, L: tl.constexpr):
    """The state (m, a, b) that each token of a tile finds, and the one that leaves the tile."""
    found_m, found_a, found_b, m, a, b = _walk(
        log_decay,
        tl.where(valid, k, _EMPTY),
        tl.where(valid, v, 0.0),
        tl.where(valid, 1.0, tl.zeros_like(v)),
        m,
        a,
        b,
        step,
        L - 1,
        False,
    )
    found_m = tl.where(cut, _EMPTY, found_m)
    return found_m, tl.where(cut, 0.0, found_a), tl.where(cut, 0.0, found_b), m, a, b


@triton.jit
def _tile(row, tile, restart, decay, channel, T, C, step, L: tl.constexpr):
    """Of a tile: offsets into [B, T, C], which are valid, where it is cut, and its log decays."""
    t = tile * L + step
    valid = (t < T) & (channel < C)
    cut = tl.load(restart + row * T + t, mask=t < T, other=0) != 0
    log_decay = tl.where(cut, float("-inf"), tl.where(valid, decay, 0.0))
    return (row * T + t) * C + channel, valid, cut, log_decay


@triton.jit
def _read(u, k, v, m, a, b):
    """What a token reads: the mean, the top exponent, 1 / denominator, weight of the present."""
    top = tl.maximum(m, u + k)
    past, present = tl.exp(m - top), tl.exp(u + k - top)
    scale = 1.0 / (past * b + present)
    return (past * a + present * v) * scale, top, scale, present


@triton.jit
def _forward_kernel(
    decay, bonus, k, v, restart, state, y, final, entries, T, C, L: tl.constexpr, W: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    channel = (tl.program_id(0) * W + tl.arange(0, W))[None, :]
    step = tl.arange(0, L)[:, None]
    inside = channel < C
    w = tl.load(decay + channel, mask=inside, other=0.0)
    u = tl.load(bonus + channel, mask=inside, other=0.0)
    a, b, m = _load_state(state, row * 3 * C + channel, C, inside)
    tiles = tl.cdiv(T, L)
    for tile in range(tiles):
        _store_state(entries, (row * tiles + tile) * 3 * C + channel, C, inside, a, b, m)
        at, valid, cut, log_decay = _tile(row, tile, restart, w, channel, T, C, step, L)
        keys = tl.load(k + at, mask=valid, other=0.0).to(tl.float32)
        values = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        found_m, found_a, found_b, m, a, b = _found(
            keys, values, log_decay, cut, valid, m, a, b, step, L
        )
        mean, _, _, _ = _read(u, keys, values, found_m, found_a, found_b)
        tl.store(y + at, mean.to(y.dtype.element_ty), mask=valid)
    _store_state(final, row * 3 * C + channel, C, inside, a, b, m)


@triton.jit
def _backward_kernel(
    grad_y,
    grad_final,
    decay,
    bonus,
    k,
    v,
    restart,
    entries,
    final,
    grad_decay,
    grad_bonus,
    grad_k,
    grad_v,
    grad_state,
    T,
    C,
    L: tl.constexpr,
    W: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    channel = (tl.program_id(0) * W + tl.arange(0, W))[None, :]
    step = tl.arange(0, L)[:, None]
    inside = channel < C
    w = tl.load(decay + channel, mask=inside, other=0.0)
    u = tl.load(bonus + channel, mask=inside, other=0.0)
    at_state = row * 3 * C + channel
    adjoint_a, adjoint_b, _ = _load_state(grad_final, at_state, C, inside)
    _, _, final_m = _load_state(final, at_state, C, inside)
    adjoint_m = -final_m
    sum_decay, sum_bonus = tl.zeros_like(w), tl.zeros_like(w)
    tiles = tl.cdiv(T, L)
    for back in range(tiles):
        tile = tiles - 1 - back
        at, valid, cut, log_decay = _tile(row, tile, restart, w, channel, T, C, step, L)
        keys = tl.load(k + at, mask=valid, other=0.0).to(tl.float32)
        values = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        grads = tl.load(grad_y + at, mask=valid, other=0.0).to(tl.float32)
        at_entry = (row * tiles + tile) * 3 * C + channel
        entry_a, entry_b, entry_m = _load_state(entries, at_entry, C, inside)
        m, a, b, _, _, _ = _found(
            keys, values, log_decay, cut, valid, entry_m, entry_a, entry_b, step, L
        )
        mean, top, scale, present = _read(u, keys, values, m, a, b)
        grads = grads * scale
        adds = valid & (cut == 0)
        left_m, left_a, left_b, adjoint_m, adjoint_a, adjoint_b = _walk(
            log_decay,
            tl.where(adds, -top, _EMPTY),
            tl.where(adds, grads, 0.0),
            tl.where(adds, -grads * mean, 0.0),
            adjoint_m,
            adjoint_a,
            adjoint_b,
            step,
            0,
            True,
        )
        grads = grads * present
        now = grads * (values - mean)
        later = tl.exp(tl.minimum(keys + left_m, _MAX_EXPONENT))
        grad_keys = now + later * (values * left_a + left_b)
        tl.store(grad_k + at, grad_keys.to(grad_k.dtype.element_ty), mask=valid)
        grad_values = grads + later * left_a
        tl.store(grad_v + at, grad_values.to(grad_v.dtype.element_ty), mask=valid)
        aged = tl.exp(tl.minimum((m + left_m) + w, _MAX_EXPONENT)) * (a * left_a + b * left_b)
        sum_decay += tl.sum(tl.where(adds, aged, 0.0), axis=0, keep_dims=True)
        sum_bonus += tl.sum(now, axis=0, keep_dims=True)

    tl.store(grad_decay + row * C + channel, sum_decay, mask=inside)
    tl.store(grad_bonus + row * C + channel, sum_bonus, mask=inside)
    _, _, first_m = _load_state(entries, row * tiles * 3 * C + channel, C, inside)
    weight = tl.exp(tl.minimum(first_m + adjoint_m, _MAX_EXPONENT))
    grad_a, grad_b = weight * adjoint_a, weight * adjoint_b
    _store_state(grad_state, at_state, C, inside, grad_a, grad_b, tl.zeros_like(w))


def forward(
    decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, restart: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, C] in k's dtype, the final state [B, 3, C], and each tile's first [B, N, 3, C]."""
    rows, length, channels = k.shape
    k, v = k.contiguous(), v.contiguous()
    y, final = torch.empty_like(k), k.new_empty(rows, 3, channels, dtype=torch.float32)
    entries = final.new_empty(rows, triton.cdiv(length, BLOCK), 3, channels)
    _forward_kernel[_grid(rows, channels)](
        *_wide(decay, bonus),
        k,
        v,
        restart.contiguous().view(torch.uint8),
        *_wide(state),
        y,
        final,
        entries,
        length,
        channels,
        L=BLOCK,
        W=_CHANNELS,
        num_warps=1,
    )
    return y, final, entries


def backward(
    grad_y: Tensor,
    grad_final: Tensor,
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    restart: Tensor,
    entries: Tensor,
    final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of decay, bonus, k, v and the initial state."""
    rows, length, channels = k.shape
    k, v = k.contiguous(), v.contiguous()
    grad_k, grad_v, grad_state = torch.empty_like(k), torch.empty_like(v), torch.empty_like(final)
    partial = final.new_empty(2, rows, channels)
    _backward_kernel[_grid(rows, channels)](
        grad_y.contiguous(),
        *_wide(grad_final, decay, bonus),
        k,
        v,
        restart.contiguous().view(torch.uint8),
        entries,
        final,
        partial[0],
        partial[1],
        grad_k,
        grad_v,
        grad_state,
        length,
        channels,
        L=BLOCK,
        W=_CHANNELS,
        num_warps=1,
    )
    # Each a tensor of its own: outputs of an operator must not share memory.
    grad_decay, grad_bonus = (part.sum(0) for part in partial)
    return grad_decay.to(decay.dtype), grad_bonus.to(bonus.dtype), grad_k, grad_v, grad_state


def _grid(rows: int, channels: int) -> tuple[Any, ...]:
    return (triton.cdiv(channels, _CHANNELS), rows)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.float().contiguous() for x in tensors]
