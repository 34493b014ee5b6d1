"""What the model promises: causality, isolation, reach, and one result however it is computed."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.config import CompressionSettings, ModelSettings
from i3dist.inference.decoder import Decoder
from i3dist.model.attention import CLOSED
from i3dist.model.compressor import NEVER
from i3dist.model.layers import adjust_heads
from i3dist.model.lm import I3LM, by_decay, parameters_by_part
from i3dist.model.segments import chunks_seen, segment_ids
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE
from i3dist.ops.linear import linear
from tests.model.conftest import SMALL, build
from tests.model.streams import BOS, depth_of, empty, hidden_states, logits, stream

T, V, C = SMALL["chunk_length"], SMALL["vocab_size"], SMALL["history_chunks"]
seeds = st.integers(0, 2**31)
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # fp64 rounding


def random_stream(seed: int, chunks: int = 6, mean_document: float = 30) -> torch.Tensor:
    return stream(seed, chunks, T, V, mean_document)


def other_token(token: torch.Tensor) -> torch.Tensor:
    return 4 + (token - 4 + 1) % (V - 4)


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


@pytest.mark.parametrize("carry", [False, True])
@given(seed=seeds, window=st.sampled_from([1, 2, 3]))
@settings(max_examples=12, deadline=None)
def test_sequential_equals_chunk_parallel(carry: bool, seed: int, window: int) -> None:
    model = build(state_carry=carry)
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


def test_history_holds_the_newest_chunks_and_drops_the_oldest(model: I3LM) -> None:
    tokens = random_stream(1, chunks=C + 2, mean_document=1e9)
    depth, gate = depth_of(tokens), torch.tensor(1.0)
    _, state = hidden_states(model, tokens, depth, empty(model), gate)
    _, newest = hidden_states(model, tokens[:, -C:], depth[:, -C:], empty(model), gate)
    assert state.latents.shape == (1, C, SMALL["latents"], SMALL["d_model"])
    torch.testing.assert_close(state.latents, newest.latents, **CLOSE)


def test_the_card_holds_256_latents() -> None:
    card = ModelSettings()
    state = LaneState.empty(1, card, torch.device("meta"), torch.bfloat16)
    assert state.latents.shape[1] * state.latents.shape[2] == 256
    assert card.history_chunks * card.chunk_length == 4096


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


def training_loss(model: I3LM, tokens: torch.Tensor, state: LaneState) -> torch.Tensor:
    targets = torch.full_like(tokens, IGNORE)
    targets[..., :-1] = tokens[..., 1:]
    losses, _ = model(tokens, targets, depth_of(tokens), state, torch.tensor(1.0))
    return losses.sum()


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


@pytest.mark.parametrize("carry", [False, True])
def test_no_gradient_crosses_windows(carry: bool) -> None:
    model = build(state_carry=carry)
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


@pytest.mark.parametrize("carry", [False, True])
@given(seed=seeds, prompt=st.integers(1, 3 * T), mean_document=st.sampled_from([15, 60, 10_000]))
@settings(max_examples=8, deadline=None)
def test_token_by_token_equals_the_training_forward(
    carry: bool, seed: int, prompt: int, mean_document: float
) -> None:
    model = build(state_carry=carry)
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
        torch.testing.assert_close(ages * attention.scale, torch.full_like(ages, CLOSED))


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


@given(seed=seeds, kept=st.integers(1, T))
@settings(max_examples=30, deadline=None)
def test_sub_latents_are_of_the_highest_scores_in_order(model: I3LM, seed: int, kept: int) -> None:
    """As many as there are, of equal ones the first; none is of a token that is not kept."""
    compressor, count = model.compressor, model.keys_per_chunk
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (2, T), generator=random).double()  # many are equal
    scores[:, kept:] = NEVER
    for row, chosen in zip(scores.tolist(), compressor.choose(scores).tolist(), strict=True):
        assert chosen == sorted(sorted(range(T), key=lambda t: (-row[t], t))[:count])
    hidden = torch.randn(2, T, model.width.computed, generator=random).double()
    keep = scores > NEVER
    latents = model.width.trim(compressor(hidden, keep))
    parts = latents.unflatten(-1, (compressor.sub_latents, -1))
    filled = parts.flatten(1, 2).abs().sum(-1) > 0
    assert filled.sum(-1).tolist() == [min(kept, count)] * 2
    for anything in (7.0, float("inf"), float("nan")):
        other = hidden.masked_fill(~keep.unsqueeze(-1), anything)
        assert torch.equal(compressor(other, keep), compressor(hidden, keep))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_sub_latent_begins_by_reading_its_own_token(model: I3LM, seed: int) -> None:
    """Nearly; what it reads is kept, and sums to 1."""
    torch.manual_seed(seed)
    normed = torch.randn(2, T, model.width.computed).double()
    keep = torch.rand(2, T) < 0.7
    keep[:, seed % T] = True
    compressor, count = model.compressor, model.keys_per_chunk
    chosen = compressor.choose(torch.randn(2, T).masked_fill(~keep, NEVER))
    query, key, _ = compressor.project_in(normed, keep)
    shares = compressor.shares(chosen, query, key, keep)
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
    assert not shares[~keep[:, None].expand_as(shares)].any()
    own = torch.arange(T) == chosen.unsqueeze(-1)
    first = compressor.shares(chosen, 0 * query, 0 * key, torch.ones_like(keep))
    assert first[own].min() > 0.9
    assert shares.shape == (2, count, T)


def test_projecting_sub_latents_equals_projecting_what_they_unfold_to(model: I3LM) -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 3, SMALL["latents"], model.width.computed).double()
    weight = torch.randn(5, model.width.computed).double()
    wanted = linear(model.compressor.token(model.compressor.split(latents)), weight)
    torch.testing.assert_close(model.compressor.project(latents, weight), wanted, **CLOSE)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_the_compressor_is_what_its_words_say(model: I3LM, seed: int) -> None:
    """One sub-latent after the other: choose, ask, read; then refine, normalise and size."""
    c, count = model.compressor, model.keys_per_chunk
    each = c.part.stored
    torch.manual_seed(seed)
    hidden = model.width.pad(torch.randn(1, T, model.width.stored).double())
    keep = torch.arange(T)[None] >= seed % T  # a chunk's last document
    found = model.width.trim(c(hidden, keep))[0].reshape(count, each)
    normed, kept = c.norm_in(hidden)[0], keep[0].nonzero().flatten().tolist()
    query, key, value = (c.part.trim(p(normed)) for p in (c.query, c.key, c.record))
    scores = model.width.trim(normed) @ c.salience.weight[0]
    best = sorted(sorted(kept, key=lambda t: -scores[t].item())[:count])
    empty = count - len(best)
    assert not found[:empty].any()
    latents = c.queries.reshape(count, each).clone()
    for i, own in enumerate(best, start=empty):
        asked = key[kept] @ (query[own] + c.queries.reshape(count, each)[i]) / each**0.5
        begins = [0.94 * (t == own) + 0.05 / 17 * (abs(t - own) <= 8) + 0.01 / T for t in kept]
        shares = (asked + torch.tensor(begins).double().log()).softmax(0)
        latents[i] += shares @ value[kept]
    whole = range(-(-empty // c.sub_latents) * c.sub_latents, count)  # of latents that are full
    x = model.width.pad(latents.reshape(-1, c.sub_latents * each))
    x = model.width.trim(x + c.ff(c.norm_ff(x))).reshape(count, each)
    for i in whole:
        wanted = c.part.trim(c.norm_out(c.part.pad(x[i])))
        wanted = wanted * 2 * scores[best[i - empty]].sigmoid()
        torch.testing.assert_close(found[i], wanted, rtol=1e-6, atol=1e-6)


def test_the_router_learns_from_what_sub_latents_are_of_use_for(model: I3LM) -> None:
    """A token whose sub-latent lowers the loss gets a higher score by a step down the gradient."""
    compressor = model.compressor
    torch.manual_seed(0)
    hidden, keep = torch.randn(1, T, model.width.computed).double(), torch.ones(1, T).bool()
    chosen = compressor.choose(compressor.router_scores(compressor.norm_in(hidden)))[0]
    wanted = compressor(hidden, keep).detach()
    wanted[:, 1:] = 0  # the first latent's sub-latents should be larger, the others smaller
    loss = (compressor(hidden, keep) - 3 * wanted).square().sum()
    weight = compressor.salience.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    moved = compressor.norm_in(hidden)[..., : weight.shape[1]] @ -gradient[0]
    first = compressor.sub_latents
    assert (moved[0, chosen[:first]].mean() > moved[0, chosen[first:]].mean()).item()


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
