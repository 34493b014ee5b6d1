"""WKV as a pair of Triton kernels: the CUDA form.

Notation: B rows, T tokens, C channels, N tiles of L tokens. A program is one warp, which walks a
group of channels, a thread per channel, through one row: no thread waits for another. A thread
holds a tile in registers and loads the next one while it computes on this one.

The forward kernel keeps the state that enters each tile. The backward kernel takes the tiles from
the last to the first; in each it walks forward once more from that state, then back. The adjoint
of (a, b) is written in the unit e^-m, m being the maximum of the state beside it. In that unit
every weight is at most 1, so the adjoint needs no maximum of its own.
"""

# Kernels are untyped, and tuples of tokens grow.
# mypy: disable-error-code="no-untyped-def, assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops import wkv_naive
from i3dist.ops.ahead import launch
from i3dist.ops.triton_keys import compute_keys
from i3dist.ops.wkv_naive import Gradients, WkvInputs, WkvSaved

BLOCK = 16  # L, of both kernels
_CHANNELS = 32  # per program
# Of a thread of the backward kernel, at most: three warps then fit into each of a multiprocessor's
# four register files, and 132 multiprocessors run 32 rows x 1,184 channels at once.
_REGISTERS = 168
_EMPTY = tl.constexpr(wkv_naive.EMPTY_MAXIMUM)
_MAX_SLIP = tl.constexpr(wkv_naive.MAX_SLIP)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _weights(x, y):
    """e^x and e^y, both divided by the larger."""
    difference = x - y
    smaller = tl.exp2(-_LOG2_E * tl.abs(difference))
    first = difference >= 0
    return tl.where(first, 1.0, smaller), tl.where(first, smaller, 1.0)


@triton.jit
def _reciprocal(x):
    """1 / x to the last bit or so, in one instruction."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sigmoid(x):
    return _reciprocal(1.0 + tl.exp2(-_LOG2_E * x))


@triton.jit
def _read(a, b, m, u, k, v):
    """y, what scales numerator and denominator, and the weights of past and present in them."""
    past, present = _weights(m, u + k)
    scale = _reciprocal(past * b + present)
    return (past * a + present * v) * scale, scale, past, present


@triton.jit
def _advance(a, b, m, w, k, v):
    """The state after a token, and the weights of past and present in it."""
    aged = m + w
    slip = tl.minimum(tl.maximum((m - aged) + w, -_MAX_SLIP), _MAX_SLIP)
    past, present = _weights(aged, k)
    past += past * slip  # e^slip, as slip is small
    return past * a + present * v, past * b + present, tl.maximum(aged, k), past, present


@triton.jit
def _unless(cut, a, b, m):
    """The state, emptied at a cut. Selected, not multiplied by zero: it may be infinite."""
    return tl.where(cut, 0.0, a), tl.where(cut, 0.0, b), tl.where(cut, _EMPTY, m)


@triton.jit
def _place(C: tl.constexpr, W: tl.constexpr):
    """The program's row and channels. Those beyond the last repeat it, and must not be stored."""
    channel = tl.program_id(0) * W + tl.arange(0, W)
    return tl.program_id(1).to(tl.int64), tl.minimum(channel, C - 1), channel < C


@triton.jit
def _load_tile(pointer, left, C: tl.constexpr, L: tl.constexpr, EVEN: tl.constexpr):
    """L tokens, [W] each. Those from `left` on are 0; if EVEN, there are none."""
    tile = ()
    for t in tl.static_range(L):
        at = pointer + t * C
        x = tl.load(at) if EVEN else tl.load(at, mask=t < left, other=0.0)
        tile += (x,)
    return tile


@triton.jit
def _load_inputs(
    k, v, receptance, restart, tile, T, C: tl.constexpr, L: tl.constexpr, EVEN: tl.constexpr
):
    """A tile's keys, values, receptances (if any) and restarts [L], as they are in memory."""
    first = tile * L
    step = tl.arange(0, L)
    receptances = ()
    if receptance is not None:
        receptances = _load_tile(receptance + first * C, T - first, C, L, EVEN)
    return (
        _load_tile(k + first * C, T - first, C, L, EVEN),
        _load_tile(v + first * C, T - first, C, L, EVEN),
        receptances,
        tl.load(restart + first + step, mask=first + step < T, other=0),
    )


@triton.jit
def _widen(tile):
    """A tile in fp32."""
    wide = ()
    for t in tl.static_range(len(tile)):
        wide += (tile[t].to(tl.float32),)
    return wide


@triton.jit
def _unpack(inputs, L: tl.constexpr):
    """The inputs in fp32, and the restarts as bits, the lowest for the first token."""
    keys, values, receptances, restarts = inputs
    cuts = tl.sum(restarts.to(tl.int32) << tl.arange(0, L), axis=0)
    return _widen(keys), _widen(values), _widen(receptances), cuts


