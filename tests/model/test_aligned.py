"""Computing on padded channels, and on slices of flat tensors, changes nothing but rounding."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3dist.config import ModelSettings
from i3dist.engine.flat_parameters import FlatModel
from i3dist.model.layers import ALIGNMENT, Channels, LayerNorm
from i3dist.model.lm import I3LM, by_decay
from tests.model.conftest import BOS, SMALL, each_compressor
from tests.model.streams import depth_of, empty, stream

# Width and heads asked for: 24 -> 32, 40 (8 heads of 5 -> 16), 1 head of 17 -> 32, 16 as it is.
SHAPES = [(24, 4), (40, 8), (17, 1), (16, 2)]
Arguments = tuple[Tensor, Tensor, Tensor, object, Tensor]


def twins(
    width: int, heads: int, dtype: torch.dtype, compressor: str = "records"
) -> tuple[I3LM, I3LM]:
    """The same model with padded channels and without."""
    changes = {"d_model": width, "heads": heads, "compressor": compressor}
    sizes = ModelSettings.model_validate(SMALL | changes)
    torch.manual_seed(0)
    aligned, plain = I3LM(sizes, BOS), I3LM(sizes, BOS, alignment=1)
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.normal_(std=0.3)
    plain.load_state_dict(aligned.state_dict())
    return aligned.to(dtype), plain.to(dtype)


def arguments(model: I3LM, seed: int = 0) -> Arguments:
    tokens = torch.cat([stream(seed + i, 4, SMALL["chunk_length"], 40, 20) for i in range(2)])
    return tokens, tokens.roll(-1, -1), depth_of(tokens), empty(model, 2), torch.tensor(0.6)


def run(model: torch.nn.Module, given: Arguments, leaves: Iterable[Tensor]) -> list[Tensor]:
    """Losses, new state and gradients."""
    losses, state = model(*given)
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view_as(losses)
    gradients = torch.autograd.grad((losses * weights).sum(), list(leaves))
    return [losses.detach(), *state.tensors().values(), *gradients]


@each_compressor
@pytest.mark.parametrize(("width", "heads"), SHAPES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_aligned_equals_plain(
    width: int, heads: int, dtype: torch.dtype, close: float, compressor: str
) -> None:
    aligned, plain = twins(width, heads, dtype, compressor)
    assert aligned.width.computed % ALIGNMENT == 0 and plain.width.computed == width
    got, want = (run(m, arguments(m), m.parameters()) for m in (aligned, plain))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= close * (1 + b.abs().max()) if b.numel() else True


@pytest.mark.parametrize(("width", "heads"), SHAPES)
def test_parameters_and_state_keep_their_stored_width(width: int, heads: int) -> None:
    aligned, plain = twins(width, heads, torch.float32)
    shapes = {name: p.shape for name, p in plain.state_dict().items()}
    assert {name: p.shape for name, p in aligned.state_dict().items()} == shapes
    _, state = aligned(*arguments(aligned))
    assert state.latents.shape[-1] == width


@given(
    per_head=st.integers(1, 70),
    heads=st.integers(1, 5),
    alignment=st.sampled_from([1, 8, 16]),
    dim=st.integers(-2, 1),
)
def test_padding_is_undone_and_zero(per_head: int, heads: int, alignment: int, dim: int) -> None:
    channels = Channels(per_head * heads, heads, alignment)
    x = torch.rand(channels.stored, channels.stored) + 1.0
    padded = channels.pad(x, dim)
    assert padded.shape[dim] == channels.computed >= channels.stored
    assert (padded != 0).sum() == x.numel() and channels.pad(padded, dim) is padded
    assert channels.trim(padded.transpose(dim, -1)).transpose(dim, -1).equal(x)


@given(width=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_layer_norm_counts_stored_channels_only(width: int, seed: int) -> None:
    torch.manual_seed(seed)
    channels, x = Channels(width), torch.randn(3, width)
    got = LayerNorm(channels)(channels.pad(x))
    assert not got[:, width:].any()
    torch.testing.assert_close(got[:, :width], torch.nn.functional.layer_norm(x, (width,)))


@each_compressor
@pytest.mark.parametrize(("width", "heads"), SHAPES)
def test_a_packed_model_computes_the_same(width: int, heads: int, compressor: str) -> None:
    model, _ = twins(width, heads, torch.float64, compressor)
    packed = FlatModel(model).double()
    given = arguments(model)
    want = run(model, given, model.parameters())
    got = run(packed, given, (flat.parameter for flat in packed.flats))
    names = [name for name, _ in model.named_parameters()]
    own = dict(zip(names, want[-len(names) :], strict=True))
    for a, b in zip(got[: -len(packed.flats)], want[: -len(names)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for flat, gradient in zip(packed.flats, got[-len(packed.flats) :], strict=True):
        for name, extent in zip(flat.names, flat.extents, strict=True):
            part = gradient.narrow(0, extent.start, extent.size)
            torch.testing.assert_close(extent.stored(part), own[name], rtol=1e-9, atol=1e-9)
            assert not part[~extent.mask(part.device)].any(), "padding has no gradient"


def test_packing_holds_every_parameter_once_and_shares_memory() -> None:
    model, _ = twins(24, 4, torch.float32)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    packed = FlatModel(model)
    assert sorted(name for flat in packed.flats for name in flat.names) == sorted(
        name for name, _ in model.named_parameters()
    )
    matrices = set(by_decay(model)[0])
    assert [set(flat.names) <= matrices for flat in packed.flats] == [True, False]
    packed.bfloat16()
    packed.share()
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name].bfloat16())
        assert parameter.data_ptr() % (2 * ALIGNMENT) == 0, "slices begin aligned"
    with torch.no_grad():
        packed.decayed.zero_()
    assert not model.head.weight.any()
