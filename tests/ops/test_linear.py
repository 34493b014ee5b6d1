"""Projections against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.ops.linear import HALVED, halved, linear

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def parts(rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x [2, half of the rows, width], a weight, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, (rows + 1) // 2, width), (width, width), (2, (rows + 1) // 2, width)]
    return [torch.randn(*s, generator=generator).to(device, dtype) for s in shapes]


@pytest.mark.parametrize("rows", [2, 6, 64])
def test_halves_equal_the_whole(rows: int) -> None:
    x, weight, grad = parts(rows, 8, torch.float64, "cpu")
    found = []
    for form in (halved, F.linear):
        given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = form(*given)
        out.backward(grad)
        found.append([out.detach(), *(part.grad for part in given)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize("rows", [1000, 1001])
@pytest.mark.parametrize("compiled", [False, True])
def test_of_the_cards_width_on_a_gpu(rows: int, compiled: bool) -> None:
    width = 1184
    assert width**2 in HALVED
    x, weight, grad = parts(rows, width, torch.bfloat16, "cuda")
    x, grad = (t.flatten(0, 1)[:rows] for t in (x, grad))
    given = [x.requires_grad_(), weight.requires_grad_()]
    out = (torch.compile(linear, fullgraph=True) if compiled else linear)(*given)
    out.backward(grad)
    exact = [x.double() @ weight.double().T, grad.double() @ weight.double()]
    exact.append(grad.double().T @ x.double())
    for ours, theirs in zip([out, x.grad, weight.grad], exact, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 4e-3  # bf16 rounds by 2^-9 at most; halves are rounded before they are added
