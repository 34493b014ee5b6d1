"""Logits of the export are those of training. About 10 s."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3dist.inference.decoder import Decoder
from i3dist.model.lm import I3LM
from tests.export.conftest import BOS, Exported, documents, exported, padded
from tests.model.streams import logits as training_logits

TOLERANCE = 1e-5


def trained(model: I3LM, tokens: Tensor) -> Tensor:
    """i3dist's training forward of a stream [n], in whole chunks: [n, V]."""
    length = model.settings.chunk_length
    whole = torch.cat([tokens, tokens.new_full((-len(tokens) % length,), 20)])
    with torch.no_grad():
        return training_logits(model, whole.view(1, -1, length)).flatten(0, 2)[: len(tokens)]


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference."""
    return float((found - wanted).abs().max())


@given(seed=st.integers(0, 2**31), mean=st.sampled_from([4, 40, 400]))
@settings(max_examples=3)
@torch.no_grad()
def test_logits_are_those_of_training(each: Exported, seed: int, mean: int) -> None:
    """Documents restart, and history goes back further than it reaches."""
    tokens = documents(seed, 12 * 7 + 5, mean)
    assert far(each.load()(tokens[None]).logits[0], trained(each.model, tokens)) < TOLERANCE


@torch.no_grad()
def test_logits_at_the_real_length_of_a_chunk_beyond_all_of_its_history(root: Any) -> None:
    one = exported(root, chunk_length=512, history_chunks=8, latents=32, sub_latents=4)
    tokens = documents(0, 512 * 10 + 100, 3000)
    assert far(one.load()(tokens[None]).logits[0], trained(one.model, tokens)) < TOLERANCE


@torch.no_grad()
def test_history_and_other_documents_matter_where_they_should(one: Exported, hf: Any) -> None:
    """The comparison above could not fail if nothing were remembered."""
    text = documents(1, 60, 1000)[1:]
    whole = torch.cat([torch.tensor([BOS]), text])
    after_other = torch.cat([documents(2, 24, 1000), whole])
    alone = hf(whole[None]).logits[0]
    changed = whole.clone()
    changed[5] += 1
    assert far(hf(changed[None]).logits[0, 24:], alone[24:]) > 100 * TOLERANCE
    # At an equal place in the chunk a document does not know what came before it.
    assert far(hf(after_other[None]).logits[0, 24:], alone) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(each: Exported, side: str) -> None:
    """Rows close their chunks at different columns."""
    hf = each.load()
    rows = [documents(s, n, mean) for s, n, mean in ((1, 61, 400), (2, 30, 9), (3, 5, 400))]
    ids, mask = padded(rows, side)
    found = hf(ids, attention_mask=mask).logits
    for row, tokens in enumerate(rows):
        assert far(found[row][mask[row].bool()], hf(tokens[None]).logits[0]) < TOLERANCE
    if side == "right":  # generate() reads the last column
        last = torch.stack([hf(tokens[None]).logits[0, -1] for tokens in rows])
        assert far(found[:, -1], last) < TOLERANCE


@torch.no_grad()
def test_tokens_read_one_by_one_equal_i3dists_decoder(each: Exported) -> None:
    hf, decoder, cache = each.load(), Decoder(each.model), None
    for token in documents(4, 40, 25).split(1):
        out = hf(token[None], past_key_values=cache)
        cache = out.past_key_values
        assert far(out.logits[0, -1], decoder.feed(token)) < TOLERANCE


@torch.no_grad()
def test_only_the_last_logits_when_asked(hf: Any) -> None:
    ids = documents(5, 40, 30)[None]
    kept = hf(ids, logits_to_keep=3).logits
    assert kept.shape[1] == 3 and far(kept, hf(ids).logits[:, -3:]) < TOLERANCE
    columns = torch.tensor([30, 2])
    assert far(hf(ids, logits_to_keep=columns).logits, hf(ids).logits[:, columns]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(one: Exported, dtype: torch.dtype) -> None:
    ids = documents(6, 80, 60)[None]
    wanted = one.load()(ids).logits
    for model in (one.load(dtype=dtype), one.load().to(dtype)):
        found = model(ids).logits
        assert found.dtype == dtype
        assert far(found.float(), wanted) < 0.1 * wanted.std()
    loaded = one.load(dtype=dtype).rwkv[0].time_mix
    assert loaded.decay_base.dtype == torch.float32  # as in training
