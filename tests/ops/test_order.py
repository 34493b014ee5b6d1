"""The form that counts, which is for compiled code on a GPU, against the form that sorts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from i3dist.ops import order
from i3dist.ops.order import highest, true_first


@given(length=st.integers(1, 40), values=st.sampled_from([1, 3, 1000]), seed=st.integers(0, 2**31))
def test_counting_orders_as_sorting_does(length: int, values: int, seed: int) -> None:
    """Also where most values are equal, and where a zero has a sign."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(-values, values + 1, (4, 5, length), generator=random) * 0.5
    scores[0] *= 0.0
    sorts = orders(scores)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(order, "counts", lambda values: True)
        for counted, wanted in zip(orders(scores), sorts, strict=True):
            assert torch.equal(counted, wanted) and counted.dtype == wanted.dtype


def orders(scores: Tensor) -> list[Tensor]:
    return [highest(scores, (scores.shape[-1] + 1) // 2), true_first(scores > 0)]


@given(rows=st.integers(1, 5), length=st.integers(1, 5))
def test_both_forms_lie_in_memory_alike(rows: int, length: int) -> None:
    """Code that is compiled for the tiles of attention depends on their strides."""
    chosen = torch.ones(2, length, rows).bool().mT
    sorts = true_first(chosen)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(order, "counts", lambda values: True)
        assert true_first(chosen).stride() == sorts.stride() == (rows * length, length, 1)
