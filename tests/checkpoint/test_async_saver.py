"""Saving behind training: what is saved is what there was, and a failure is not lost."""

import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from i3dist.checkpoint import store, writer
from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.checkpoint.format import Fragment, read_state
from i3dist.checkpoint.reader import OptimizerReader, read_lanes
from i3dist.config import CheckpointSettings, GuardSettings, Settings
from i3dist.data.schedule import Schedule
from i3dist.distributed.watchdog import Watchdog
from i3dist.engine.interface import Engine, StepResult
from i3dist.errors import UserError
from i3dist.training.checkpointer import Checkpointer
from i3dist.training.guard import Guard
from i3dist.training.ledger_writer import LedgerWriter
from i3dist.training.progress import Progress
from tests.checkpoint.test_format import JOB, fragment, random_lanes, state_of
from tests.conftest import program

WAIT_SECONDS = 30


class Training:
    """What a saver saves; it writes nothing before `go_on` is set."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.lanes = random_lanes(2)
        self.fragment = fragment("w", 0, 5)
        self.snapshots = 0

    def begin(self, saver: AsyncSaver, step: int) -> None:
        saver.begin(state_of(step), self.snapshot, (range(2), self.lanes))

    def snapshot(self) -> Iterator[Fragment]:
        """What it gives waits where it is read, in the saver's thread."""
        self.snapshots += 1
        return self._fragments()

    def _fragments(self) -> Iterator[Fragment]:
        assert self.go_on.wait(WAIT_SECONDS)
        yield self.fragment


@pytest.fixture
def training() -> Iterator[Training]:
    training = Training()
    yield training
    training.go_on.set()  # so that a thread that waits ends


def saver(folder: Path) -> AsyncSaver:
    return AsyncSaver(folder, JOB, CheckpointSettings(keep=1), b"{}")


def test_training_goes_on_meanwhile_and_what_is_saved_stays(
    tmp_path: Path, training: Training
) -> None:
    kept = training.lanes.map(torch.clone)
    saving = saver(tmp_path)
    training.begin(saving, 3)
    assert not store.candidates(tmp_path), "the caller did not wait"
    assert saving.step == 3 and not saving.failed()
    training.lanes.map(lambda part: part.zero_())  # the next steps
    training.go_on.set()
    saving.wait()
    (path,) = store.candidates(tmp_path)
    read = read_lanes(path, range(2), kept)
    for name, part in read.tensors().items():
        assert part.equal(kept.tensors()[name]), name
    assert OptimizerReader(path)["w"]["weight"].equal(training.fragment.tensors["weight"])


def test_nothing_that_is_changed_later_is_saved(tmp_path: Path, training: Training) -> None:
    """Whatever training still holds of the state: the guard, and dicts as deep as they go."""
    guard = Guard(GuardSettings(spike_factor=3.0, spike_window=2))
    for norm in (1.0, 2.0):
        guard.judge(StepResult(True, norm, [1.0]))
    state = state_of(2, guard.state).model_copy(update={"engine": {"bf16": {"enabled": True}}})
    was = state.model_dump(mode="json")
    saving = saver(tmp_path)
    saving.begin(state, training.snapshot, (range(2), training.lanes))
    for norm in (math.nan, math.nan, 9.0):
        guard.judge(StepResult(math.isfinite(norm), norm, [norm]))
    state.engine["bf16"]["enabled"] = False
    state.settings["optimizer"]["lr"] = 7.0
    training.go_on.set()
    saving.wait()
    (path,) = store.candidates(tmp_path)
    assert json.loads((path / "state.json").read_text()) == was
    assert read_state(path).taken == 2


