"""The sliced loss against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.ops import cross_entropy
from i3dist.ops.cross_entropy import IGNORE, token_losses, token_losses_naive


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 30),
    slice_elements=st.sampled_from([1, 50, 2**20]),
    scale=st.sampled_from([0.1, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_slices_equal_the_definition_in_values_and_gradients(
    dtype: torch.dtype,
    close: float,
    tokens: int,
    vocab: int,
    slice_elements: int,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    # In eighths, so that logits are exact in whatever order they are added up: rounding of one of
    # 2,000 would show in its gradient.
    hidden = ((8 * scale * torch.randn(2, tokens, 8)).round() / 8).to(dtype).requires_grad_()
    head = ((8 * torch.randn(vocab, 8)).round() / 8).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (2, tokens))
    targets[torch.rand(2, tokens) < 0.3] = IGNORE
    weights = torch.randn(2, tokens)
    results = []
    for form in (token_losses, token_losses_naive):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cross_entropy, "SLICE_ELEMENTS", slice_elements)
            losses = form(hidden, head, targets)
            results.append([losses, *torch.autograd.grad((losses * weights).sum(), [hidden, head])])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert (got - want).abs().max() <= close * (1 + want.abs().max())
    assert not results[0][0][targets == IGNORE].any()


def test_no_target_gives_zero_loss_and_gradient() -> None:
    hidden, head = (torch.randn(n, 8, requires_grad=True) for n in (5, 7))
    losses = token_losses(hidden, head, torch.full((5,), IGNORE))
    assert not losses.any()
    assert not any(g.any() for g in torch.autograd.grad(losses.sum(), [hidden, head]))
