"""RWKV-4's WKV as its equations read: a loop over time, plain autograd. The fast forms' oracle.

Letters: B rows, T tokens, C channels. Per channel, with decay w < 0 and bonus u:

    y_t = (a_{t-1} + e^{u+k_t} v_t) / (b_{t-1} + e^{u+k_t})
    a_t = e^w a_{t-1} + e^{k_t} v_t
    b_t = e^w b_{t-1} + e^{k_t}

Given a receptance r, what is returned is sigmoid(r_t) y_t.

State is [B, 3, C]: a and b divided by e^m, and m, the running maximum of the exponents. m only
fixes the unit in which a and b are written, so it is a constant to differentiation: the gradient of
a and b is taken at fixed m, and m has none. That is exact for whatever depends on the state by
a e^m and b e^m alone, as a later call does.
"""

import torch
from torch import Tensor

from i3dist.ops.precision import compute_dtype

# Below every exponent, yet finite: no difference of two exponents is NaN.
EMPTY_MAXIMUM = torch.finfo(torch.float32).min
# w + m is rounded, and the same way step after step, so a and b take up the difference. Where m is
# so large that it exceeds this (|m| > 8192), they would drift out of range: the rounding stands.
MAX_SLIP = 2.0**-11


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


def wkv_naive(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    restart: Tensor,
    state: Tensor | None = None,
    receptance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """WKV one token after another; arguments and results are those of `i3dist.ops.wkv.wkv`."""
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
