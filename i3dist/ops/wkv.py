"""WKV, the recurrence of RWKV-4 (Peng et al., 2023, arXiv:2305.13048), in the device's form.

Notation: B rows, T tokens, C channels, N blocks of tokens. `i3dist.ops.wkv_naive` states the
equations and the meaning of the state and its gradient; it is the oracle. The CPU runs a blocked
scan, CUDA a pair of Triton kernels. Both are one operator to PyTorch, so `torch.compile` has no
graph break here.
"""

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from i3dist.ops import wkv_blocked
from i3dist.ops.ahead import compile_ahead, wait_for
from i3dist.ops.checks import check_dtypes, check_shapes, is_plain
from i3dist.ops.precision import compute_dtype
from i3dist.ops.wkv_naive import Gradients, WkvInputs, WkvSaved, empty_state

__all__ = ["WkvInputs", "compile_wkv", "empty_state", "wkv"]


def wkv(inputs: WkvInputs) -> tuple[Tensor, Tensor]:
    """Exponentially weighted mean of the values so far, per channel, with decay; optionally gated.

    Differentiable in all floating-point inputs; in the state's a and b, with m as a constant.
    Nothing before a restart reaches what follows it, in values or in gradients, bit for bit.

    Returns:
        y [B, T, C] in k's dtype, and the final state [B, 3, C] fp32. Computed in fp32.

    Raises:
        ValueError: a shape or dtype is wrong, or T = 0.
    """
    decay, bonus, k, v, restart, state, receptance = inputs
    if state is None:
        state = empty_state(k.shape[0], k.shape[-1], k.device, compute_dtype(k))
    inputs = WkvInputs(decay, bonus, k, v, restart, state, receptance)
    _check(inputs)
    # As an operator of PyTorch's, the first call would load PyTorch's compiler: seconds.
    y, final, _ = _forward(inputs) if is_plain() else _wkv(*inputs)
    return y, final


def compile_wkv(
    length: int, channels: int, dtype: torch.dtype, device: torch.device, backward: bool = False
) -> None:
    """Begin to compile what gated `wkv` of `length` tokens launches, if `device` is a GPU.

    These are the slowest kernels of reading a prompt and of training: they can be compiled while
    weights are read, or in a process of their own.

    Args:
        length: T.
        channels: C.
        dtype: of k, v and receptance.
        device: where they will be.
        backward: whether to compile backward rather than forward.
    """
    x = torch.empty(1, length, channels, dtype=dtype, device=device)
    curve = torch.empty(channels, device=device)
    restart = torch.empty(1, length, dtype=torch.bool, device=device)
    state = torch.empty(1, 3, channels, dtype=compute_dtype(x), device=device)
    form = form_of(device, backward)
    if backward:
        saved = WkvSaved(curve, curve, x, x, restart, state.unsqueeze(1), state, x)
        compile_ahead(form, x, state, saved)
    else:
        compile_ahead(form, WkvInputs(curve, curve, x, x, restart, state, x))


def form_of(device: torch.device, backward: bool = False) -> Callable[..., Any]:
    """What computes `wkv`, or its gradients, on a kind of device."""
    module = _form(device.type)
    return module.backward if backward else module.forward


def _check(inputs: WkvInputs) -> None:
    decay, bonus, k, v, restart, state, receptance = inputs
    if k.ndim != 3 or k.shape[1] == 0:
        raise ValueError(f"wkv: k must be [B, T, C] with T >= 1, got {list(k.shape)}")
    rows, length, channels = k.shape
    wanted = {
        "decay": (decay, (channels,)),
        "bonus": (bonus, (channels,)),
        "v": (v, (rows, length, channels)),
        "restart": (restart, (rows, length)),
        "state": (state, (rows, 3, channels)),
        "receptance": (receptance, (rows, length, channels)),
    }
    check_shapes("wkv", wanted)
    check_dtypes("wkv", {"k": k, "v": v, "receptance": receptance}, restart)


@functools.cache
def _form(device: str) -> ModuleType:
    """The module that computes on this kind of device."""
    if device == "cuda" and importlib.util.find_spec("triton"):
        from i3dist.ops import wkv_triton  # PyTorch's CPU wheel comes without triton

        return wkv_triton
    return wkv_blocked


_READ = "Tensor decay, Tensor bonus, Tensor k, Tensor v, Tensor restart"


@torch.library.custom_op(
    "i3dist::wkv",
    mutates_args=(),
    schema=f"({_READ}, Tensor state, Tensor? receptance) -> (Tensor, Tensor, Tensor)",
)
def _wkv(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state, and the state that enters each block of tokens [B, N, 3, C]."""
    return _forward(WkvInputs(*inputs))


def _forward(inputs: WkvInputs) -> tuple[Tensor, Tensor, Tensor]:
    form: Callable[[WkvInputs], tuple[Tensor, Tensor, Tensor]]
    form = _form(inputs.k.device.type).forward
    return wait_for(form)(inputs)


@torch.library.custom_op(
    "i3dist::wkv_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor grad_final, {_READ}, Tensor entries, Tensor final, "
    "Tensor? receptance) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _wkv_backward(grad_y: Tensor, grad_final: Tensor, *saved: Any) -> Gradients:
    """Gradients of decay, bonus, k, v, the initial state, and receptance (no elements if None)."""
    given = WkvSaved(*saved)
    return wait_for(_form(given.k.device.type).backward)(grad_y, grad_final, given)


@_wkv.register_fake
def _wkv_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = WkvInputs(*inputs)
    k = given.k
    compile_ahead(_form(k.device.type).forward, given)
    rows, length, channels = k.shape
    final = k.new_empty(rows, 3, channels, dtype=compute_dtype(k))
    block = _form(k.device.type).BLOCK
    blocks = (length + block - 1) // block
    return k.new_empty(k.shape), final, final.new_empty(rows, blocks, 3, channels)


@_wkv_backward.register_fake
def _wkv_backward_fake(grad_y: Tensor, grad_final: Tensor, *saved: Any) -> Gradients:
    given = WkvSaved(*saved)
    decay, bonus, k, v, _, _, final, receptance = given
    compile_ahead(_form(k.device.type).backward, grad_y, grad_final, given)
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
