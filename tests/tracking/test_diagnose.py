"""Diagnosis: shares that add up, a rank that counts, and nothing touched."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3dist.model.dual_attention import DualAttention
from i3dist.model.lm import I3LM
from i3dist.model.segments import causal_mask, history_mask, segment_ids
from i3dist.ops.attention import (
    NEVER,
    KeysValues,
    attend,
    attend_apart,
    attention_bias,
    history_by_chunk,
    seen_by_chunk,
    split_heads,
)
from i3dist.ops.cross_entropy import IGNORE
from i3dist.tracking.diagnose import (
    attention_mass,
    diagnose,
    effective_rank,
)
from i3dist.tracking.report import diagnosis_line
from tests.model.conftest import BOS, SMALL, VARIANTS, build
from tests.model.streams import depth_of, empty, stream

T, C = SMALL["chunk_length"], SMALL["history_chunks"]
ON = torch.tensor(1.0)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda changes: "-".join(changes.values()))
def model(request: pytest.FixtureRequest) -> I3LM:
    return build(**request.param)


def window(seed: int, rows: int = 2, chunks: int = 6, mean_document: float = 40) -> Tensor:
    streams = [stream(seed + i, chunks, T, SMALL["vocab_size"], mean_document) for i in range(rows)]
    return torch.cat(streams)


def diagnosed(model: I3LM, tokens: Tensor, targets: Tensor, gate: Tensor = ON) -> dict[str, float]:
    return diagnose(model, tokens, targets, depth_of(tokens), empty(model, len(tokens)), gate)


def by_age(found: dict[str, float]) -> list[float]:
    return [found[f"attention_age_{age:02d}"] for age in range(1, C + 1)]


@given(seed=st.integers(0, 9999), gate=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=20, deadline=None)
def test_attention_mass_is_a_share(model: I3LM, seed: int, gate: float) -> None:
    """Over all keys it sums to 1; what a query may not see has none, what it may see has some."""
    tokens = window(seed, rows=1)[0, -1]
    segments, depth = segment_ids(tokens[None], BOS), torch.tensor([seed % (C + 2)])
    seen, keys_of_chunk = history_mask(segments, depth, C), model.keys_per_chunk
    bias = attention_bias(causal_mask(segments), seen, torch.tensor(gate), keys_of_chunk)
    attention = model.upper[0].attention
    x = torch.randn(1, 1, T, model.width.computed, dtype=torch.float64)
    reserve = attention.reserve_of(x)[0, 0]
    seen_by_all = torch.randn(C * keys_of_chunk + T, model.width.computed).double()
    keys = attention.keys_values(seen_by_all).keys
    mass = attention_mass(attention, attention.queries(x)[0, 0], keys, bias[0], reserve, C)
    assert mass.shape == (T, C + 1)
    torch.testing.assert_close(mass.sum(-1), torch.ones(T).double())
    visible = seen[0] & (gate > 0)
    assert (mass[:, :C][~visible] == 0).all()
    assert (mass[:, :C][visible] > 0).all()


def test_shares_are_those_of_the_models_own_attention(model: I3LM) -> None:
    """Against the softmax of all that the blocks hand to `attend` in a plain forward; where history
    has a softmax of its own, against that times the share by which it is added."""
    weights, shares_given, tokens = [], [], window(1, mean_document=100)
    size = C * model.keys_per_chunk

    def softmax(query: Tensor, keys: Tensor, bias: Tensor, heads: int, scale: float) -> Tensor:
        q, k = (split_heads(x.flatten(0, 1), heads) for x in (query, keys))
        return (scale * q @ k.transpose(-1, -2) + bias).clamp(min=NEVER).softmax(-1)

    def record(query: Tensor, past: KeysValues, own: KeysValues, *others: Any) -> Tensor:
        keys = seen_by_chunk(past.keys, own.keys, others[0])
        weights.append(softmax(query, keys, *others)[..., :size])
        return attend(query, past, own, *others)

    def record_apart(queries: Any, past: KeysValues, own: KeysValues, *others: Any) -> Any:
        keys = history_by_chunk(past.keys, own.keys.shape[1], size)
        weights.append(softmax(queries[1], keys, others[0][..., :size], *others[1:]))
        return attend_apart(queries, past, own, *others)

    weigh = DualAttention.weigh

    def record_share(layer: Any, share: Tensor, own: Tensor, past: Tensor) -> Tensor:
        shares_given.append(share.flatten(0, 1).transpose(1, 2))  # [N, H, T, 1]
        return weigh(layer, share, own, past)

    depth = depth_of(tokens)
    with (
        torch.no_grad(),
        mock.patch("i3dist.model.attention.attend", record),
        mock.patch("i3dist.model.dual_attention.attend_apart", record_apart),
        mock.patch("i3dist.model.dual_attention.DualAttention.weigh", record_share),
    ):
        model(tokens, tokens, depth, empty(model, 2), torch.tensor(0.3))
    assert len(weights) == len(model.upper) > 1
    of_history = torch.stack(weights)
    if shares_given:
        of_history = of_history * torch.stack(shares_given)
    shares = of_history.unflatten(-1, (C, -1)).sum(-1).mean((0, 2))
    seen = history_mask(segment_ids(tokens, BOS), depth, C).flatten(0, 1)
    wanted = [float(shares[..., C - age][seen[..., C - age]].mean()) for age in range(1, C + 1)]
    assert by_age(diagnosed(model, tokens, tokens, torch.tensor(0.3))) == pytest.approx(wanted)


def test_ages_that_no_query_may_see_have_no_figure(model: I3LM) -> None:
    tokens = window(0, chunks=3, mean_document=1e9)  # chunks of depth 0, 1 and 2
    found = by_age(diagnosed(model, tokens, tokens))
    assert len(found) == C == 3
    assert all(0 < share < 1 for share in found[:2])
    assert math.isnan(found[2])


def test_a_closed_gate_leaves_no_attention_to_history(model: I3LM) -> None:
    tokens = window(0, mean_document=200)
    assert by_age(diagnosed(model, tokens, tokens, torch.tensor(0.0))) == [0.0] * C


def test_positions_without_targets_do_not_count(model: I3LM) -> None:
    tokens = window(0, mean_document=200)
    targets = tokens.clone()
    targets[1] = IGNORE
    alone = diagnosed(model, tokens[:1], tokens[:1])
    both = diagnosed(model, tokens, targets)
    assert by_age(both) == pytest.approx(by_age(alone))
    assert both["effective_rank"] == pytest.approx(alone["effective_rank"])
    nothing = diagnosed(model, tokens, torch.full_like(tokens, IGNORE))
    assert math.isnan(nothing["effective_rank"])


@given(rank=st.integers(1, 12), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_effective_rank_of_orthonormal_rows_is_their_number(
    rank: int, seed: int, scale: float
) -> None:
    torch.manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0][:rank]
    assert effective_rank(scale * rows) == pytest.approx(rank)
    assert effective_rank(scale * rows[:1].expand(20, -1)) == pytest.approx(1)


def test_rows_without_direction_have_no_rank() -> None:
    assert math.isnan(effective_rank(torch.zeros(3, 4)))
    assert math.isnan(effective_rank(torch.empty(0, 4)))
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf]])))


def test_looking_touches_nothing(model: I3LM) -> None:
    tokens = window(3)
    before = [p.detach().clone() for p in model.parameters()]
    numbers = torch.get_rng_state()
    diagnosed(model, tokens, tokens)
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.get_rng_state().equal(numbers)


def test_the_line_names_the_figures(model: I3LM) -> None:
    tokens = window(0, mean_document=200)
    figures = diagnosed(model, tokens, tokens) | {"compressor_gradient_norm": 0.25}
    assert list(figures) == [
        *(f"attention_age_{i:02d}" for i in range(1, C + 1)),
        "effective_rank",
        "compressor_gradient_norm",
    ]
    line = diagnosis_line(40, 300, figures)
    assert f"{figures['attention_age_01']:.4f}" in line and "2.5e-01" in line
    assert f"{figures['effective_rank']:.1f}" in line and "\n" not in line
    unseen = diagnosis_line(40, 300, figures | {f"attention_age_{C:02d}": math.nan})
    assert "oldest -" in unseen and "nan" not in unseen
