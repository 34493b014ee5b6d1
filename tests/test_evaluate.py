"""Evaluation: sums that do not depend on grouping, and an index that counts within documents."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.data.lanes import Batch
from i3dist.evaluate import evaluate, other_history
from i3dist.model.lm import I3LM
from i3dist.ops.cross_entropy import IGNORE
from tests.model.conftest import SMALL, build
from tests.model.streams import BOS, depth_of, empty, stream

CHUNKS = 6


@pytest.fixture(scope="module")
def model() -> I3LM:
    return build()


def lanes(seed: int, rows: int = 4, mean_document: float = 30) -> Batch:
    length, vocab = SMALL["chunk_length"], SMALL["vocab_size"]
    tokens = torch.cat(
        [stream(seed + i, CHUNKS, length, vocab, mean_document) for i in range(rows)]
    )
    targets = tokens.flatten(1).roll(-1, 1).view_as(tokens)
    targets[:, -1, -1] = IGNORE
    return Batch(tokens, targets.masked_fill(targets == BOS, IGNORE), depth_of(tokens))


def run(model: I3LM, batches: list[Batch], rows: int, micro_batch: int):
    token_bytes = torch.arange(SMALL["vocab_size"])
    return evaluate(model, batches, empty(model, rows), token_bytes, CHUNKS, micro_batch)


@given(
    seed=st.integers(0, 9999),
    micro_batch=st.sampled_from([1, 2, 3, 4]),
    window=st.sampled_from([1, 2, 6]),
)
@settings(max_examples=8, deadline=None)
def test_grouping_changes_nothing(model: I3LM, seed: int, micro_batch: int, window: int) -> None:
    batch = lanes(seed)
    whole = run(model, [batch], 4, 4)
    cuts = [Batch(*(part[:, i : i + window] for part in batch)) for i in range(0, CHUNKS, window)]
    parts = run(model, cuts, 4, micro_batch)
    assert parts.tokens == whole.tokens
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    for a, b in zip(parts.by_chunk, whole.by_chunk, strict=True):
        assert (a.index, a.tokens) == (b.index, b.tokens)
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.loss_other_history == pytest.approx(b.loss_other_history, rel=1e-6)


def test_index_counts_within_the_document(model: I3LM) -> None:
    """Against a walk along each lane, token by token."""
    batch = lanes(3)
    counts: dict[int, int] = {}
    for row in range(4):
        index = -1
        for k in range(CHUNKS):
            index = index + 1  # the open document goes on, unless the chunk begins another
            for token, target in zip(batch.tokens[row, k], batch.targets[row, k], strict=True):
                index = 0 if token == BOS else index
                counts[index] = counts.get(index, 0) + int(target != IGNORE)
    found = {chunk.index: chunk.tokens for chunk in run(model, [batch], 4, 4).by_chunk}
    assert found == {i: n for i, n in counts.items() if n}


def test_chunk_zero_has_no_history_to_withhold(model: I3LM) -> None:
    result = run(model, [lanes(0, mean_document=200)], 4, 4)
    first, *later = result.by_chunk
    assert first.index == 0
    assert first.loss == first.loss_without_history
    assert first.loss == first.loss_other_history
    for chunk in later:
        assert len({chunk.loss, chunk.loss_without_history, chunk.loss_other_history}) == 3


@torch.no_grad()
def test_losses_are_those_of_three_whole_forwards(model: I3LM) -> None:
    """Chunk by chunk, where all of a chunk's history is in the state: there it can be exchanged."""
    batch, state, parts = lanes(5, mean_document=60), empty(model, 4), []
    on, off = torch.tensor(1.0), torch.tensor(0.0)
    for k in range(CHUNKS):
        one = Batch(*(part[:, k : k + 1] for part in batch))
        other = state._replace(latents=state.latents.roll(1, 0))
        with_history, after = model(*one, state, on)
        without, other = model(*one, state, off)[0], model(*one, other, on)[0]
        parts.append(torch.stack([with_history, without, other]))
        state = after
    wanted = torch.stack(parts).sum((0, 2, 3, 4)).tolist()
    result = run(model, [batch], 4, 4).by_chunk
    names = ("loss", "loss_without_history", "loss_other_history")
    found = [sum(getattr(c, name) * c.tokens for c in result) for name in names]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert len({round(total, 1) for total in found}) == 3, "kinds that differ too little to tell"


def test_another_history_undoes_rolled_lanes() -> None:
    batch, latents = lanes(0), torch.randn(4, 9, 3, 24)
    assert other_history(latents.roll(-1, 0), batch, None).equal(latents)


@given(idle=st.sets(st.integers(0, 3)))
def test_every_busy_lane_takes_from_another_busy_lane(idle: set[int]) -> None:
    batch = lanes(0)
    batch.targets[sorted(idle)] = IGNORE
    latents, before = torch.arange(4.0).view(4, 1, 1, 1), torch.full((4, 1, 1, 1), -1.0)
    other = other_history(latents, batch, before).flatten().tolist()
    busy = set(range(4)) - idle
    if len(busy) < 2:
        assert other == [-1.0] * 4
        return
    assert {other[lane] for lane in busy} == busy
    assert all(other[lane] != lane for lane in busy)


def test_a_single_lane_has_no_other_history(model: I3LM) -> None:
    result = run(model, [lanes(0, rows=1, mean_document=200)], 1, 1)
    assert [chunk.loss_other_history for chunk in result.by_chunk] == [None] * len(result.by_chunk)
    assert math.isfinite(result.loss)
    json.dumps(result.to_dict(), allow_nan=False)


def test_tokens_without_another_history_leave_the_others_as_they_are(model: I3LM) -> None:
    """Lane 0 is alone in the first window: what exchange costs is measured in the second."""
    batch = lanes(4, rows=2, mean_document=25)
    first, second = (Batch(*(part[:, i : i + 3] for part in batch)) for i in (0, 3))
    first.targets[1] = IGNORE
    nothing = first._replace(targets=torch.full_like(first.targets, IGNORE))
    some, none = (
        {c.index: c for c in run(model, [window, second], 2, 2).by_chunk}
        for window in (first, nothing)
    )
    later = [index for index in none if index > 0]
    assert any(some[index].tokens > none[index].tokens for index in later)
    for index in later:
        costs = [run[index].loss_other_history - run[index].loss for run in (some, none)]
        assert costs[0] == pytest.approx(costs[1], rel=1e-9) != 0


def test_other_history_behind_a_closed_gate_changes_nothing(model: I3LM) -> None:
    batch = lanes(2, mean_document=200)
    below, _ = model.below(batch.tokens, batch.depth, empty(model, 4))
    other = below._replace(latents=other_history(below.latents, batch, None))
    closed, opened = torch.tensor(0.0), torch.tensor(1.0)
    assert model.above(other, closed).equal(model.above(below, closed))
    assert not model.above(other, opened).equal(model.above(below, opened))


def test_figures_belong_together(model: I3LM) -> None:
    batch = lanes(1)
    result = run(model, [batch], 4, 4)
    used = batch.targets[batch.targets != IGNORE]
    assert result.tokens == len(used) == sum(chunk.tokens for chunk in result.by_chunk)
    total = sum(chunk.loss * chunk.tokens for chunk in result.by_chunk)
    assert result.loss == pytest.approx(total / result.tokens)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    bytes_of_text = int(used.sum())  # token i stands for i bytes here
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / bytes_of_text)
