"""WKV as a blocked scan in plain PyTorch: the CPU form; it is correct on any device.

Notation: B rows, T tokens, C channels, N blocks of L tokens (T = N L after padding).

The running maximum m and then (a, b) are first-order recurrences. Each is solved inside all blocks
at once (L steps), then across blocks (N steps), then filled in (L steps); the rest is elementwise
over the whole tensor. The forward pass keeps the state that enters each block. The backward pass
recomputes the other states from these and runs one more such recurrence, reversed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.ops.precision import compute_dtype, widen
from i3dist.ops.wkv_naive import EMPTY_MAXIMUM, MAX_SLIP, Gradients, WkvInputs, WkvSaved

DROWNS = 40.0  # e^-40 of what it is added to is lost in rounding, in fp64 too
BLOCK = 32  # L, by measurement at 4 x 512 x 256; shorter sequences are one block


class _Cuts:
    """Where the recurrence is cut: nothing crosses, not even as a product of zero and infinity."""

    def __init__(self, restart: Tensor, block: int):
        blocked = restart.unflatten(1, (-1, block)).unsqueeze(-1)
        self.index = restart.nonzero(as_tuple=True)
        self._steps = blocked.unbind(2)  # [B, N, 1] each
        self._in_step = restart.view(-1, block).any(0).tolist()
        self._blocks = blocked.any(2).unbind(1)  # [B, 1] each
        self._in_block = blocked.flatten(2).any(2).any(0).tolist()

    def at_step(self, x: Tensor, step: int, empty: float) -> Tensor:
        """x [..., B, N, C] as it enters each block's token `step`."""
        return x.masked_fill(self._steps[step], empty) if self._in_step[step] else x

    def through_block(self, x: Tensor, block: int, empty: float) -> Tensor:
        """What of x [..., B, C] reaches the other end of a block."""
        return x.masked_fill(self._blocks[block], empty) if self._in_block[block] else x


@dataclass(frozen=True)
class _Inputs:
    """Arguments in the dtype of computation, padded to whole blocks."""

    decay: Tensor  # [C]
    bonus: Tensor  # [C]
    k: Tensor  # [B, T, C]
    v: Tensor  # [B, T, C]
    cuts: _Cuts
    length: int  # T without the padding
    block: int  # L


class _Solved(NamedTuple):
    """The recurrence's coefficients, and the state that each token finds. All [B, T, C]."""

    past: Tensor  # e^{w + m_{t-1} - m_t}, 0 at a restart
    present: Tensor  # e^{k_t - m_t}
    a: Tensor  # a_{t-1}
    b: Tensor  # b_{t-1}
    m: Tensor  # m_{t-1}


class _Mixed(NamedTuple):
    """y, and its derivatives by a_{t-1} and by v_t. All [B, T, C]."""

    y: Tensor
    past: Tensor
    present: Tensor


