"""Evaluation: the same figures for any grouping and any number of ranks, an index that counts
within documents, and another document's history that is really another's.
"""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from i3dist.data.corpus import Split
from i3dist.data.held_out import NONE, HeldOut
from i3dist.data.shards import read_shard
from i3dist.inference.evaluate import TokenLosses, evaluate, token_losses
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE
from tests.data.splits import BOS, documents_of, split_of
from tests.model.conftest import SMALL, build
from tests.model.streams import empty

LENGTH, VOCAB, HISTORY = SMALL["chunk_length"], SMALL["vocab_size"], SMALL["history_chunks"]
TOKEN_BYTES = np.arange(VOCAB)
# In tokens: of less than a chunk, of many, and one that runs over the ends of two shards.
LENGTHS = [70, 3, 130, 5, 5, 60, 250, 8, 40, 90, 33]
PER_SHARD = 9


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    documents = documents_of(0, LENGTHS, VOCAB)
    return split_of(tmp_path_factory.mktemp("split") / "valid", documents, LENGTH, PER_SHARD, VOCAB)


@pytest.fixture(scope="module")
def held_out(split: Split) -> HeldOut:
    return split.held_out(HISTORY)


@pytest.fixture(scope="module", params=[False, True], ids=["fresh", "carried"])
def model(request: pytest.FixtureRequest) -> I3LM:
    """A model whose RWKV state restarts with each chunk, and one that carries it."""
    return build(state_carry=request.param)


def batches(
    model: I3LM, held_out: HeldOut, rows: int, window: int, ranks: int = 1
) -> Iterator[tuple[np.ndarray, TokenLosses]]:
    """Positions and losses of every batch of every rank."""
    for rank in range(ranks):
        share = held_out.share(rank, ranks, window, rows, model.settings.state_carry)
        yield from zip(
            share.table.positions, token_losses(model, held_out, share, rows), strict=True
        )


