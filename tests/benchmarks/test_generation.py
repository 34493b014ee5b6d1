"""benchmarks/generation.py with toy models: every part gives its rows, and targets are judged."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from i3dist.inference import batch_decoder
from i3dist.inference.steps import LatentStep
from tests.conftest import ROOT
from tests.model.conftest import build

# As for a program started in that folder.
sys.path.append(str(ROOT / "benchmarks"))

import generation
import gpt_decoder


def test_every_part_gives_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    parts = [part for part in generation.GPU + generation.CPU if part != "start"]
    words = ["--toy", "--steps", "5", "--rounds", "2", "--out", str(out), "--only", *parts]
    rows = generation.main(words)
    names = [row.contestant for row in rows]
    assert names.count("i3 together") == 6 and names.count("gpt") == names.count("gpt-4kv") == 4
    assert {"i3 apart", "i3 prompt", "gpt prompt", "i3 batched", "i3 simple"} < set(names)
    assert all(row.ms > 0 and row.slowest_ms >= row.ms for row in rows)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["ms"] for line in written] == [row.ms for row in rows]
    said = capsys.readouterr().out
    assert "batched decoder / simple one" in said and "context where i3 becomes faster" in said


def test_sub_latents_are_counted_in_place_of_keys() -> None:
    settings = {"layers": "1xrwkv,1xdual-attention", "chunk_length": 12, "latents": 3}
    model = build(**settings, sub_latents=2, history_chunks=3)
    with mock.patch.object(batch_decoder, "upper_step", lambda *_: LatentStep):
        decoder = batch_decoder.BatchDecoder(model, [torch.tensor([2, 5, 6])] * 5)
    (lower,), (step,), model = decoder.lower, decoder.upper, decoder.model
    attention, compressor = model.upper[0].attention, model.compressor
    state = sum(part[0].numel() for part in lower.state)
    keys = 2 * 12 * attention.inner.computed
    sub_latents = 3 * 3 * 2 * compressor.part.computed
    assert step.latents.dtype == torch.float64
    assert generation.i3_bytes(decoder)[1] == 5 * 8 * (keys + sub_latents) + 5 * state * 8


def test_the_gpts_are_of_the_cards_size() -> None:
    with torch.device("meta"):
        card = sum(
            p.numel()
            for p in generation.I3LM(generation.card("12xrwkv,2xattention").model, 2).parameters()
        )
        for shape in (gpt_decoder.EQUAL, gpt_decoder.GROUPED):
            model = gpt_decoder.CachedGPT(shape, 1, 1, compiled=False)
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(card, rel=0.002)
        small = gpt_decoder.CachedGPT(gpt_decoder.SMALL, 1, 1, compiled=False, tied=True)
        assert sum(p.numel() for p in small.parameters()) == pytest.approx(124e6, rel=0.01)


@torch.no_grad()
def test_a_cached_step_equals_the_whole_forward_pass() -> None:
    torch.manual_seed(0)
    shape, context = gpt_decoder.Shape(2, 32, 4, 2, 64, 64), 6
    model = gpt_decoder.CachedGPT(shape, 3, context, compiled=False)
    tokens = torch.randint(64, (3, context))
    model.begin(generation.Sampling(0))
    for place in range(context):
        x = model.embedding(tokens[:, place]).unsqueeze(1)
        for block, (keys, values) in zip(model.blocks, model.cache, strict=True):
            now = torch.tensor([place])
            seen = (keys[:, :, : place + 1], values[:, :, : place + 1])
            x = gpt_decoder.block_step(block, x, *seen, now)
    wanted = model.read(tokens)
    torch.testing.assert_close(gpt_decoder.predict(model, x), wanted, rtol=1e-4, atol=1e-5)