def forward(given: WkvInputs) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, C] in k's dtype, the final state [B, 3, C], and each block's first [B, N, 3, C]."""
    decay, bonus, k, v, restart, state, receptance = given
    inputs = _prepare(decay, bonus, k, v, restart)
    assert state is not None
    solved, final, entries = _solve(inputs, state.to(inputs.k.dtype))
    y = _mix(inputs, solved).y
    if receptance is not None:
        y[:, : inputs.length].mul_(_gate(receptance))
    return _trim(y, k), final, entries


def backward(grad_y: Tensor, grad_final: Tensor, saved: WkvSaved) -> Gradients:
    """Gradients of decay, bonus, k, v, the initial state, and receptance (no elements if None).

    Args:
        grad_y: [B, T, C] in k's dtype.
        grad_final: [B, 3, C] fp32, of the final state.
        saved: what the forward pass read and passed through.
    """
    decay, bonus, k, v, restart, entries, final, receptance = saved
    inputs = _prepare(decay, bonus, k, v, restart)
    solved, _, _ = _solve(inputs, entries[:, 0], entries)
    mixed = _mix(inputs, solved)
    grad_y, grad_receptance = grad_y.to(mixed.y.dtype), k.new_empty(0)
    if receptance is not None:
        gate = _gate(receptance)
        grad_y = grad_y * gate
        grad_receptance = (1.0 - gate).mul_(grad_y).mul_(mixed.y[:, : inputs.length]).to(k.dtype)
    grad_y = _pad(grad_y, inputs.block)

    grad_v = mixed.present.mul_(grad_y)
    grad_bonus_k = (inputs.v - mixed.y).mul_(grad_v)
    found = _adjoint(inputs, solved, mixed, grad_y, grad_final)
    left_a, left_b = found[:, :, 1:]  # gradients of the state that each token leaves

    grad_k = torch.addcmul(left_b, inputs.v, left_a).mul_(solved.present).add_(grad_bonus_k)
    grad_v.addcmul_(solved.present, left_a)
    grad_decay = (solved.a * left_a).addcmul_(solved.b, left_b).mul_(solved.past)
    grad_state = torch.zeros_like(final)
    grad_state[:, :2] = found[:, :, 0].transpose(0, 1)
    return (
        grad_decay.sum((0, 1)).to(decay.dtype),
        grad_bonus_k.sum((0, 1)).to(bonus.dtype),
        _trim(grad_k, k),
        _trim(grad_v, v),
        grad_state,
        grad_receptance,
    )


def _gate(receptance: Tensor) -> Tensor:
    """Its sigmoid, in the dtype of computation."""
    return widen(receptance).contiguous().sigmoid()


def _prepare(decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, restart: Tensor) -> _Inputs:
    wide, length = compute_dtype(k), k.shape[1]
    block = min(BLOCK, length)
    cuts = _Cuts(F.pad(restart, (0, -length % block)), block)
    k, v = _pad(k.to(wide), block), _pad(v.to(wide), block)
    return _Inputs(decay.to(wide), bonus.to(wide), k, v, cuts, length, block)


def _pad(x: Tensor, block: int) -> Tensor:
    """[B, T, C] with zeros up to whole blocks."""
    missing = -x.shape[1] % block
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _trim(x: Tensor, like: Tensor) -> Tensor:
    """Undo `_pad`, in the dtype of `like`."""
    return x[:, : like.shape[1]].to(like.dtype).contiguous()


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., B, T, C] -> [..., B, N, L, C]."""
    return x.unflatten(-2, (-1, block))


def _solve(
    inputs: _Inputs, start: Tensor, entries: Tensor | None = None
) -> tuple[_Solved, Tensor, Tensor]:
    """The state that each token finds, the final one [B, 3, C], and each block's [B, N, 3, C].

    `start` is the initial state; `entries` saves work where they are known.
    """
    k, cuts = inputs.k, inputs.cuts
    rows, length, channels = k.shape
    m, aged = k.new_empty(rows, length + 1, channels), torch.empty_like(k)
    m[:, 0] = start[:, 2]
    entering_m = _enter_maximum(m[:, 0], inputs) if entries is None else entries[:, :, 2]
    _fill_maximum(m[:, 1:], aged, entering_m, inputs)
    present = (k - m[:, 1:]).exp_()
    slip = _slip(m[:, :-1], aged, inputs)
    past = aged.sub_(m[:, 1:]).add_(slip).exp_()

    ab = k.new_empty(2, rows, length + 1, channels)
    ab[:, :, 0] = start[:, :2].transpose(0, 1)
    torch.mul(present, inputs.v, out=ab[0, :, 1:])
    ab[1, :, 1:] = present
    steps = range(inputs.block)
    if entries is None:
        entering_ab = _enter_linear(ab[:, :, 1:], past, ab[:, :, 0], inputs, steps)
        entries = torch.stack([*entering_ab, entering_m], dim=2)
    else:
        entering_ab = entries[:, :, :2].movedim(2, 0)
    _fill_linear(ab[:, :, 1:], past, entering_ab, inputs, steps)

    final = torch.stack([*ab[:, :, inputs.length], m[:, inputs.length]], dim=1)
    a, b, m = ab[0, :, :-1], ab[1, :, :-1], m[:, :-1]
    for part, empty in ((a, 0.0), (b, 0.0), (m, EMPTY_MAXIMUM)):
        part[cuts.index] = empty
    return _Solved(past, present, a, b, m), final, entries


def _mix(inputs: _Inputs, solved: _Solved) -> _Mixed:
    """Read the state: the weighted mean of what the past holds and the present token."""
    lead = (solved.m - inputs.k).sub_(inputs.bonus)
    past = lead.clamp_(max=DROWNS).exp_()
    present = (past * solved.b).add_(1.0).reciprocal_()
    past.mul_(present)
    return _Mixed((past * solved.a).addcmul_(present, inputs.v), past, present)


