"""The model's sizes, the weights that it begins with, its attention's equation, and the gate."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.config import CompressionSettings, ModelSettings
from i3dist.model.attention import INITIAL_AGE_LOGIT
from i3dist.model.compressor_kinds import COMPRESSORS
from i3dist.model.layers import adjust_heads
from i3dist.model.lm import I3LM, Unfilled, WithGenerator, by_decay, parameters_by_part
from i3dist.model.state import LaneState
from i3dist.ops.linear import linear
from tests.model.conftest import SMALL, build
from tests.model.small import (
    CLOSE,
    C,
    random_stream,
    seeds,
    training_loss,
)
from tests.model.streams import BOS, empty, logits


@pytest.mark.parametrize(
    ("width", "requested", "heads"),
    [(1180, 8, 10), (512, 8, 8), (12, 5, 6), (1181, 8, 1), (7, 5, 7), (9, 2, 3), (6, 100, 6)],
)
def test_heads_adjust_to_the_nearest_divisor(width: int, requested: int, heads: int) -> None:
    assert adjust_heads(width, requested) == heads


@given(width=st.integers(1, 3000), requested=st.integers(1, 64))
def test_heads_always_divide_the_width(width: int, requested: int) -> None:
    heads = adjust_heads(width, requested)
    assert width % heads == 0
    assert all(
        width % n or abs(n - requested) >= abs(heads - requested) for n in range(1, width + 1)
    )


@pytest.mark.parametrize("width", [1180, 101])
def test_awkward_widths_run(width: int) -> None:
    model = I3LM(ModelSettings.model_validate(SMALL | {"d_model": width}), BOS)
    tokens = random_stream(0, chunks=2)
    loss = training_loss(model, tokens, empty(model))
    loss.backward()
    assert loss.isfinite()


def test_the_card_has_340_million_parameters() -> None:
    with torch.device("meta"):
        model = I3LM(ModelSettings(), BOS)
    counts = parameters_by_part(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert 335e6 <= sum(counts.values()) <= 348e6


def test_the_card_holds_256_latents() -> None:
    card = ModelSettings()
    state = LaneState.empty(1, card, torch.device("meta"), torch.bfloat16)
    assert state.latents.shape[1] * state.latents.shape[2] == 256
    assert card.history_chunks * card.chunk_length == 4096


def test_only_projections_that_end_a_branch_begin_smaller() -> None:
    torch.manual_seed(0)
    model = I3LM(ModelSettings(d_model=64, layers="3xrwkv,2xattention", vocab_size=500), 2)
    ends = ("time_mix.output", "channel_mix.value", "attention.output", "ff.down")
    own_ways = ("compressor.record", "compressor.token", "salience")
    for name, parameter in model.named_parameters():
        owner = name.removesuffix(".weight")
        if owner.endswith("attention.query"):  # its rows of ages begin at zero
            parameter = parameter.unflatten(0, (8, -1))[:, :8].flatten(0, 1)
        if parameter.ndim == 2 and not name.startswith("slots.") and not owner.endswith(own_ways):
            end = owner.endswith(ends)
            want = (0.4 / 64 / (10 if end else 1)) ** 0.5
            assert parameter.std().item() == pytest.approx(want, rel=0.1)


def test_a_model_that_is_loaded_next_has_zeros_and_all_that_is_not_loaded(model: I3LM) -> None:
    with Unfilled() as built:
        unfilled = I3LM(model.settings, model.bos_id)
    built.fill(torch.device("cpu"))
    large = ("embedding.weight", "head.weight", "rwkv.0.time_mix.key.weight")
    assert not any(unfilled.get_parameter(name).any() for name in large)
    unfilled.load_state_dict(dict(model.named_parameters()), strict=False)
    ours, theirs = unfilled.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name].to(ours[name].dtype)) for name in ours)


def test_a_models_shapes_take_no_memory(model: I3LM) -> None:
    with Unfilled(meta=True):
        shapes = I3LM(model.settings, model.bos_id)
    assert shapes.head.weight.is_meta and shapes.embedding.weight.is_meta
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in shapes.named_parameters()} == wanted
    meta = sum(p.numel() for p in shapes.parameters() if p.is_meta)
    assert meta > 0.9 * sum(p.numel() for p in shapes.parameters())


@pytest.mark.parametrize("compressor", sorted(COMPRESSORS))
def test_values_of_a_seed_are_the_same_whatever_other_threads_sample(compressor: str) -> None:
    """All of them: other functions would take theirs from the generator that threads share."""
    layers = "2xrwkv,2xdual-attention,1xattention"
    settings = ModelSettings(d_model=64, layers=layers, vocab_size=500, compressor=compressor)
    torch.manual_seed(7)
    wanted = I3LM(settings, BOS).state_dict()
    shared = torch.manual_seed(8).get_state()
    with WithGenerator(torch.Generator().manual_seed(7)):
        got = I3LM(settings, BOS).state_dict()
    assert torch.get_rng_state().equal(shared)
    assert all(got[name].equal(value) for name, value in wanted.items())


def test_history_begins_low_and_unfolds_what_was_read() -> None:
    """A sub-latent of a token is unfolded to the R-th of it, R^0.5 times as large."""
    settings = ModelSettings(d_model=64, layers="1xrwkv,2xattention", vocab_size=500, sub_latents=4)
    compressor = (model := I3LM(settings, BOS)).compressor
    token, record = compressor.token.weight, compressor.record.weight
    torch.testing.assert_close(record @ record.T, torch.eye(16))
    torch.testing.assert_close(record @ token, 2 * torch.eye(16))
    x = torch.randn(1, 2, 3, 64)
    for block in model.upper:
        attention = block.attention
        query = attention.queries(x).unflatten(-1, (attention.heads, -1))
        begins = attention.inner.per_head
        ages = query[..., begins : begins + settings.history_chunks]
        torch.testing.assert_close(ages * attention.scale, torch.full_like(ages, INITIAL_AGE_LOGIT))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_the_logits_of_ages_move_history_and_nothing_else(seed: int) -> None:
    """b_ha(x) = log g for all heads and ages is what a gate g is; without history it changes
    nothing."""
    tokens = random_stream(seed, mean_document=100)
    model, low = build(), build()
    with torch.no_grad():
        for block in (*model.upper, *low.upper):
            block.reset_parameters()
        for block in low.upper:
            block.attention.age_bias.add_(torch.tensor(0.3).log())
    torch.testing.assert_close(logits(low, tokens), logits(model, tokens, gate=0.3), **CLOSE)
    none = logits(low, tokens, gate=0.0)
    torch.testing.assert_close(none, logits(model, tokens, gate=0.0), **CLOSE)


@given(seed=seeds, window=st.integers(1, 2 * C + 1))
@settings(max_examples=20, deadline=None)
def test_attention_is_the_softmax_of_its_equation(seed: int, window: int) -> None:
    """Of q_h(x) k_h / sqrt(d) + b_ha(x) over the C chunks before, and the token itself."""
    model = build()
    attention = model.upper[0].attention
    torch.manual_seed(seed)
    torch.nn.init.normal_(attention.age_bias)
    x = torch.randn(2, window, 1, model.width.computed).double()
    latents = torch.randn(2, C + window, 3, model.width.computed).double()
    visible = torch.zeros(2 * window, 1, 1, 3 * C + 1).double()  # everything is
    found = attention(
        x, attention.history(partial(linear, latents)), attention.keys_values(x), visible
    )

    heads, d = attention.heads, attention.inner.per_head
    query, logit = attention.query(x).unflatten(-1, (heads, -1))[..., : d + C].split([d, C], -1)
    logit = logit + attention.age_bias.view(heads, C)
    for k in range(window):
        seen = torch.cat([latents[:, k : k + C].flatten(1, 2), x[:, k]], dim=1)
        keys, values = (part.unflatten(-1, (heads, -1)) for part in attention.keys_values(seen))
        wanted = torch.einsum("bhd,bshd->bhs", query[:, k, 0], keys[..., :d]) * d**-0.5
        wanted[..., :-1] += logit[:, k, 0].repeat_interleave(3, dim=-1)
        read = torch.einsum("bhs,bshd->bhd", wanted.softmax(-1), values)
        torch.testing.assert_close(found[:, k, 0], attention.output(read.flatten(1)), **CLOSE)


def test_decay_applies_to_matrices_only(model: I3LM) -> None:
    names = set(by_decay(model)[0])
    parameters = dict(model.named_parameters())
    assert names <= set(parameters)
    assert all(parameters[name].ndim == 2 for name in names)
    assert not any("mix" in n.split(".")[-1] or "offset" in n or "norm" in n for n in names)
    assert {"head.weight", "rwkv.0.time_mix.key.weight"} <= names


def test_gate_is_off_then_rises() -> None:
    gate = CompressionSettings(off_steps=100, ramp_steps=50).gate_at
    assert [gate(s) for s in (0, 99)] == [0.0, 0.0]
    assert gate(100) == pytest.approx(1 / 50)
    assert [gate(s) for s in (149, 10_000)] == [1.0, 1.0]
    assert CompressionSettings(off_steps=0, ramp_steps=0).gate_at(0) == 1.0
