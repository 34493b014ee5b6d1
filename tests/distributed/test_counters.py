"""Figures of a job are over all of its ranks: two of them, one step, and data that are known."""

import json
import math
from pathlib import Path

import pytest

from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.data.tokenizer import Tokenizer
from tests.conftest import run_ranks
from tests.known import CHUNK, PAD, TOKENIZER, documents, make

WORDS = {
    "model.d_model": 16,
    "model.layers": "1xrwkv,1xattention",
    "model.heads": 2,
    "model.chunk_length": CHUNK,
    "model.latents": 2,
    "model.history_chunks": 2,
    "compression.off_steps": 0,
    "optimizer.warmup_steps": 0,
    "train.steps": 1,
    "train.lanes": 4,
    "train.window_chunks": 3,
    "train.accumulation": 2,
    "validate.chunks": 1000,
    "data.workers": 0,
    "tracking.enabled": False,
}


def test_two_ranks_count_together(tmp_path: Path) -> None:
    """Bits by bytes of the whole valid split; tokens and latents of all four lanes."""
    known = make(tmp_path / "data", documents(0, 9), documents(1, 9))
    words = WORDS | {"data.path": known.folder, "run.path": tmp_path / "run"}
    result = run_ranks(*(f"{name}={value}" for name, value in words.items()))
    assert result.returncode == 0, result.stderr

    sizes = Tokenizer(TOKENIZER, Path("x")).token_bytes()
    wanted = [known.targets("valid", n).ravel() for n in range(len(known.shards["valid"]))]
    targets = [int(target) for shard in wanted for target in shard if target >= 0]
    for line in map(json.loads, (tmp_path / "run" / "validation.jsonl").open()):
        assert line["tokens"] == len(targets)
        bits = line["loss"] * len(targets) / math.log(2)
        assert line["bits_per_byte"] == pytest.approx(bits / sizes[targets].sum())
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))

    settings = Settings.load(tmp_path / "run" / "settings.yaml")
    train = Corpus.open(known.folder, settings.model).train
    schedule = train.schedule(4, 3, settings.train.seed)
    places = [p for window in (0, 1) for lane in range(4) for p in schedule.chunks(window, lane)]
    read = [place for place in places if place is not None]
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    assert line["tokens_seen"] == sum(
        int((known.shards["train"][s][c] != PAD).sum()) for s, c in read
    )
    seen = [2 * min(2, known.depth("train", shard)[chunk]) for shard, chunk in read]
    gate = 1 / settings.compression.ramp_steps
    assert line["gate"] == pytest.approx(gate)
    assert line["active_latents"] == pytest.approx(sum(seen) / len(seen))