def _adjoint(
    inputs: _Inputs, solved: _Solved, mixed: _Mixed, grad_y: Tensor, grad_final: Tensor
) -> Tensor:
    """Gradient of the (a, b) that each token finds, and of the final (a, b): [2, B, T + 1, C]."""
    rows, length, channels = grad_y.shape
    found = grad_y.new_empty(2, rows, length + 1, channels)
    torch.mul(mixed.past, grad_y, out=found[0, :, :-1])
    torch.mul(found[0, :, :-1], mixed.y, out=found[1, :, :-1]).neg_()
    found[:, :, -1] = 0.0
    found[:, :, inputs.length] = grad_final[:, :2].transpose(0, 1)
    steps = range(inputs.block)[::-1]
    tokens, past = found[:, :, :-1], solved.past
    entering = _enter_linear(tokens, past, found[:, :, -1], inputs, steps)
    _fill_linear(tokens, past, entering, inputs, steps)
    return found


def _enter_maximum(start: Tensor, inputs: _Inputs) -> Tensor:
    """The m that enters each block, [B, N, C]; `start` [B, C] enters the first."""
    decay, cuts = inputs.decay, inputs.cuts
    keys = _blocks(inputs.k, inputs.block).unbind(2)
    inside = keys[0]
    for step in range(1, inputs.block):
        entering = cuts.at_step(inside, step, EMPTY_MAXIMUM)
        inside = torch.maximum(entering + decay, keys[step])

    carries = [start]
    for block, reached in enumerate(inside.unbind(1)):
        through = cuts.through_block(carries[-1], block, EMPTY_MAXIMUM)
        carries.append(torch.maximum(through + decay * inputs.block, reached))
    return torch.stack(carries[:-1], dim=1)


def _fill_maximum(m: Tensor, aged: Tensor, entering: Tensor, inputs: _Inputs) -> None:
    """aged [B, T, C] <- w + m_{t-1}, empty at a restart; m [B, T, C] <- max(aged, k_t).

    `entering` [B, N, C] is the m that enters each block.
    """
    views = (_blocks(x, inputs.block).unbind(2) for x in (inputs.k, aged, m))
    for step, (key, old, new) in enumerate(zip(*views, strict=True)):
        found = inputs.cuts.at_step(entering, step, EMPTY_MAXIMUM)
        torch.add(found, inputs.decay, out=old)
        entering = torch.maximum(old, key, out=new)


def _slip(m: Tensor, aged: Tensor, inputs: _Inputs) -> Tensor:
    """What rounding took from `aged`, limited: w + m_{t-1} - aged, [B, T, C].

    The m that enters a block is rounded once where the steps before it are rounded L times, so its
    first token takes up to L slips.
    """
    slip = (m - aged).add_(inputs.decay)
    limit = MAX_SLIP * inputs.block
    first = slip[:, :: inputs.block].clamp(-limit, limit)
    slip.clamp_(-MAX_SLIP, MAX_SLIP)[:, :: inputs.block] = first
    slip[inputs.cuts.index] = 0.0  # what m was before a restart, NaN perhaps, is of no account
    return slip


def _enter_linear(x: Tensor, past: Tensor, start: Tensor, inputs: _Inputs, steps: range) -> Tensor:
    """What enters each block, [2, B, N, C], in the recurrence that `_fill_linear` fills in.

    `start` [2, B, C] enters the first block; the last, where `steps` descend.
    """
    cuts = inputs.cuts
    xs, pasts = _blocks(x, inputs.block).unbind(3), _blocks(past, inputs.block).unbind(2)
    inside = xs[steps[0]]
    for step in steps[1:]:
        inside = torch.addcmul(xs[step], pasts[step], cuts.at_step(inside, step, 0.0))

    through = _blocks(past, inputs.block).prod(2)
    entering = torch.empty_like(inside)
    carry = start
    for block in range(through.shape[1])[:: steps.step]:
        entering[:, :, block] = carry
        carry = cuts.through_block(carry, block, 0.0)
        carry = torch.addcmul(inside[:, :, block], through[:, block], carry)
    return entering


def _fill_linear(x: Tensor, past: Tensor, entering: Tensor, inputs: _Inputs, steps: range) -> None:
    """x_t <- x_t + past_t x_{t-1}, or x_t at a restart, in place.

    Args:
        x: [2, B, T, C].
        past: [B, T, C].
        entering: [2, B, N, C], what enters each block.
        inputs: for the restarts and the length of a block.
        steps: positions inside a block in the order of the scan; where they descend, x_{t+1} takes
            the place of x_{t-1}.
    """
    xs, pasts = _blocks(x, inputs.block).unbind(3), _blocks(past, inputs.block).unbind(2)
    for step in steps:
        found = inputs.cuts.at_step(entering, step, 0.0)
        entering = xs[step].addcmul_(pasts[step], found)