@triton.jit
def _store_token(pointer, x, inside):
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_state(state, C: tl.constexpr):
    """(a, b, m) [W] from [..., 3, C]."""
    return tl.load(state), tl.load(state + C), tl.load(state + 2 * C)


@triton.jit
def _store_state(state, a, b, m, inside, C: tl.constexpr):
    tl.store(state, a, mask=inside)
    tl.store(state + C, b, mask=inside)
    tl.store(state + 2 * C, m, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _wkv_forward_kernel(
    decay,
    bonus,
    k,
    v,
    receptance,
    restart,
    state,
    y,
    final,
    entries,
    T,
    C: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
):
    row, channel, inside = _place(C, W)
    w, u = tl.load(decay + channel), tl.load(bonus + channel)
    a, b, m = _load_state(state + row * 3 * C + channel, C)
    tiles = tl.cdiv(T, L)
    at = row * T * C + channel
    k, v, y, restart = k + at, v + at, y + at, restart + row * T
    if receptance is not None:
        receptance += at
    entries += row * tiles * 3 * C + channel
    inputs = _load_inputs(k, v, receptance, restart, 0, T, C, L, EVEN)
    keys, values, receptances, cuts = _unpack(inputs, L)
    for tile in range(tiles):
        ahead = tl.minimum(tile + 1, tiles - 1)
        inputs = _load_inputs(k, v, receptance, restart, ahead, T, C, L, EVEN)
        _store_state(entries + tile * 3 * C, a, b, m, inside, C)
        tile_y = y + tile * L * C
        for t in tl.static_range(L):
            if EVEN or tile * L + t < T:
                a, b, m = _unless(((cuts >> t) & 1) != 0, a, b, m)
                mean = _read(a, b, m, u, keys[t], values[t])[0]
                if receptance is not None:
                    mean *= _sigmoid(receptances[t])
                _store_token(tile_y + t * C, mean, inside)
                a, b, m = _advance(a, b, m, w, keys[t], values[t])[:3]
        # Not earlier: this waits for the loads.
        keys, values, receptances, cuts = _unpack(inputs, L)
    _store_state(final + row * 3 * C + channel, a, b, m, inside, C)


@triton.jit
def _revisit(a, b, m, w, keys, values, cuts, L: tl.constexpr):
    """Per token of a tile: the state (a, b, m) that it finds, and its weights in `_advance`."""
    found = ()
    for t in tl.static_range(L):
        a, b, m = _unless(((cuts >> t) & 1) != 0, a, b, m)
        next_a, next_b, next_m, past, present = _advance(a, b, m, w, keys[t], values[t])
        found += ((a, b, m, past, present),)
        a, b, m = next_a, next_b, next_m
    return found


@triton.jit
def _retreat(adjoint_a, adjoint_b, found, u, k, v, grad_y):
    """The adjoint of the state that a token finds; gradients of k, v, bonus, decay; its mean."""
    a, b, m, past, present = found
    mean, scale, read_past, read_present = _read(a, b, m, u, k, v)
    grad = grad_y * scale
    grad_v = grad * read_present
    grad_u = grad_v * (v - mean)
    grad_k = grad_u + present * (v * adjoint_a + adjoint_b)
    grad_v += present * adjoint_a
    grad_w = past * (a * adjoint_a + b * adjoint_b)
    grad *= read_past
    adjoint_a = past * adjoint_a + grad
    adjoint_b = past * adjoint_b - grad * mean
    return adjoint_a, adjoint_b, grad_k, grad_v, grad_u, grad_w, mean


@triton.jit(do_not_specialize=["T"])
def _wkv_backward_kernel(
    grad_y,
    grad_final,
    decay,
    bonus,
    k,
    v,
    receptance,
    restart,
    entries,
    grad_parameters,
    grad_k,
    grad_v,
    grad_receptance,
    grad_state,
    T,
    C: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
):
    row, channel, inside = _place(C, W)
    w, u = tl.load(decay + channel), tl.load(bonus + channel)
    adjoint_a, adjoint_b, _ = _load_state(grad_final + row * 3 * C + channel, C)
    sum_w, sum_u = tl.zeros_like(w), tl.zeros_like(w)
    tiles = tl.cdiv(T, L)
    at = row * T * C + channel
    k, v, grad_y, restart = k + at, v + at, grad_y + at, restart + row * T
    grad_k, grad_v = grad_k + at, grad_v + at
    if receptance is not None:
        receptance, grad_receptance = receptance + at, grad_receptance + at
    entries += row * tiles * 3 * C + channel
    first = (tiles - 1) * L
    inputs = _load_inputs(k, v, receptance, restart, tiles - 1, T, C, L, EVEN)
    keys, values, receptances, cuts = _unpack(inputs, L)
    grads = _widen(_load_tile(grad_y + first * C, T - first, C, L, EVEN))
    a, b, m = _load_state(entries + (tiles - 1) * 3 * C, C)
    for tile in range(tiles - 1, -1, -1):
        ahead = tl.maximum(tile - 1, 0)
        inputs = _load_inputs(k, v, receptance, restart, ahead, T, C, L, EVEN)
        next_grads = _load_tile(grad_y + ahead * L * C, T - ahead * L, C, L, EVEN)
        entry = _load_state(entries + ahead * 3 * C, C)
        found = _revisit(a, b, m, w, keys, values, cuts, L)
        tile_k, tile_v = grad_k + tile * L * C, grad_v + tile * L * C
        for t in tl.static_range(L - 1, -1, -1):
            if EVEN or tile * L + t < T:
                grad = grads[t]
                if receptance is not None:
                    gate = _sigmoid(receptances[t])
                    grad *= gate
                adjoint_a, adjoint_b, key, value, du, dw, mean = _retreat(
                    adjoint_a, adjoint_b, found[t], u, keys[t], values[t], grad
                )
                if receptance is not None:
                    grad_gate = grad * (1.0 - gate) * mean
                    _store_token(grad_receptance + (tile * L + t) * C, grad_gate, inside)
                sum_u += du
                sum_w += dw
                _store_token(tile_k + t * C, key, inside)
                _store_token(tile_v + t * C, value, inside)
                cut = ((cuts >> t) & 1) != 0
                adjoint_a = tl.where(cut, 0.0, adjoint_a)
                adjoint_b = tl.where(cut, 0.0, adjoint_b)
        # Not earlier: this waits for the loads.
        keys, values, receptances, cuts = _unpack(inputs, L)
        grads = _widen(next_grads)
        a, b, m = entry
    tl.store(grad_parameters + row * 2 * C + channel, sum_w, mask=inside)
    tl.store(grad_parameters + row * 2 * C + C + channel, sum_u, mask=inside)
    at = grad_state + row * 3 * C + channel
    _store_state(at, adjoint_a, adjoint_b, tl.zeros_like(w), inside, C)


def forward(inputs: WkvInputs) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, C] in k's dtype, the final state [B, 3, C], and each tile's first [B, N, 3, C]."""
    decay, bonus, k, v, restart, state, receptance = inputs
    assert state is not None
    rows, length, channels = k.shape
    k, v = k.contiguous(), v.contiguous()
    y, final = torch.empty_like(k), k.new_empty(rows, 3, channels, dtype=torch.float32)
    entries = final.new_empty(rows, triton.cdiv(length, BLOCK), 3, channels)
    grid, options = _launch(rows, length, channels)
    launch(_wkv_forward_kernel, grid, k)(
        *_fp32(decay, bonus),
        k,
        v,
        None if receptance is None else receptance.contiguous(),
        restart.contiguous().view(torch.uint8),
        *_fp32(state),
        y,
        final,
        entries,
        length,
        **options,
    )
    return y, final, entries


def backward(grad_y: Tensor, grad_final: Tensor, saved: WkvSaved) -> Gradients:
    """Gradients of decay, bonus, k, v, the initial state, and receptance (no elements if None).

    Args:
        grad_y: [B, T, C] in k's dtype.
        grad_final: [B, 3, C] fp32, of the final state.
        saved: what the forward pass read and passed through.
    """
    decay, bonus, k, v, restart, entries, final, receptance = saved
    rows, length, channels = k.shape
    k, v = k.contiguous(), v.contiguous()
    grad_k, grad_v, grad_state = torch.empty_like(k), torch.empty_like(v), torch.empty_like(final)
    grad_receptance = k.new_empty(0 if receptance is None else k.shape)
    partial = final.new_empty(rows, 2, channels)
    grid, options = _launch(rows, length, channels)
    launch(_wkv_backward_kernel, grid, k)(
        grad_y.contiguous(),
        *_fp32(grad_final, decay, bonus),
        k,
        v,
        None if receptance is None else receptance.contiguous(),
        restart.contiguous().view(torch.uint8),
        entries,
        partial,
        grad_k,
        grad_v,
        grad_receptance,
        grad_state,
        length,
        **options,
        maxnreg=_REGISTERS,
    )
    # Each a tensor of its own: outputs of an operator must not share memory.
    grad_decay, grad_bonus = (part.sum(0) for part in partial.unbind(1))
    parameters = grad_decay.to(decay.dtype), grad_bonus.to(bonus.dtype)
    return *parameters, grad_k, grad_v, grad_state, grad_receptance


def _launch(rows: int, length: int, channels: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """A kernel's grid and constants."""
    grid = (triton.cdiv(channels, _CHANNELS), rows)
    even = length % BLOCK == 0
    return grid, {"C": channels, "L": BLOCK, "W": _CHANNELS, "EVEN": even, "num_warps": 1}


def _fp32(*tensors: Tensor) -> list[Tensor]:
    return [x.float().contiguous() for x in tensors]


compute_keys(globals())
