"""WKV, the recurrence of RWKV-4 (Peng et al., 2023, arXiv:2305.13048), in the device's form.

Letters: B rows, T tokens, C channels. The equations, and the meaning of the state and its gradient,
stand in `i3dist.ops.wkv_naive`, the oracle. On the CPU the work is a blocked scan, on CUDA a pair
of Triton kernels. Both are one operator to PyTorch: `torch.compile` holds it without a graph break.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from i3dist.ops import wkv_blocked
from i3dist.ops.precision import compute_dtype
from i3dist.ops.wkv_naive import empty_state

__all__ = ["empty_state", "wkv"]


def wkv(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    restart: Tensor,
    state: Tensor | None = None,
    receptance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decayed, exponentially weighted mean of the values so far, per channel; gated, if asked.

    Differentiable in all floating-point arguments; of the state in a and b, m being a constant.
    Nothing before a restart reaches what follows it, in values or in gradients, bit for bit.

    Args:
        decay: [C] fp32, negative: w, the log decay of a step.
        bonus: [C] fp32: u, added to the present token's key.
        k: [B, T, C] fp32 or bf16, any finite values; T >= 1.
        v: [B, T, C] in k's dtype.
        restart: [B, T] bool, true where the state is emptied before the token.
        state: [B, 3, C] fp32 (a, b, m), from `empty_state` or an earlier call; None is empty.
        receptance: [B, T, C] in k's dtype: y is multiplied by its sigmoid; None is no gate.

    Returns:
        y [B, T, C] in k's dtype, and the final state [B, 3, C] fp32. Inside, all is fp32.

    Raises:
        ValueError: a shape or dtype is wrong, or T = 0.
    """
    if state is None:
        state = empty_state(k.shape[0], k.shape[-1], k.device, compute_dtype(k))
    _check(decay, bonus, k, v, restart, state, receptance)
    y, final, _ = _wkv(decay, bonus, k, v, restart, state, receptance)
    return y, final


def _check(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    restart: Tensor,
    state: Tensor,
    receptance: Tensor | None,
) -> None:
    if k.ndim != 3 or k.shape[1] == 0:
        raise ValueError(f"wkv: k must be [B, T, C] with T >= 1, got {list(k.shape)}")
    rows, length, channels = k.shape
    wanted = {
        "decay": (decay, (channels,)),
        "bonus": (bonus, (channels,)),
        "v": (v, (rows, length, channels)),
        "restart": (restart, (rows, length)),
        "state": (state, (rows, 3, channels)),
        "receptance": (v if receptance is None else receptance, (rows, length, channels)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"wkv: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if v.dtype != k.dtype or restart.dtype != torch.bool:
        raise ValueError(
            f"wkv: k and v must share a dtype and restart be bool, got {k.dtype}, {v.dtype} and "
            f"{restart.dtype}"
        )
    if receptance is not None and receptance.dtype != k.dtype:
        raise ValueError(
            f"wkv: receptance and k must share a dtype, got {receptance.dtype} and {k.dtype}"
        )


@functools.cache
def _form(device: str) -> ModuleType:
    """The module that computes on this kind of device."""
    if device == "cuda" and importlib.util.find_spec("triton"):
        from i3dist.ops import wkv_triton  # PyTorch's CPU wheel comes without triton

        return wkv_triton
    return wkv_blocked


@torch.library.custom_op("i3dist::wkv", mutates_args=())
def _wkv(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    restart: Tensor,
    state: Tensor,
    receptance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state, and the state that enters each block of tokens [B, N, 3, C]."""
    return _form(k.device.type).forward(decay, bonus, k, v, restart, state, receptance)


@torch.library.custom_op("i3dist::wkv_backward", mutates_args=())
def _wkv_backward(
    grad_y: Tensor,
    grad_final: Tensor,
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    restart: Tensor,
    entries: Tensor,
    final: Tensor,
    receptance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of decay, bonus, k, v, the initial state, and receptance (no elements if None)."""
    form = _form(k.device.type)
    return form.backward(
        grad_y, grad_final, decay, bonus, k, v, restart, entries, final, receptance
    )


@_wkv.register_fake
def _wkv_fake(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    restart: Tensor,
    state: Tensor,
    receptance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, channels = k.shape
    final = k.new_empty(rows, 3, channels, dtype=compute_dtype(k))
    block = _form(k.device.type).BLOCK
    blocks = (length + block - 1) // block
    return k.new_empty(k.shape), final, final.new_empty(rows, blocks, 3, channels)


@_wkv_backward.register_fake
def _wkv_backward_fake(
    grad_y: Tensor,
    grad_final: Tensor,
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    restart: Tensor,
    entries: Tensor,
    final: Tensor,
    receptance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = [x.new_empty(x.shape) for x in (decay, bonus, k, v, final)]
    grad_receptance = k.new_empty(0 if receptance is None else receptance.shape)
    return like[0], like[1], like[2], like[3], like[4], grad_receptance


def _save(
    ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, _, receptance = inputs
    _, final, entries = output
    ctx.save_for_backward(*tensors, entries, final, receptance)


def _differentiate(
    ctx: Any, grad_y: Tensor, grad_final: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    decay, bonus, k, v, state, receptance = _wkv_backward(grad_y, grad_final, *saved)
    return decay, bonus, k, v, None, state, None if saved[-1] is None else receptance


_wkv.register_autograd(_differentiate, setup_context=_save)
