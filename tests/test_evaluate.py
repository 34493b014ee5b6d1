"""Evaluation: sums that do not depend on grouping, and an index that counts within documents."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.data.lanes import Batch
from i3dist.evaluate import evaluate
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
    assert all(chunk.loss != chunk.loss_without_history for chunk in later)


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
