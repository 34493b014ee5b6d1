"""What a token may see: nothing later, no other document, the history, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.inference.decoder import Decoder
from i3dist.model.lm import I3LM
from i3dist.model.segments import chunks_seen, segment_ids
from tests.model.conftest import build
from tests.model.small import EXACT, C, T, other_token, random_stream, seeds
from tests.model.streams import BOS, depth_of, empty, hidden_states, logits


@given(seed=seeds, position=st.integers(1, 6 * T - 1))
@settings(max_examples=30, deadline=None)
def test_a_future_token_changes_no_past_logit(model: I3LM, seed: int, position: int) -> None:
    tokens = random_stream(seed)
    changed = tokens.clone()
    changed.view(-1)[position] = other_token(changed.view(-1)[position])
    before = logits(model, tokens).flatten(0, 2)[:position]
    after = logits(model, changed).flatten(0, 2)[:position]
    torch.testing.assert_close(after, before, **EXACT)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_the_present_token_matters(model: I3LM, seed: int) -> None:
    """The oracle of the test above can fail: logits at and after a change do move."""
    tokens = random_stream(seed)
    changed = tokens.clone()
    changed[0, 2, 5] = other_token(changed[0, 2, 5])
    assert (logits(model, changed)[0, 2, 5] - logits(model, tokens)[0, 2, 5]).abs().max() > 1e-6


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_documents_do_not_see_their_neighbours_content(model: I3LM, seed: int) -> None:
    tokens = random_stream(seed, mean_document=15)
    before = logits(model, tokens).flatten(0, 2)
    document = (tokens.view(-1) == BOS).cumsum(0)
    for one in document.unique():
        inside = document == one
        outside = ~inside & (tokens.view(-1) >= 4)
        changed = tokens.clone()
        changed.view(-1)[outside] = other_token(changed.view(-1)[outside])
        after = logits(model, changed).flatten(0, 2)[inside]
        torch.testing.assert_close(after, before[inside], **EXACT)


@given(seed=seeds, chunk=st.integers(0, 6), offset=st.integers(1, T - 1))
@settings(max_examples=30, deadline=None)
def test_reach_is_exactly_the_history(model: I3LM, seed: int, chunk: int, offset: int) -> None:
    """In a long document a token in chunk c sees chunks c - C to c, and nothing earlier."""
    tokens = random_stream(seed, chunks=7, mean_document=1e9)
    changed = tokens.clone()
    changed[0, chunk, offset] = other_token(changed[0, chunk, offset])
    moved = (logits(model, changed) - logits(model, tokens)).abs().amax(dim=(0, 2, 3))
    expected = [chunk <= later <= chunk + C for later in range(7)]
    # The last token of a chunk moves its own logits and the latents that later chunks read.
    assert (moved > 0).tolist() == expected


def test_state_carry_reaches_further(model: I3LM) -> None:
    carrying = build(state_carry=True)
    tokens = random_stream(0, chunks=7, mean_document=1e9)
    changed = tokens.clone()
    changed[0, 0, 3] = other_token(changed[0, 0, 3])
    moved = (logits(carrying, changed) - logits(carrying, tokens)).abs().amax(dim=(0, 2, 3))
    assert moved[C + 1] > 0


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_gate_zero_equals_no_history(model: I3LM, seed: int) -> None:
    tokens = random_stream(seed, mean_document=200)
    nothing_visible = torch.zeros_like(depth_of(tokens))
    closed = logits(model, tokens, gate=0.0)
    hidden, _ = hidden_states(model, tokens, nothing_visible, empty(model), torch.tensor(1.0))
    torch.testing.assert_close(closed, model.head(hidden), **EXACT)
    assert (logits(model, tokens, gate=1.0) - closed).abs().max() > 1e-6


def window_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three lanes' window: tokens [3, 5, T], and a depth [3, 5] of streams that began before it."""
    lanes = [random_stream(seed + i, 8, mean) for i, mean in enumerate((8, 40, 1e9))]
    tokens = torch.cat(lanes)
    return tokens[:, 3:], depth_of(tokens)[:, 3:]


