"""A residual connection and LayerNorm of padded channels, in every form. About 5 s."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3dist.ops import layer_norm
from i3dist.ops.layer_norm import Norm
from tests.ops.wkv_cases import TOLERANCE, assert_close

EPS = 1e-5


def add_and_norm(x, weight, bias, channels, eps, branch=None):
    return layer_norm.add_and_norm(x, Norm(weight, bias, channels, eps), branch)


def add_and_norm_naive(x, weight, bias, channels, eps, branch=None):
    return layer_norm.add_and_norm_naive(x, Norm(weight, bias, channels, eps), branch)


def inputs(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, branch: bool, device: str = "cpu"
) -> list[Tensor]:
    """x, weight, bias and perhaps a branch; 0 in padded channels."""
    random = torch.Generator().manual_seed(sum(shape))
    inside = torch.arange(shape[-1]) < channels
    shapes = [shape, shape[-1:], shape[-1:], *([shape] if branch else [])]
    parts = [torch.randn(size, generator=random) * inside for size in shapes]
    return [part.to(device, dtype).requires_grad_() for part in parts]


def outcome(form, parts: list[Tensor], channels: int) -> list[Tensor]:
    """Both results, and the gradients of all inputs, padding included in the loss."""
    x, weight, bias, *branch = parts
    results = form(x, weight, bias, channels, EPS, *branch)
    random = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for result in results:
        loss = loss + (result.double() * torch.randn(result.shape, generator=random).to(loss)).sum()
    return [*(y.detach() for y in results), *torch.autograd.grad(loss, parts)]


def by_definition(x, weight, bias, channels, eps, branch=None):
    total = x if branch is None else x + branch
    mean = total.sum(-1, keepdim=True) / channels
    inside = torch.arange(total.shape[-1], device=x.device) < channels
    centered = (total - mean) * inside
    variance = centered.square().sum(-1, keepdim=True) / channels
    return centered / (variance + eps).sqrt() * weight + bias, total


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    channels=st.integers(2, 9),
    padding=st.integers(0, 3),
    branch=st.booleans(),
)
def test_values_and_gradients_are_the_definition(
    leading: list[int], channels: int, padding: int, branch: bool
) -> None:
    parts = inputs((*leading, channels + padding), channels, torch.float64, branch)
    got, want = (outcome(form, parts, channels) for form in (add_and_norm, by_definition))
    for i, (one, two) in enumerate(zip(got, want, strict=True)):
        # The loss reaches into the padding; the gradients of what is 0 there do not matter.
        inner = slice(None) if i < 2 else slice(0, channels)
        torch.testing.assert_close(one[..., inner], two[..., inner])


def test_no_rows() -> None:
    normed, total = add_and_norm(torch.zeros(3, 0, 8), torch.ones(8), torch.zeros(8), 6, EPS)
    assert normed.shape == total.shape == (3, 0, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("shape", [(4, 512, 1184), (1184,), (2, 3, 5, 1184)])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_are_the_definition(
    dtype: torch.dtype, branch: bool, shape: tuple[int, ...], compiled: bool
) -> None:
    torch.compiler.reset()  # there is a limit to a function's compiled forms
    parts = inputs(shape, 1180, dtype, branch, "cuda")
    form = torch.compile(add_and_norm, fullgraph=True, dynamic=False) if compiled else add_and_norm
    got = outcome(form, parts, 1180)
    want = outcome(add_and_norm_naive, [p.detach().double().requires_grad_() for p in parts], 1180)
    for one, two in zip(got, want, strict=True):
        assert one.dtype == dtype
        assert_close(one[..., :1180], two[..., :1180], TOLERANCE[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight, bias = inputs((50, 64), 60, torch.float32, False, "cuda")
    spoilt = x.detach().clone()
    spoilt[7] = float("inf")
    whole, other = (add_and_norm(y, weight, bias, 60, EPS)[0] for y in (x, spoilt))
    rest = torch.arange(50, device="cuda") != 7
    assert whole[rest].equal(other[rest])
