"""Cut and continued equals uninterrupted, bit for bit. Two ranks; 20 s."""

import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.shards import read_shard
from i3dist.data.tokenizer import Tokenizer
from i3dist.tracking.metrics_log import read_lines
from tests.conftest import QUICK, differences, run_ranks, shards_of, texts

STEPS, ACCUMULATION, LANES, WINDOW, CHUNK = 8, 2, 4, 2, 64
SETTINGS = [
    *(*QUICK, f"train.steps={STEPS}", f"train.accumulation={ACCUMULATION}"),
    *("checkpoint.every=1", f"checkpoint.keep={STEPS}", f"model.chunk_length={CHUNK}"),
]


@pytest.fixture(scope="module")
def fitting(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of documents that fill 3, 1, 5, 3, 1 ... chunks to the last token."""
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    words = ["--tokenizer", data / "tokenizer.json", "--chunk-length", CHUNK]
    documents = pieces(tokenizer, "\n".join(texts()))
    return shards_of(documents, tmp_path_factory.mktemp("fitting"), *words)


def pieces(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """A text in pieces that, with <BOS> and <EOS>, fill whole chunks."""
    ids = tokenizer.encode(text)
    lengths = cycle(chunks * CHUNK - 2 for chunks in (3, 1, 5))
    while len(ids) > 5 * CHUNK:
        length = next(lengths)
        piece, ids = tokenizer.decode(ids[:length]), ids[length:]
        if len(tokenizer.encode(piece)) == length:  # else it came apart in another way
            yield piece


@pytest.fixture(scope="module")
def whole(fitting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = run_ranks(*SETTINGS, f"data.path={fitting}", f"run.path={run}")
    assert result.returncode == 0, result.stderr
    return run


def ending_lanes(data: Path, step: int) -> int:
    """In how many lanes the last token of a step is the last of a document."""
    split = Corpus.open(data, ModelSettings(chunk_length=CHUNK)).train
    schedule = split.schedule(LANES, WINDOW, seed=0)
    last = [schedule.chunks(step * ACCUMULATION - 1, lane)[-1] for lane in range(LANES)]
    shards = [read_shard(split.folder, split.manifest, shard) for shard, _ in last]
    tokens = [shard.tokens[chunk, -1] for shard, (_, chunk) in zip(shards, last, strict=True)]
    return tokens.count(split.manifest.eos_id)


def test_cut_where_a_document_ends(whole: Path, fitting: Path, tmp_path: Path) -> None:
    """It ends with the step's last window in some lanes, and goes on in the others."""
    steps = [step for step in range(2, STEPS - 1) if 0 < ending_lanes(fitting, step) < LANES]
    assert steps, "the data has such a step"
    run = tmp_path / "run"
    later = [f"step-{step:08d}" for step in range(steps[0] + 1, STEPS + 1)]
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("model.safetensors", *later))
    (run / "checkpoints" / "latest").write_text(f"step-{steps[0]:08d}")
    result = run_ranks(*SETTINGS, f"data.path={fitting}", f"run.path={run}")
    assert f"continued from step {steps[0]}\n" in result.stdout, result.stderr
    assert [line["step"] for line in read_lines(run / "starts.jsonl")] == [0, steps[0]]
    assert not differences(run, whole)
