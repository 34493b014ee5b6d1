"""Data with a mask: training and validation count the learned tokens, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from i3dist.data.manifest import Manifest
from i3dist.data.shards import read_shard
from i3dist.data.token_types import MASKED, with_mask
from i3dist.data.tokenizer import Tokenizer
from i3dist.ops.cross_entropy import IGNORE
from tests.data.splits import split_of
from tests.known import CHUNK, PER_SHARD, TOKENIZER
from tests.training.runs import Start, TrainedRun

STEPS = 6
Document = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""What is asked, the answer, and what is said after it: ids."""


def conversations(seed: int, count: int) -> list[Document]:
    """Random ones; many are longer than a chunk of 8 tokens, some than a shard of 32."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 26, (count, 3)).tolist()
    return [tuple(rng.integers(13, 271, n).tolist() for n in sizes) for sizes in lengths]


def write(folder: Path, documents: dict[str, Sequence[Document]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    tokenizer = Tokenizer(TOKENIZER, folder / "tokenizer.json")
    for name, held in documents.items():
        stored = [
            with_mask(
                np.concatenate(parts), np.repeat([False, True, False], [len(p) for p in parts])
            ).tolist()
            for parts in held
        ]
        vocab, sha256 = tokenizer.vocab_size, tokenizer.sha256
        split_of(folder / name, stored, CHUNK, PER_SHARD, vocab, sha256, MASKED.name)
    return folder


ORIGINAL = {"train": conversations(0, 40), "valid": conversations(1, 6)}


@pytest.fixture(scope="module")
def run(start: Start, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(start, tmp_path_factory.mktemp("original"), ORIGINAL)


def train(start: Start, folder: Path, documents: dict[str, Sequence[Document]]) -> TrainedRun:
    data = write(folder / "data", documents)
    run = start(folder / "run", data=data, **{"train.steps": STEPS, "validate.chunks": 1000})
    run.done = run.trainer.fit()
    return run


def figures(run: TrainedRun) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each step."""
    return [(line["loss"], line["gradient_norm"]) for line in run.lines("ledger")]


def weights(run: TrainedRun) -> bytes:
    return (run.settings.run.path / "model.safetensors").read_bytes()


def test_only_learned_tokens_are_targets(run: TrainedRun) -> None:
    data = run.settings.data.path
    manifest = Manifest.load(data / "train")
    schedule = run.trainer.data.schedule
    for number, step in enumerate(run.engine.steps):
        targets = np.concatenate([micro.targets.numpy().ravel() for micro in step.micros])
        wanted = []
        for index in range(2 * number, 2 * number + 2):
            for lane in range(4):
                for shard, chunk in filter(None, schedule.chunks(index, lane)):
                    held = read_shard(data / "train", manifest, shard)
                    after = slice(chunk * CHUNK + 1, chunk * CHUNK + CHUNK + 1)
                    tokens, learned = held.tokens.ravel()[after], held.learned.ravel()[after]  # type: ignore[union-attr]
                    wanted += tokens[learned].tolist()
        assert sorted(targets[targets != IGNORE].tolist()) == sorted(wanted)
        assert {micro.scaled_by for micro in step.micros} == {len(wanted)}


def test_the_loss_is_the_mean_over_learned_targets(run: TrainedRun) -> None:
    for line, step in zip(run.lines("metrics"), run.engine.steps, strict=True):
        count = sum(int((micro.targets != IGNORE).sum()) for micro in step.micros)
        total = sum(micro.loss for micro in step.micros)
        assert line["loss"] == pytest.approx(total / count, rel=1e-5)


def test_validation_counts_learned_tokens_only(run: TrainedRun) -> None:
    """All of them but the first of a shard, before which nothing stands."""
    folder = run.settings.data.path / "valid"
    manifest = Manifest.load(folder)
    read = [read_shard(folder, manifest, n) for n in range(len(manifest.shards))]
    learned = sum(int(held.learned.ravel()[1:].sum()) for held in read)  # type: ignore[union-attr]
    assert {line["tokens"] for line in run.lines("validation")} == {learned}


def test_what_is_said_after_the_last_answer_changes_nothing(
    run: TrainedRun, start: Start, tmp_path: Path
) -> None:
    """Such tokens are targets that are not learned, and no input of one that is: with others in
    their place every loss, gradient and weight is the same, bit for bit."""
    rng = np.random.default_rng(7)
    others = {
        name: [(q, a, rng.integers(13, 271, len(after)).tolist()) for q, a, after in held]
        for name, held in ORIGINAL.items()
    }
    assert others != ORIGINAL
    changed = train(start, tmp_path, others)
    assert figures(changed) == figures(run)
    assert weights(changed) == weights(run)


def test_another_answer_changes_the_loss(run: TrainedRun, start: Start, tmp_path: Path) -> None:
    others = {n: [(q, [*a[:-1], 13], after) for q, a, after in h] for n, h in ORIGINAL.items()}
    changed = train(start, tmp_path, others)
    assert all(one != other for one, other in zip(figures(changed), figures(run), strict=True))
