"""Samples of text: what they continue, that they are the model's, and that training is the same."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from i3dist.distributed import collectives
from i3dist.inference import samples
from i3dist.inference.generate import generate
from i3dist.inference.samples import NEW_TOKENS, SAMPLING, beginnings, continuations
from tests.data.splits import EOS, PAD
from tests.known import BOS, Known
from tests.training.runs import Start, TrainedRun


@pytest.fixture(scope="module")
def sampling(start: Start, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run like `run`, but with samples."""
    run = start(tmp_path_factory.mktemp("samples") / "run", **{"validate.samples": 2})
    watchdog, during = run.trainer.watchdog, []
    with mock.patch.object(collectives, "barrier", lambda: during.append(watchdog._doing)):
        run.done = run.trainer.fit()
    assert during.count("sampling text") == 4, "ranks wait for rank 0's texts, and so learn of them"
    return run


def test_training_with_samples_is_the_same_bit_for_bit(
    run: TrainedRun, sampling: TrainedRun
) -> None:
    assert sampling.lines("ledger") == run.lines("ledger")
    weights = [r.settings.run.path / "model.safetensors" for r in (run, sampling)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (run.settings.run.path / "samples.jsonl").exists()


def test_every_validation_has_the_texts_of_its_weights(sampling: TrainedRun) -> None:
    lines = sampling.lines("samples")
    assert [line["step"] for line in lines] == [0, 4, 8, 11]
    assert mock.call(sampling.settings.run.path / "samples.jsonl") in (
        sampling.tracker.artifact.call_args_list
    )
    prompts = [[sample["prompt"] for sample in line["samples"]] for line in lines]
    assert all(p == prompts[0] for p in prompts) and len(prompts[0]) == 2
    torch.rand(7)  # texts do not depend on the global random numbers
    model, tokenizer = sampling.engine.model, sampling.trainer.validator.corpus.tokenizer
    for seed, sample in enumerate(lines[-1]["samples"]):
        text = generate(model, tokenizer, sample["prompt"], NEW_TOKENS, SAMPLING, seed)
        assert sample["text"] == "".join(text)
    assert lines[0]["samples"] != lines[-1]["samples"]


@pytest.mark.parametrize(("count", "most"), [(1, 5), (2, 100), (1000, 5)])
def test_prompts_are_how_held_out_documents_begin(
    sampling: TrainedRun, known: Known, monkeypatch: pytest.MonkeyPatch, count: int, most: int
) -> None:
    monkeypatch.setattr(samples, "PROMPT_TOKENS", most)
    validator = sampling.trainer.validator
    tokenizer = validator.corpus.tokenizer
    wanted: list[list[int]] = []  # of each document its part in the shard in which it begins
    for shard in dict.fromkeys(shard for shard, _ in validator.held_out.places):
        begun = False
        for token in known.shards["valid"][shard].ravel().tolist():
            if token == BOS:
                begun = True
                wanted.append([])
            elif begun and token not in (EOS, PAD):
                wanted[-1].append(token)
    texts = [tokenizer.decode(ids[: min(most, len(ids) // 2)]).rstrip("\ufffd") for ids in wanted]
    assert len(texts) > 2 and all(texts)
    assert beginnings(validator.held_out, tokenizer, count) == texts[:count]


def test_texts_that_cannot_be_made_cost_a_warning(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = start(tmp_path / "run", **{"validate.samples": 1}).trainer
    with torch.no_grad():
        trainer.engine.model.head.weight.fill_(torch.nan)
    trainer.validator.validate()
    assert "warning: no samples of text: the model's logits are not finite" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_no_prompt_gives_no_text(sampling: TrainedRun) -> None:
    assert (
        continuations(sampling.engine.model, sampling.trainer.validator.corpus.tokenizer, []) == []
    )
