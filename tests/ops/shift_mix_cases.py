"""Inputs of norm_shift_mix, and comparison of two forms of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i3dist.ops import shift_mix
from i3dist.ops.shift_mix import MixInputs
from tests.ops.wkv_cases import assert_close

Form = Callable[..., tuple[tuple[Tensor, ...], Tensor, Tensor]]


def norm_shift_mix(*inputs, goes_on: bool = True) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The operator as a `Form`, which takes its inputs one by one."""
    return shift_mix.norm_shift_mix(MixInputs(*inputs), goes_on)


def norm_shift_mix_naive(*inputs) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The oracle as a `Form`."""
    return shift_mix.norm_shift_mix_naive(MixInputs(*inputs))


class MixCase(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    mixes: Tensor
    restart: Tensor
    shift: Tensor
    channels: int
    eps: float = 1e-5
    branch: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "MixCase":
        """The case with each floating-point tensor replaced by the function of it."""
        return MixCase(
            *(function(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in self)
        )

    def floats(self) -> list[Tensor]:
        return [x for x in self if isinstance(x, Tensor) and x.is_floating_point()]


class Run(NamedTuple):
    results: list[Tensor]  # the mixed, the last and the total
    gradients: list[Tensor]  # of x, weight, bias, mixes, shift and branch

    def tensors(self) -> list[Tensor]:
        return [*self.results, *self.gradients]


def make_case(
    rows: int,
    length: int,
    channels: int,
    padding: int,
    mixes: int,
    dtype: torch.dtype,
    restarts: float = 0.1,
    seed: int = 0,
    parameters: torch.dtype | None = None,
    branch: bool = False,
) -> MixCase:
    """A case of `channels` + `padding` computed channels; parameters may have another dtype."""
    random = torch.Generator().manual_seed(seed)
    width = channels + padding

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * (torch.arange(width) < channels)

    own = parameters or dtype
    return MixCase(
        (2.0 * normal(rows, length, width) + normal(rows, length, width)).to(dtype),
        (1.0 + 0.3 * normal(width)).where(torch.arange(width) < channels, 0.0).to(own),
        normal(width).to(own),
        (0.5 * normal(mixes, width)).to(own),
        torch.rand(rows, length, generator=random) < restarts,
        normal(rows, width).to(dtype),
        channels,
        branch=normal(rows, length, width).to(dtype) if branch else None,
    )


def results_of(form: Form, case: MixCase) -> list[Tensor]:
    mixed, last, total = form(*case)
    if case.branch is None:  # then it is x, which nothing keeps from a gradient in its padding
        total = total.where(torch.arange(total.shape[-1], device=total.device) < case.channels, 0.0)
    return [*mixed, last, total]


def loss_of(results: Sequence[Tensor], seed: int = 1) -> Tensor:
    """A weighted sum of all results, padding included."""
    random = torch.Generator().manual_seed(seed)
    weights = (torch.randn(y.shape, generator=random).bfloat16().to(y) for y in results)
    products = [(y.double() * w).sum() for y, w in zip(results, weights, strict=True)]
    return torch.stack(products).sum()


def run(form: Form, case: MixCase) -> Run:
    case = case.map(lambda x: x.detach().clone().requires_grad_())
    results = results_of(form, case)
    gradients = torch.autograd.grad(loss_of(results), case.floats(), materialize_grads=True)
    return Run([y.detach() for y in results], list(gradients))


def assert_same_run(got: Run, want: Run, tolerance: float) -> None:
    for one, two in zip(got.tensors(), want.tensors(), strict=True):
        assert one.shape == two.shape
        assert_close(one, two, tolerance)


def assert_equal_run(got: Run, want: Run) -> None:
    for one, two in zip(got.tensors(), want.tensors(), strict=True):
        assert torch.equal(one, two)


def split_form(form: Form, at: int) -> Form:
    """The form in two calls: the tokens before `at`, and the rest with the shift carried in."""

    def split(x, weight, bias, mixes, restart, shift, channels, eps, branch):
        pieces = []
        for part in (slice(None, at), slice(at, None)):
            if x[:, part].shape[1]:
                rest = restart[:, part], shift, channels, eps
                addend = None if branch is None else branch[:, part]
                mixed, shift, total = form(x[:, part], weight, bias, mixes, *rest, addend)
                pieces.append((*mixed, total))
        *mixed, total = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
        return tuple(mixed), shift, total

    return split


def add_outside(form: Form) -> Form:
    """The form without a branch, on an x to which the branch has been added."""

    def added(x, *rest):
        *rest, branch = rest
        inside = torch.arange(x.shape[-1], device=x.device) < rest[-2]
        return form((x + branch).where(inside, 0.0), *rest)

    return added


def since(form: Form, case: MixCase, at: int) -> list[Tensor]:
    """Values of the tokens from `at` on, and the gradient of x there of a loss of those values."""
    case = case._replace(x=case.x.clone().requires_grad_())
    later = [y[:, at:] if y.ndim == 3 else y for y in results_of(form, case)]
    (gradient,) = torch.autograd.grad(loss_of(later), case.x)
    return [*(y.detach() for y in later), gradient[:, at:]]


def overwrite_before(case: MixCase, at: int, value: float) -> MixCase:
    """The case with other x before `at`, and another shift."""
    before = (torch.arange(case.x.shape[1], device=case.x.device) < at)[None, :, None]
    shift = torch.full_like(case.shift, value)
    return case._replace(x=case.x.masked_fill(before, value), shift=shift)
