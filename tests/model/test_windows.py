"""One result however it is computed: chunks side by side, in turn, or token by token; gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.inference.decoder import Decoder
from i3dist.model.lm import I3LM
from i3dist.ops.cross_entropy import IGNORE
from tests.model.conftest import SMALL, build, each_compressor, each_variant
from tests.model.small import CLOSE, C, T, random_stream, seeds, training_loss
from tests.model.streams import depth_of, empty, hidden_states, logits


@each_variant
@pytest.mark.parametrize("carry", [False, True])
@given(seed=seeds, window=st.sampled_from([1, 2, 3]))
@settings(max_examples=12, deadline=None)
def test_sequential_equals_chunk_parallel(
    changes: dict[str, str], carry: bool, seed: int, window: int
) -> None:
    model = build(state_carry=carry, **changes)
    tokens = random_stream(seed)
    depth, state, gate = depth_of(tokens), empty(model), torch.tensor(0.7)
    whole, whole_state = hidden_states(model, tokens, depth, state, gate)
    parts = []
    for start in range(0, tokens.shape[1], window):
        part = slice(start, start + window)
        hidden, state = hidden_states(model, tokens[:, part], depth[:, part], state, gate)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    for name, tensor in whole_state.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor, **CLOSE)


def test_history_holds_the_newest_chunks_and_drops_the_oldest(model: I3LM) -> None:
    tokens = random_stream(1, chunks=C + 2, mean_document=1e9)
    depth, gate = depth_of(tokens), torch.tensor(1.0)
    _, state = hidden_states(model, tokens, depth, empty(model), gate)
    _, newest = hidden_states(model, tokens[:, -C:], depth[:, -C:], empty(model), gate)
    assert state.latents.shape == (1, C, SMALL["latents"], SMALL["d_model"])
    torch.testing.assert_close(state.latents, newest.latents, **CLOSE)


def test_gradient_flows_into_the_compressor_inside_a_window_only(model: I3LM) -> None:
    tokens = random_stream(2, chunks=3, mean_document=1e9)
    gradients = torch.autograd.grad(
        training_loss(model, tokens, empty(model)),
        list(model.compressor.parameters()),
        allow_unused=True,
    )
    assert all(g is not None and g.norm() > 0 for g in gradients)
    alone = training_loss(model, tokens[:, :1], empty(model))
    last = torch.autograd.grad(alone, list(model.compressor.parameters()), allow_unused=True)
    assert all(g is None or g.norm() == 0 for g in last)


@each_compressor
@pytest.mark.parametrize("carry", [False, True])
def test_no_gradient_crosses_windows(compressor: str, carry: bool) -> None:
    model = build(state_carry=carry, compressor=compressor)
    tokens = random_stream(5, chunks=2)
    _, state = hidden_states(model, tokens, depth_of(tokens), empty(model), torch.tensor(1.0))
    assert not any(tensor.requires_grad for tensor in state.tensors().values())


@given(seed=seeds, rows=st.sampled_from([1, 2, 3]))
@settings(max_examples=8, deadline=None)
def test_grouping_lanes_into_micro_batches_keeps_the_gradient(
    model: I3LM, seed: int, rows: int
) -> None:
    """The same holds for ranks, which are given other lanes of the same step."""
    lanes = torch.cat([random_stream(seed + i, chunks=3) for i in range(6)])
    parameters = list(model.parameters())
    whole = torch.autograd.grad(training_loss(model, lanes, empty(model, 6)), parameters)
    parts = [
        torch.autograd.grad(
            training_loss(model, lanes[i : i + rows], empty(model, rows)), parameters
        )
        for i in range(0, 6, rows)
    ]
    for name, expected, *pieces in zip(dict(model.named_parameters()), whole, *parts, strict=True):
        torch.testing.assert_close(
            torch.stack(pieces).sum(0), expected, rtol=1e-7, atol=1e-7, msg=name
        )


def test_a_window_without_targets_gives_zero_and_no_nan(model: I3LM) -> None:
    tokens = torch.ones(2, 2, T, dtype=torch.long)  # an idle lane reads padding
    targets = torch.full_like(tokens, IGNORE)
    depth = torch.zeros(2, 2, dtype=torch.long)
    losses, state = model(tokens, targets, depth, empty(model, 2), torch.tensor(0.0))
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
    assert losses.sum() == 0
    assert all(g is None or not g.any() for g in gradients)
    assert state.latents.isfinite().all()


@each_compressor
@pytest.mark.parametrize("carry", [False, True])
@given(seed=seeds, prompt=st.integers(1, 3 * T), mean_document=st.sampled_from([15, 60, 10_000]))
@settings(max_examples=8, deadline=None)
def test_token_by_token_equals_the_training_forward(
    compressor: str, carry: bool, seed: int, prompt: int, mean_document: float
) -> None:
    model = build(state_carry=carry, compressor=compressor)
    tokens = random_stream(seed, mean_document=mean_document)
    expected = logits(model, tokens).flatten(0, 2)
    decoder = Decoder(model)
    flat = tokens.flatten()
    got = [decoder.feed(flat[:prompt]), *(decoder.feed(t[None]) for t in flat[prompt:])]
    torch.testing.assert_close(
        torch.stack(got).double(), expected[prompt - 1 :], rtol=1e-5, atol=1e-5
    )


def test_decoding_holds_constant_memory(model: I3LM) -> None:
    decoder, sizes = Decoder(model), []
    for token in random_stream(3, chunks=12, mean_document=40).flatten():
        decoder.feed(token[None])
        sizes.append(decoder.chunk.tokens.shape[1])
        assert decoder.latents.shape[1] == C
    assert max(sizes) == T
