"""RWKV-4's WKV as its equations: a loop over time with plain autograd; the oracle of fast forms.

Source: Peng et al., 2023, arXiv:2305.13048. Notation: B rows, T tokens, C channels. Per channel,
with decay w < 0 and bonus u:

    y_t = (a_{t-1} + e^{u+k_t} v_t) / (b_{t-1} + e^{u+k_t})
    a_t = e^w a_{t-1} + e^{k_t} v_t
    b_t = e^w b_{t-1} + e^{k_t}

With a receptance r the result is sigmoid(r_t) y_t.

The state is [B, 3, C]: a and b divided by e^m, and m, the running maximum of the exponents. m only
sets the unit of a and b, so differentiation treats it as a constant: gradients of a and b are taken
at fixed m, and m has none. This is exact for anything that depends on the state through a e^m and
b e^m alone, as a later call does.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from i3dist.ops.precision import compute_dtype

# Below every exponent, but finite: then no difference of two exponents is NaN.
EMPTY_MAXIMUM = torch.finfo(torch.float32).min
# w + m is rounded the same way at every step, so a and b are corrected by the difference. A larger
# difference than this (|m| > 8192) stays uncorrected: a and b would drift out of range.
MAX_SLIP = 2.0**-11


class WkvInputs(NamedTuple):
    """The inputs of WKV, in every form."""

    decay: Tensor  # [C] fp32, negative: w, the log decay of a step
    bonus: Tensor  # [C] fp32: u, added to the present token's key
    k: Tensor  # [B, T, C] fp32 or bf16, any finite values; T >= 1
    v: Tensor  # [B, T, C] in k's dtype
    restart: Tensor  # [B, T] bool, true where the state is emptied before the token
    state: Tensor | None = None  # [B, 3, C] fp32 (a, b, m); None is `empty_state`
    receptance: Tensor | None = None  # [B, T, C] in k's dtype: gates y; None is no gate


class WkvSaved(NamedTuple):
    """What the backward pass of a fast form reads: `WkvInputs`, and the states it went through."""

    decay: Tensor
    bonus: Tensor
    k: Tensor
    v: Tensor
    restart: Tensor
    entries: Tensor  # [B, N, 3, C], the state that enters each block of tokens
    final: Tensor  # [B, 3, C]
    receptance: Tensor | None


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_state(
    rows: int,
    channels: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The state before any token: [rows, 3, channels], a = b = 0."""
    state = torch.zeros(rows, 3, channels, device=device, dtype=dtype)
    state[:, 2] = EMPTY_MAXIMUM
    return state


def wkv_naive(inputs: WkvInputs) -> tuple[Tensor, Tensor]:
    """WKV one token after another: y [B, T, C] and state [B, 3, C], as `i3dist.ops.wkv.wkv`."""
    decay, bonus, k, v, restart, state, receptance = inputs
    wide = compute_dtype(k)
    rows, length, channels = k.shape
    if state is None:
        state = empty_state(rows, channels, k.device, wide)
    decay, bonus = decay.to(wide), bonus.to(wide)
    a, b, m = state.to(wide).unbind(1)
    m = m.detach()
    outputs = []
    for t in range(length):
        fresh = restart[:, t, None]
        a, b = a.masked_fill(fresh, 0.0), b.masked_fill(fresh, 0.0)
        m = m.masked_fill(fresh, EMPTY_MAXIMUM)
        k_t, v_t = k[:, t].to(wide), v[:, t].to(wide)

        top = torch.maximum(m, bonus + k_t).detach()
        past, present = torch.exp(m - top), torch.exp(bonus + k_t - top)
        outputs.append((past * a + present * v_t) / (past * b + present))

        aged = decay + m
        slip = ((m - aged) + decay).clamp(-MAX_SLIP, MAX_SLIP).detach()
        top = torch.maximum(aged, k_t).detach()
        past, present = torch.exp(aged - top + slip), torch.exp(k_t - top)
        a, b, m = past * a + present * v_t, past * b + present, top
    y = torch.stack(outputs, dim=1)
    if receptance is not None:
        y = torch.sigmoid(receptance.to(wide)) * y
    return y.to(k.dtype), torch.stack([a, b, m], dim=1)
