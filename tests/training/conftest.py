"""Runs of the trainer that several files of tests look at: a real engine on one CPU rank."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from i3dist.checkpoint import verify
from i3dist.checkpoint.format import read_state
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.distributed.job import Job
from i3dist.distributed.watchdog import Watchdog
from i3dist.engine.interface import Engine
from i3dist.engine.setup import read_engine_config
from i3dist.model.lm import I3LM
from i3dist.tracking.outbox import LOGS
from i3dist.training.start_times import StartTimes
from i3dist.training.trainer import Trainer
from tests.conftest import ROOT, one_rank
from tests.known import BOS, PAD, Known, documents, make
from tests.training.runs import VALUES, Asked, Recorder, Start, TrainedRun


@pytest.fixture(scope="module")
def job() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """17 shards of training for 4 lanes, the last chunk of them partly padding: lanes' epochs end
    unevenly."""
    data = make(tmp_path_factory.mktemp("known") / "data", documents(0, 17), documents(1, 4))
    assert len(data.shards["train"]) == 17 and (data.shards["train"][-1][-1] == PAD).any()
    return data


@pytest.fixture(scope="module")
def start(job: None, known: Known) -> Iterator[Start]:
    """Puts a trainer together, as launch/train.py does."""
    made: list[Engine] = []

    def put_together(
        folder: Path,
        stop: Asked | None = None,
        bad: set[int] | None = None,
        data: Path = known.folder,
        **changes: Any,
    ) -> TrainedRun:
        settings = Settings().with_values(
            **VALUES, **{"data.path": str(data), "run.path": str(folder)}
        )
        settings = settings.with_values(**changes)
        corpus = Corpus.open(data, settings.model.model_copy(update={"vocab_size": "auto"}))
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        recorder = Recorder(
            I3LM(settings.model, BOS),
            read_engine_config(ROOT / "configs" / "zero2.json"),
            settings.optimizer,
            settings.train,
        )
        recorder.bad = frozenset(bad or ())
        made.append(recorder)
        tracker, sent = mock.Mock(), []
        files = [settings.run.path / name for name in LOGS]
        tracker.send = lambda: sent.append(
            sum(len(file.read_text().splitlines()) for file in files if file.exists())
        )
        job = Job.detect({})
        watchdog = Watchdog(settings.guard.hang_seconds, job, folder)
        told, times = stop or Asked(), StartTimes()
        trainer = Trainer(settings, job, corpus, recorder, tracker, told, times, watchdog)  # type: ignore[arg-type]
        return TrainedRun(trainer, recorder, tracker, known, settings=settings, sent=sent)

    yield put_together
    for recorder in made:
        recorder.close()


@pytest.fixture(scope="module")
def run(start: Start, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """An undisturbed run."""
    run = start(tmp_path_factory.mktemp("whole") / "run")
    run.done = run.trainer.fit()
    return run


@pytest.fixture(scope="module")
def stopped(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainedRun, TrainedRun]:
    """A run whose third step is skipped and which is asked to stop in its sixth; the one that goes
    on from there, and finds a line of a seventh step, as a run leaves it that is killed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    before = start(folder, stop=Asked(6), bad={2})
    before.done = before.trainer.fit()
    with (folder / "ledger.jsonl").open("a") as file:
        file.write(json.dumps(before.lines("ledger")[-1] | {"step": 7}) + "\n")
    after = start(folder)
    after.first = 6
    path = verify.newest_whole(folder / "checkpoints", after.trainer.checkpointer.saver.job)
    assert path is not None
    after.trainer.checkpointer.restore(path, read_state(path))
    after.done = after.trainer.fit()
    return before, after


@pytest.fixture(scope="module")
def skipping(start: Start, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run whose fourth and seventh steps' losses are not finite."""
    run = start(tmp_path_factory.mktemp("skipping") / "run", bad={3, 6})
    run.done = run.trainer.fit()
    return run


@pytest.fixture(scope="module", params=["whole", "continued", "skipping"])
def any_run(request: pytest.FixtureRequest) -> TrainedRun:
    if request.param == "continued":
        return request.getfixturevalue("stopped")[1]
    return request.getfixturevalue("run" if request.param == "whole" else "skipping")
