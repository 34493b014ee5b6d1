"""The compiled form of an order, which counts, against the form that sorts."""

import pytest
import torch

from i3dist.ops.order import highest, true_first


@pytest.mark.parametrize("length", [1, 7, 64])
def test_counting_orders_as_sorting_does(length: int) -> None:
    """Also where most values are equal, and where a zero has a sign."""
    forms = (lambda x: highest(x, (length + 1) // 2), lambda x: true_first(x > 0))
    for form in forms:
        counted = torch.compile(form, backend="eager", fullgraph=True, dynamic=False)
        for values in (1, 3, 1000):
            random = torch.Generator().manual_seed(values)
            scores = torch.randint(-values, values + 1, (4, 5, length), generator=random) * 0.5
            scores[0] *= 0.0
            assert torch.equal(counted(scores), form(scores))
            assert counted(scores).dtype == form(scores).dtype
