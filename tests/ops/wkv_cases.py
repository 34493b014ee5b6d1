"""Inputs of WKV, and comparison of two forms of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from i3dist.ops import wkv as fast
from i3dist.ops import wkv_naive as equations
from i3dist.ops.wkv import WkvInputs

Form = Callable[..., tuple[Tensor, Tensor]]
Run = tuple[Tensor, Tensor, list[Tensor]]  # y, final state, gradients

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}


def wkv(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The operator as a `Form`, which takes its inputs one by one."""
    return fast.wkv(WkvInputs(*inputs))


def wkv_naive(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The oracle as a `Form`."""
    return equations.wkv_naive(WkvInputs(*inputs))


class WkvCase(NamedTuple):
    decay: Tensor
    bonus: Tensor
    k: Tensor
    v: Tensor
    restart: Tensor
    state: Tensor
    receptance: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "WkvCase":
        """The case with each floating-point tensor replaced by the function of it."""
        return WkvCase(
            *(function(x) if x is not None and x.is_floating_point() else x for x in self)
        )


def make_case(
    rows: int,
    length: int,
    channels: int,
    dtype: torch.dtype,
    scale: float = 1.0,
    restarts: float = 0.05,
    seed: int = 0,
    gated: bool = False,
) -> WkvCase:
    random = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    decay = -torch.exp(torch.empty(channels).uniform_(-9.2, 3.9, generator=random))
    b = torch.exp(normal(rows, channels))
    state = torch.stack([b * normal(rows, channels), b, scale * normal(rows, channels)], dim=1)
    return WkvCase(
        decay.to(wide),
        normal(channels).to(wide),
        (scale * normal(rows, length, channels)).to(dtype),
        normal(rows, length, channels).to(dtype),
        torch.rand(rows, length, generator=random) < restarts,
        state.to(wide),
        (3.0 * normal(rows, length, channels)).to(dtype) if gated else None,
    )


def loss_of(y: Tensor, state: Tensor, seed: int = 1) -> Tensor:
    """Some smooth function of y and of what the state stands for, whatever its unit e^m."""
    random = torch.Generator().manual_seed(seed)
    a, b, m = state.unbind(1)
    weights = torch.randn(2, *a.shape, generator=random).to(a)
    loss = (y.double() * torch.randn(y.shape, generator=random).bfloat16().to(y).double()).sum()
    means = (a / b * weights[0] + (b.log() + m) * weights[1]).masked_fill(b == 0, 0.0)
    return loss + means.double().sum()


def gradients(form: Form, case: WkvCase) -> Run:
    leaves = case.map(lambda x: x.detach().clone().requires_grad_())
    y, state = form(*leaves)
    inputs = [x for x in leaves if x is not None and x.requires_grad]
    return y.detach(), state.detach(), list(torch.autograd.grad(loss_of(y, state), inputs))


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    bound = tolerance * (1.0 + want.double().abs().max())
    assert (got.double() - want.double()).abs().max() <= bound


def assert_same_run(got: Run, want: Run, tolerance: float) -> None:
    (y, state, grads), (want_y, want_state, want_grads) = got, want
    assert_close(y, want_y, tolerance)
    assert_close(state[:, 0] / state[:, 1], want_state[:, 0] / want_state[:, 1], tolerance)
    assert_close(*(s[:, 1].double().log() + s[:, 2] for s in (state, want_state)), tolerance)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert_close(grad, want_grad, tolerance)


def exact(case: WkvCase) -> WkvCase:
    """The same numbers in fp64."""
    return case.map(Tensor.double)


def gate_outside(form: Form) -> Form:
    """The form without a receptance, its result gated afterwards."""

    def gated(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *rest, receptance = inputs
        y, state = form(*rest)
        return torch.sigmoid(receptance) * y, state

    return gated