def by_position(model: I3LM, held_out: HeldOut, *shape: int) -> dict[int, Tensor]:
    """Of every chunk that is counted: its tokens' [loss, withheld, other, exchanged], [4, T]."""
    found: dict[int, Tensor] = {}
    for positions, (batch, *figures) in batches(model, held_out, *shape):
        values = torch.stack([figure.double() for figure in figures])
        for row, lane in enumerate(positions):
            for k, position in enumerate(lane.tolist()):
                if position != NONE and (batch.targets[row, k] != IGNORE).any():
                    assert position not in found, "counted twice"
                    found[position] = values[:, row, k]
    return found


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 3), (64, 5, 1), (2, 1, 7), (3, 8, 2)])
def test_rows_windows_and_ranks_change_nothing(
    model: I3LM, held_out: HeldOut, shape: tuple[int, int, int]
) -> None:
    """Every token has the same three losses, whoever computes it and beside what."""
    wanted, found = by_position(model, held_out, 3, 4, 1), by_position(model, held_out, *shape)
    assert found.keys() == wanted.keys()
    for position, losses in wanted.items():
        torch.testing.assert_close(found[position], losses, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_losses_are_those_of_whole_forwards(model: I3LM, split: Split, held_out: HeldOut) -> None:
    """Against shards read one after the other by `I3LM.forward`, chunk by chunk, where all of a
    chunk's history is in the state: there it can be withheld and exchanged."""
    found = by_position(model, held_out, 2, 3, 2)
    on, off = torch.tensor(1.0), torch.tensor(0.0)
    states, chunks = _states(model, split, held_out)
    exchanged = 0
    for position, chunk in enumerate(chunks):
        if position not in found:
            continue
        cases = [(states[position], on), (states[position], off)]
        number = held_out.stretch_of[position]
        if number != NONE:
            stretch = held_out.stretches[number]
            newest = states[stretch.first + stretch.chunks - 1, "after"].latents
            cases.append((states[position]._replace(latents=newest), on))
            exchanged += 1
        losses = [model(*chunk, *case)[0].flatten() for case in cases]
        for kind, wanted in enumerate(losses):
            torch.testing.assert_close(found[position][kind], wanted, rtol=1e-6, atol=1e-6)
    assert exchanged > 10


def _states(
    model: I3LM, split: Split, held_out: HeldOut
) -> tuple[dict[object, LaneState], list[tuple[Tensor, Tensor, Tensor]]]:
    """The state before each chunk, by position, and after it, by (position, "after"); and the
    chunks' tokens, targets and depth."""
    states: dict[object, LaneState] = {}
    chunks: list[tuple[Tensor, Tensor, Tensor]] = []
    state = empty(model)
    for shard in range(len(split.manifest.shards)):
        read = read_shard(split.folder, split.manifest, shard)
        stream = torch.from_numpy(read.tokens.astype(np.int64))
        targets = torch.cat([stream.flatten()[1:], torch.tensor([IGNORE])]).view_as(stream)
        targets = targets.masked_fill((targets == BOS) | (targets == split.manifest.pad_id), IGNORE)
        for n, depth in enumerate(read.depth.tolist()):
            chunk = (stream[n].view(1, 1, -1), targets[n].view(1, 1, -1), torch.tensor([[depth]]))
            position = len(chunks)
            states[position] = state
            _, state = model(*chunk, state, torch.tensor(1.0))
            states[position, "after"] = state
            chunks.append(chunk)
    return states, chunks


def test_index_counts_within_the_document(model: I3LM, split: Split, held_out: HeldOut) -> None:
    """Against a walk along each shard, token by token."""
    counts: dict[int, int] = {}
    for shard in range(len(split.manifest.shards)):
        tokens = read_shard(split.folder, split.manifest, shard).tokens
        stream = [*tokens.flatten().tolist(), BOS]
        index = -1
        for place, (token, target) in enumerate(pairwise(stream)):
            index += place % LENGTH == 0  # the open document goes on, unless another begins
            index = 0 if token == BOS else index
            counts[index] = counts.get(index, 0) + (target not in (BOS, split.manifest.pad_id))
    result = evaluate(model, held_out, TOKEN_BYTES, 3, 2)
    assert {chunk.index: chunk.tokens for chunk in result.by_chunk} == {
        index: count for index, count in counts.items() if count
    }


def test_chunk_zero_has_no_history_to_withhold(model: I3LM, held_out: HeldOut) -> None:
    first, *later = evaluate(model, held_out, TOKEN_BYTES, 3, 2).by_chunk
    assert first.index == 0
    assert first.loss == first.loss_without_history == first.loss_other_history
    for chunk in later:
        assert len({chunk.loss, chunk.loss_without_history, chunk.loss_other_history}) == 3


def test_figures_belong_together(model: I3LM, held_out: HeldOut) -> None:
    """Against the losses of all tokens, summed here."""
    result = evaluate(model, held_out, TOKEN_BYTES, 3, 2)
    loss, text, more, exchanged = 0.0, 0, {}, {}
    tokens, bits, size = 0, {}, {}
    for _, each in batches(model, held_out, 2, 3):
        used = each.batch.targets != IGNORE
        tokens += int(used.sum())
        loss += float(each.loss[used].sum())
        text += int(each.batch.targets[used].sum())  # token i stands for i bytes here
        depth = each.batch.depth.unsqueeze(-1).expand_as(used)
        segments = (each.batch.tokens == BOS).cumsum(-1)
        for index in range(1, PER_SHARD):
            at = used & (segments == 0) & (depth == index) & each.exchanged
            more[index] = more.get(index, 0.0) + float((each.other - each.loss)[at].sum())
            exchanged[index] = exchanged.get(index, 0) + int(at.sum())
            at = used & (segments == 0) & (depth == index)
            bits[index] = bits.get(index, 0.0) + float(each.loss[at].sum()) / math.log(2)
            size[index] = size.get(index, 0) + int(each.batch.targets[at].sum())
    assert result.tokens == tokens == sum(chunk.tokens for chunk in result.by_chunk)
    assert result.loss == pytest.approx(loss / tokens)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(loss / math.log(2) / text)
    for chunk in result.by_chunk[1:]:
        assert exchanged[chunk.index], "of each index some are exchanged here"
        wanted = chunk.loss + more[chunk.index] / exchanged[chunk.index]
        assert chunk.loss_other_history == pytest.approx(wanted)
        assert chunk.bits_per_byte == pytest.approx(bits[chunk.index] / size[chunk.index])


def test_tokens_without_text_have_no_bits_per_byte(model: I3LM, held_out: HeldOut) -> None:
    result = evaluate(model, held_out, np.zeros_like(TOKEN_BYTES), 3, 2)
    assert {chunk.bits_per_byte for chunk in result.by_chunk} == {None}
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_single_document_has_no_other_history(model: I3LM, tmp_path: Path) -> None:
    """Not its own in another shard, and not the padding behind it."""
    split = split_of(tmp_path / "valid", documents_of(0, [400], VOCAB), LENGTH, PER_SHARD, VOCAB)
    assert len(split.manifest.shards) > 2
    result = evaluate(model, split.held_out(HISTORY), TOKEN_BYTES, 4, 2)
    assert [chunk.loss_other_history for chunk in result.by_chunk] == [None] * len(result.by_chunk)
    assert math.isfinite(result.loss)
    json.dumps(result.to_dict(), allow_nan=False)


def test_what_the_own_document_said_is_not_in_the_exchanged_losses(
    model: I3LM, tmp_path: Path
) -> None:
    """Other text in the chunks before leaves them as they are; it changes those with history."""
    before = documents_of(1, [150, 200], VOCAB)
    changed = [before[0], documents_of(2, [100], VOCAB)[0] + before[1][100:]]
    found: list[dict[int, Tensor]] = []
    for name, documents in (("one", before), ("other", changed)):
        split = split_of(tmp_path / name, documents, LENGTH, 64, VOCAB)
        found.append(by_position(model, split.held_out(HISTORY), 2, 3, 1))
    last = sorted(found[0])[-5:-1]  # far behind the change, as chunks of the document
    if not model.settings.state_carry:
        for position in last:
            assert found[0][position][2].equal(found[1][position][2])
    near = (152 + 100) // LENGTH + 1
    assert not found[0][near][0].equal(found[1][near][0])
