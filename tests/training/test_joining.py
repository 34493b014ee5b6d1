"""Two softmaxes become one as training goes on: when, and what a checkpoint of it means."""

from pathlib import Path

import pytest

from i3dist.checkpoint import verify
from i3dist.checkpoint.format import read_state
from i3dist.checkpoint.weights import load_run
from i3dist.config import Settings
from i3dist.inference.evaluate import evaluate
from i3dist.training.startup import decide
from i3dist.training.summary import joining
from tests.training.runs import ROWS, Asked, K, Start, TrainedRun

STEPS, SHARES = 6, [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]  # of each step
JOINS = {
    "model.layers": "1xrwkv,1xdual-attention",
    "compression.off_steps": 0,
    "compression.ramp_steps": 0,
    "compression.join_after": 2,
    "compression.join_steps": 4,
    "train.steps": STEPS,
    "checkpoint.every": 1,
    "log.diagnose_every": 0,
    "validate.every": 1,
}


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    run = start(tmp_path_factory.mktemp("whole") / "run", **JOINS)
    assert run.trainer.fit()
    return run


def test_each_step_has_its_share(whole: TrainedRun) -> None:
    assert [line["joined"] for line in whole.lines("metrics")] == SHARES


def test_cut_where_they_are_partly_one(whole: TrainedRun, start: Start, tmp_path: Path) -> None:
    """The run that goes on ends with the weights of the uninterrupted one, bit for bit."""
    folder = tmp_path / "run"
    assert not start(folder, stop=Asked(4), **JOINS).trainer.fit()
    after = start(folder, **JOINS)
    path = verify.newest_whole(folder / "checkpoints", after.trainer.checkpointer.saver.job)
    assert path is not None and path.name == "step-00000004"
    after.trainer.checkpointer.restore(path, read_state(path))
    assert after.trainer.fit()
    ends = (run.settings.run.path / "model.safetensors" for run in (whole, after))
    assert len({end.read_bytes() for end in ends}) == 1


def test_weights_are_read_with_the_share_of_their_last_step(whole: TrainedRun) -> None:
    """A run's and a checkpoint's. So they have the held-out loss that the run measured."""
    run, validator = whole.settings.run.path, whole.trainer.validator
    (run / "settings.yaml").write_text(whole.settings.to_yaml())
    (run / "tokenizer.json").write_bytes((whole.data.folder / "tokenizer.json").read_bytes())
    places = {n: run / "checkpoints" / f"step-{n:08d}" for n in range(1, STEPS)} | {STEPS: run}
    measured = {line["step"]: line["loss"] for line in whole.lines("validation")}
    for step, path in places.items():
        model, *_ = load_run(path, whole.engine.device, whole.engine.dtype)
        assert model.joined == SHARES[step - 1]
        losses = []
        for share in (model.joined, 0.0):
            model.join_softmaxes(share)
            text = validator.corpus.tokenizer.token_bytes()
            losses.append(evaluate(model, validator.held_out, text, ROWS, K).loss)
        assert losses[0] == measured[step]
        assert (losses[0] == losses[1]) == (SHARES[step - 1] == 0)


def test_an_overview_says_when_they_become_one_in_the_run() -> None:
    def said(*words: str) -> str:
        return joining(decide(Settings.load(None, list(words)), 1, 500))

    assert said("train.steps=4001").endswith(" joins the chunk's after 4,000 steps, over 2,000")
    assert not said("train.steps=4000")
    assert said("compression.join_after=4", "compression.join_steps=7", "train.steps=5") == (
        "; its softmax joins the chunk's after 4 steps, over 7"
    )
    assert said("compression.join_after=-500").endswith(" 25% joined, fully after 1,500 steps")
    assert said("compression.join_after=0", "compression.join_steps=0").endswith("from the start")
    assert not said("compression.join_after=never", "train.steps=9000")
    assert not said("model.layers=1xrwkv,1xattention", "train.steps=9000")
