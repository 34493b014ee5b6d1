"""Saving behind training: what is saved is what there was, and a failure is not lost."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from i3dist import checkpoint, shelf
from i3dist.checkpoint import OptimizerReader
from i3dist.config import CheckpointSettings
from i3dist.errors import UserError
from i3dist.fragment import Fragment
from i3dist.saver import Saver
from tests.conftest import program
from tests.test_checkpoint import JOB, fragment, random_lanes, state_of

WAIT_SECONDS = 30


class Training:
    """What a saver saves; it writes nothing before `go_on` is set."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.lanes = random_lanes(2)
        self.fragment = fragment("w", 0, 5)

    def begin(self, saver: Saver, step: int) -> None:
        saver.begin(state_of(step), self.snapshot, (range(2), self.lanes))

    def snapshot(self) -> Iterator[Fragment]:
        """Waits where it is read, in the saver's thread."""
        assert self.go_on.wait(WAIT_SECONDS)
        yield self.fragment


@pytest.fixture
def training() -> Iterator[Training]:
    training = Training()
    yield training
    training.go_on.set()  # so that a thread that waits ends


def saver(folder: Path) -> Saver:
    return Saver(folder, JOB, CheckpointSettings(keep=1))


def test_training_goes_on_meanwhile_and_what_is_saved_stays(
    tmp_path: Path, training: Training
) -> None:
    kept = training.lanes.map(torch.clone)
    saving = saver(tmp_path)
    training.begin(saving, 3)
    assert not shelf.candidates(tmp_path), "the caller did not wait"
    assert saving.step == 3 and not saving.failed()
    training.lanes.map(lambda part: part.zero_())  # the next steps
    training.go_on.set()
    saving.wait()
    (path,) = shelf.candidates(tmp_path)
    read = checkpoint.read_lanes(path, range(2), kept)
    for name, part in read.tensors().items():
        assert part.equal(kept.tensors()[name]), name
    assert OptimizerReader(path)["w"]["weight"].equal(training.fragment.tensors["weight"])


def test_one_is_written_at_a_time(tmp_path: Path, training: Training) -> None:
    """The next snapshot overwrites the last one's memory, so it waits."""
    saving = saver(tmp_path)
    training.begin(saving, 1)
    second = threading.Thread(target=training.begin, args=(saving, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not shelf.candidates(tmp_path)
    training.go_on.set()
    second.join(WAIT_SECONDS)
    saving.wait()
    assert [shelf.step_of(path) for path in shelf.candidates(tmp_path)] == [2]


def test_a_failure_is_known_and_raised(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, __: object) -> None:
        raise OSError(28, "No space left on device", "optimizer")

    monkeypatch.setattr(checkpoint, "_write_share", full)
    training.go_on.set()
    saving = saver(tmp_path)
    training.begin(saving, 1)
    with pytest.raises(UserError, match="step-00000001 was not saved: optimizer: No space left"):
        while True:  # training votes in every step until it is known
            if saving.failed():
                saving.wait()
    assert not saving.failed(), "it is raised once"
    assert not list(tmp_path.iterdir())


def test_what_is_being_written_is_finished_when_the_run_fails(
    tmp_path: Path, training: Training
) -> None:
    with pytest.raises(UserError, match="a shard is missing"), saver(tmp_path) as saving:
        training.begin(saving, 4)
        threading.Timer(0.2, training.go_on.set).start()
        raise UserError("a shard is missing")
    assert [shelf.step_of(path) for path in shelf.candidates(tmp_path)] == [4]


def test_what_hangs_is_not_waited_for_when_the_run_fails(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("i3dist.saver.SETTLE_SECONDS", 0.1)
    with pytest.raises(UserError, match="a shard is missing"), saver(tmp_path) as saving:
        training.begin(saving, 4)
        raise UserError("a shard is missing")
    assert not shelf.candidates(tmp_path)


def test_leaving_waits(tmp_path: Path, training: Training) -> None:
    with saver(tmp_path) as saving:
        training.begin(saving, 5)
        threading.Timer(0.2, training.go_on.set).start()
    assert [shelf.step_of(path) for path in shelf.candidates(tmp_path)] == [5]


def test_the_benchmark_saves_what_it_says(tmp_path: Path) -> None:
    """`benchmarks/saving.py` with a small model: every kind of interval, two with a checkpoint."""
    config = tmp_path / "small.yaml"
    config.write_text(
        "model: {d_model: 32, rwkv_layers: 1, attention_layers: 1, heads: 2, chunk_length: 64}\n"
        "train: {window_chunks: 1}\n"
    )
    words = ["--config", config, "--interval", 1, "--rounds", 1]
    result = program("benchmarks/saving.py", *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("saved /") == 3, "one to warm up"
    rows = [line for line in result.stdout.splitlines() if line.startswith("│ ")]
    assert [row.split("│")[1].strip() for row in rows] == [
        "no checkpoint",
        "saved behind",
        "waited for",
    ]
