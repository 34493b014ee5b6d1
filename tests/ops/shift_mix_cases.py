"""Inputs of norm_shift_mix, and comparison of two forms of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.wkv_cases import assert_close

Form = Callable[..., tuple[tuple[Tensor, ...], Tensor]]


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    mixes: Tensor
    restart: Tensor
    shift: Tensor
    channels: int
    eps: float = 1e-5

    def map(self, function: Callable[[Tensor], Tensor]) -> "Case":
        """The case with each floating-point tensor replaced by the function of it."""
        return Case(
            *(function(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in self)
        )

    def floats(self) -> list[Tensor]:
        return [x for x in self if isinstance(x, Tensor) and x.is_floating_point()]


class Run(NamedTuple):
    mixed: tuple[Tensor, ...]
    last: Tensor
    gradients: list[Tensor]  # of x, weight, bias, mixes and shift

    def tensors(self) -> list[Tensor]:
        return [*self.mixed, self.last, *self.gradients]


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
) -> Case:
    """A case of `channels` + `padding` computed channels; parameters may have another dtype."""
    random = torch.Generator().manual_seed(seed)
    width = channels + padding

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * (torch.arange(width) < channels)

    own = parameters or dtype
    return Case(
        (2.0 * normal(rows, length, width) + normal(rows, length, width)).to(dtype),
        (1.0 + 0.3 * normal(width)).where(torch.arange(width) < channels, 0.0).to(own),
        normal(width).to(own),
        (0.5 * normal(mixes, width)).to(own),
        torch.rand(rows, length, generator=random) < restarts,
        normal(rows, width).to(dtype),
        channels,
    )


def loss_of(mixed: tuple[Tensor, ...], last: Tensor, seed: int = 1) -> Tensor:
    """A weighted sum of all results, padding included."""
    random = torch.Generator().manual_seed(seed)
    weights = (torch.randn(y.shape, generator=random).bfloat16().to(y) for y in (*mixed, last))
    products = [(y.double() * w).sum() for y, w in zip((*mixed, last), weights, strict=True)]
    return torch.stack(products).sum()


def run(form: Form, case: Case) -> Run:
    case = case.map(lambda x: x.detach().clone().requires_grad_())
    mixed, last = form(*case)
    loss = loss_of(mixed, last)
    gradients = torch.autograd.grad(loss, case.floats(), materialize_grads=True)
    return Run(tuple(y.detach() for y in mixed), last.detach(), list(gradients))


def assert_same_run(got: Run, want: Run, tolerance: float) -> None:
    for one, two in zip(got.tensors(), want.tensors(), strict=True):
        assert one.shape == two.shape
        assert_close(one, two, tolerance)


def assert_equal_run(got: Run, want: Run) -> None:
    for one, two in zip(got.tensors(), want.tensors(), strict=True):
        assert torch.equal(one, two)


def split_form(form: Form, at: int) -> Form:
    """The form in two calls: the tokens before `at`, and the rest with the shift carried in."""

    def split(x, weight, bias, mixes, restart, shift, channels, eps):
        pieces = []
        for part in (slice(None, at), slice(at, None)):
            if x[:, part].shape[1]:
                rest = restart[:, part], shift, channels, eps
                mixed, shift = form(x[:, part], weight, bias, mixes, *rest)
                pieces.append(mixed)
        return tuple(torch.cat(mix, dim=1) for mix in zip(*pieces, strict=True)), shift

    return split


def since(form: Form, case: Case, at: int) -> list[Tensor]:
    """Values of the tokens from `at` on, and the gradient of x there of a loss of those values."""
    x = case.x.clone().requires_grad_()
    mixed, last = form(x, *case[1:])
    later = tuple(y[:, at:] for y in mixed)
    (gradient,) = torch.autograd.grad(loss_of(later, last), x)
    return [*(y.detach() for y in later), last.detach(), gradient[:, at:]]


def overwrite_before(case: Case, at: int, value: float) -> Case:
    """The case with other x before `at`, and another shift."""
    before = (torch.arange(case.x.shape[1], device=case.x.device) < at)[None, :, None]
    shift = torch.full_like(case.shift, value)
    return case._replace(x=case.x.masked_fill(before, value), shift=shift)
