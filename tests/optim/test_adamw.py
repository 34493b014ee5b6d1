"""The flat AdamW against PyTorch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3dist.optim.adamw import STATES, update
from i3dist.optim.flat import FlatOptimizer

OPTIONS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(seed: int, steps: int, size: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=random, dtype=torch.float64) for _ in range(steps)]


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 50),
    rates=st.lists(st.floats(0.0, 0.1), min_size=1, max_size=5),
    scale=st.floats(1.0, 100.0),
)
@settings(max_examples=30, deadline=None)
def test_equals_the_library(seed: int, size: int, rates: list[float], scale: float) -> None:
    theirs = torch.nn.Parameter(gradients(seed, 1, size)[0])
    library = torch.optim.AdamW([theirs], **OPTIONS)
    ours, step = theirs.detach().clone(), torch.zeros((), dtype=torch.float64)
    means = torch.zeros_like(ours), torch.zeros_like(ours)
    for lr, gradient in zip(rates, gradients(seed + 1, len(rates), size), strict=True):
        library.param_groups[0]["lr"] = lr
        theirs.grad = gradient / scale
        library.step()
        scalars = (torch.tensor(x, dtype=torch.float64) for x in (lr, scale, 0.0))
        update(ours, gradient, *means, step, *scalars, **OPTIONS)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)
    for mine, key in zip(means, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(mine, library.state[theirs][key], rtol=1e-9, atol=1e-12)
    assert step == len(rates)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_equals_the_library_and_skips_what_is_not_finite(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    start = torch.linspace(-1, 1, 1000, device=device)
    pair = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    ours = FlatOptimizer(pair[:1], update, STATES, compiled=True, lr=1e-3, **OPTIONS)
    theirs = torch.optim.AdamW(pair[1:], **OPTIONS)
    for i, gradient in enumerate(gradients(0, 6, 1000)):
        bad = i in (0, 3)
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.01 * (i + 1)
        ours.found_inf = torch.tensor(float(bad), device=device)
        ours.grad_scale = torch.tensor(float("inf") if bad else 3.0, device=device)
        pair[0].grad = gradient.float().to(device) * (float("nan") if bad else 1.0)
        pair[1].grad = gradient.float().to(device) / 3.0
        before = pair[0].detach().clone()
        ours.step()
        assert pair[0].equal(before) == bad
        if not bad:
            theirs.step()
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
    assert float(ours.state[pair[0]]["step"]) == 4