def seen_by_any_token(tokens: torch.Tensor, depth: torch.Tensor, gate: float) -> torch.Tensor:
    """[B, C + K] bool: chunks that a token may see, by the words of the rule, one by one."""
    seen = torch.zeros(len(tokens), C + tokens.shape[1], dtype=torch.bool)
    for lane, row in enumerate(tokens.tolist()):
        for k, chunk in enumerate(row):
            if chunk[0] != BOS and gate > 0:  # its first token continues a document
                for age in range(1, min(C, int(depth[lane, k])) + 1):
                    seen[lane, C + k - age] = True
    return seen


@given(seed=seeds, gate=st.sampled_from([0.0, 0.3, 1.0]), value=st.sampled_from(["nan", "inf"]))
@settings(max_examples=12, deadline=None)
def test_latents_that_no_token_may_see_reach_nothing(
    model: I3LM, seed: int, gate: float, value: str
) -> None:
    """Whatever they hold, losses and gradients are the same bit for bit."""
    tokens, depth = window_of(seed)
    seen, g = seen_by_any_token(tokens, depth, gate), torch.tensor(gate)
    assert torch.equal(chunks_seen(segment_ids(tokens, BOS), depth, C, g), seen)
    torch.manual_seed(seed)
    latents = torch.randn_like(empty(model, 3).latents)
    spoiled = torch.where(seen[:, :C, None, None], latents, float(value))
    assert spoiled.isfinite().all() <= (gate > 0)
    found = []
    for held in (latents, spoiled):
        losses, _ = model(tokens, tokens, depth, empty(model, 3)._replace(latents=held), g)
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
        found.append([losses, *(x for x in gradients if x is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, **EXACT)


@given(seed=seeds, gate=st.sampled_from([0.0, 1.0]))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_a_window_is_read_on_without_latents_that_no_token_may_see(
    model: I3LM, seed: int, gate: float
) -> None:
    """As evaluation does it, with the window's own latents and other ones in it."""
    tokens, depth = window_of(seed)
    below, _ = model.below(tokens, depth, empty(model, 3))
    seen = seen_by_any_token(tokens, depth, gate)[..., None, None]
    spoiled = below._replace(latents=torch.where(seen, below.latents, float("nan")))
    g = torch.tensor(gate)
    torch.testing.assert_close(model.above(spoiled, g), model.above(below, g), **EXACT)


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize("mean_document", [8, 40])
@torch.no_grad()
def test_decoding_does_not_read_latents_that_no_token_may_see(
    model: I3LM, gate: float, mean_document: float
) -> None:
    flat = random_stream(4, 5, mean_document).flatten()
    plain, spoiled = Decoder(model, gate), Decoder(model, gate)
    for place, token in enumerate(flat):
        if place % T == 0 and place:
            spoiled._close_chunk()
            latents = spoiled.latents.clone()
            ends = token == BOS or gate == 0
            latents[:, : C if ends else max(0, C - spoiled.depth)] = float("nan")
            spoiled.latents = latents
        torch.testing.assert_close(spoiled.feed(token[None]), plain.feed(token[None]), **EXACT)


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_carried_state_does_not_reach_a_document_that_begins(seed: int) -> None:
    """Where a chunk continues none, or at its first token, whatever the lane's last one left."""
    model, (tokens, depth) = build(state_carry=True), window_of(seed)
    tokens[1, 0, 0] = BOS
    depth[:2, 0] = 0  # lane 0 begins a shard, lane 1 a document
    tokens, depth, nothing = tokens[:2], depth[:2], empty(model, 2)
    spoiled = nothing._replace(
        layers={name: torch.full_like(x, float("nan")) for name, x in nothing.layers.items()}
    )
    found = []
    for state in (nothing, spoiled):
        losses, after = model(tokens, tokens, depth, state, torch.tensor(1.0))
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
        found.append([losses, *after.layers.values(), *(x for x in gradients if x is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, **EXACT)