def test_one_is_written_at_a_time(tmp_path: Path, training: Training) -> None:
    """The next snapshot overwrites the last one's memory, so it waits."""
    saving = saver(tmp_path)
    training.begin(saving, 1)
    begun = training.snapshots
    second = threading.Thread(target=training.begin, args=(saving, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not store.candidates(tmp_path)
    assert training.snapshots == begun, "no other was taken"
    training.go_on.set()
    second.join(WAIT_SECONDS)
    saving.wait()
    assert [store.step_of(path) for path in store.candidates(tmp_path)] == [2]


def test_a_failure_is_known_and_raised(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, __: object) -> None:
        raise OSError(28, "No space left on device", "optimizer")

    monkeypatch.setattr(writer, "write_files", full)
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
    assert [store.step_of(path) for path in store.candidates(tmp_path)] == [4]


def test_what_hangs_is_not_waited_for_when_the_run_fails(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("i3dist.checkpoint.async_saver.SETTLE_SECONDS", 0.1)
    with pytest.raises(UserError, match="a shard is missing"), saver(tmp_path) as saving:
        training.begin(saving, 4)
        raise UserError("a shard is missing")
    assert not store.candidates(tmp_path)


def test_leaving_waits(tmp_path: Path, training: Training) -> None:
    with saver(tmp_path) as saving:
        training.begin(saving, 5)
        threading.Timer(0.2, training.go_on.set).start()
    assert [store.step_of(path) for path in store.candidates(tmp_path)] == [5]


def test_the_ledger_is_on_disk_before_a_checkpoint_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its lines, up to the checkpoint's step, and the name of the file."""
    done: list[str] = []
    synced = os.fsync

    def sync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        lines = len(path.read_text().splitlines()) if path.is_file() else "folder"
        done.append(f"{path.name} {lines}")
        synced(handle)

    monkeypatch.setattr(os, "fsync", sync)
    lanes = random_lanes(2)
    saver = SimpleNamespace(step=0, begin=lambda state, *_: done.append(f"begin {state.step}"))
    ledger = LedgerWriter(tmp_path, Schedule((4, 4), 2, 2, seed=0), 1, range(2))
    for step in (1, 2, 3):
        stepped = StepResult(True, 1.0, [1.0])
        progress = Progress(9, lanes, torch.tensor(7), step, step)
        ledger.add(progress, torch.tensor(9), stepped, None)
    checkpointer = Checkpointer(
        settings=Settings(),
        data="x",
        lanes=range(2),
        engine=cast(Engine, SimpleNamespace(numeric_config={}, snapshot=None)),
        progress=progress,
        guard=Guard(GuardSettings()),
        ledger=ledger,
        watchdog=Watchdog(0, JOB, tmp_path),
        saver=cast(AsyncSaver, saver),
    )
    checkpointer.save()
    assert done == ["ledger.jsonl 3", f"{tmp_path.name} folder", "begin 3"]


def test_the_benchmark_saves_what_it_says(tmp_path: Path) -> None:
    """`benchmarks/saving.py` with a small model: all intervals, then writing beside the tools."""
    config = tmp_path / "small.yaml"
    config.write_text(
        "model: {d_model: 32, rwkv_layers: 1, attention_layers: 1, heads: 2, chunk_length: 64}\n"
        "train: {window_chunks: 1}\n"
    )
    words = ["--config", config, "--interval", 1, "--rounds", 1, "--folder", tmp_path]
    result = program("benchmarks/saving.py", *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"saved {tmp_path}/") == 3 + 2, "one to warm up each time"
    first = [row[0] for row in rows(result.stdout)]
    assert first[:3] == ["no checkpoint", "saved behind", "waited for"]
    assert first[3:7] == ["checkpoint", "sha256sum", "OpenSSL", "dd conv=fsync"]
    assert [path.name for path in tmp_path.iterdir()] == [config.name]


def test_the_benchmark_compares_as_many_bytes_as_it_was_told(tmp_path: Path) -> None:
    """Its share is that of the times that it prints. The default width has padding."""
    words = ["--gb", 0.05, "--rounds", 1, "--folder", tmp_path]
    result = program("benchmarks/saving.py", *words)
    assert result.returncode == 0, result.stderr
    *turns, share, _ = rows(result.stdout)
    assert [row[1] for row in turns] == 4 * ["0.05"]
    saved, hashed, _, copied = (float(row[5].replace(",", "")) for row in turns)
    slower = min(hashed, copied)
    rounding = 0.5 / saved + 0.5 / slower  # rates are printed as whole MB/s
    assert float(share[1].rstrip("%")) == pytest.approx(100 * saved / slower, rel=rounding, abs=1)


def rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    lines = (line for line in text.splitlines() if line.startswith("│ "))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
