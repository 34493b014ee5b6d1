"""A parameter's place in a flat tensor."""

import pytest
import torch

from i3dist.engine import flat_parameters
from i3dist.engine.flat_parameters import Extent


@pytest.mark.parametrize("at_once", [1, 12, 2**18])
@pytest.mark.parametrize("layout", [(9, 5), (9, 8), (16, 5), (16, 8)])
def test_packing_leaves_out_padding(
    layout: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives what the mask picks, also where rows move by less than their length."""
    monkeypatch.setattr(flat_parameters, "PACKED_AT_ONCE", at_once)
    extent = Extent(0, 128, torch.Size([9, 5]), torch.Size(layout))
    part = torch.randn(extent.size)
    expected = part[extent.mask(part.device)]
    packed = extent.pack(part)
    assert packed.equal(expected)
    assert packed.data_ptr() == part.data_ptr(), "no copy"
