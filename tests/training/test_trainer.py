"""When a run validates, saves and ends, and what stops it early."""

import errno
from pathlib import Path
from unittest import mock

import pytest

from i3dist.checkpoint import store, verify
from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.checkpoint.format import read_state
from i3dist.config import Settings
from i3dist.distributed import collectives
from i3dist.errors import UserError
from i3dist.training.orders import SAVE, STOP, Orders
from tests.training.runs import STEPS, WINDOWS, Start, TrainedRun


def test_intervals_end_where_they_say_and_with_the_run(run: TrainedRun) -> None:
    saved = sorted(path.name for path in (run.settings.run.path / "checkpoints").glob("step-*"))
    assert saved == [f"step-{step:08d}" for step in (4, 8, 11)]
    assert [line["step"] for line in run.lines("validation")] == [0, 4, 8, 11]
    assert [line["step"] for line in run.lines("diagnostics")] == [3, 6, 9, 11]


def test_a_checkpoint_says_where_the_run_stood(run: TrainedRun) -> None:
    seen = {line["step"]: line["tokens_seen"] for line in run.lines("metrics")}
    for step in (4, 8, 11):
        path = run.settings.run.path / "checkpoints" / f"step-{step:08d}"
        state = read_state(path)
        assert (state.step, state.windows, state.taken) == (step, step * WINDOWS, step)
        assert state.tokens_seen == seen[step]
        assert state.data == run.trainer.validator.corpus.fingerprint
        assert Settings.build(state.settings) == run.settings


def test_a_run_is_done_at_its_last_step_only(
    run: TrainedRun, stopped: tuple[TrainedRun, TrainedRun]
) -> None:
    before, after = stopped
    assert (run.done, before.done, after.done) == (True, False, True)
    assert len(before.engine.steps) == 6, "the step in which it was asked is the last"
    assert not any(step.sums[1] for step in before.engine.steps[:-1])
    assert before.engine.steps[-1].sums[1] == 1
    assert [len(r.engine.steps) for r in (run, after)] == [STEPS, STEPS - 6]
    assert (before.settings.run.path / "model.safetensors").exists()


def test_orders_are_followed_at_the_next_step_and_carried_out_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was given before the run began; looking at files costs the steps nothing."""
    run = tmp_path / "run"
    run.mkdir()
    (run / SAVE).touch()
    trained = start(run, **{"checkpoint.every": 0})
    trainer, orders, take = trained.trainer, trained.trainer.orders, trained.trainer.train_step
    monkeypatch.setattr(orders, "_watch", lambda: None)  # in place of its thread, see below

    def observed(*batches: object) -> None:
        take(*batches)  # type: ignore[arg-type]
        step = trainer.progress.step
        if step in (4, 6):
            (run / {4: SAVE, 6: STOP}[step]).touch()
            orders._look()
            assert not orders.stop and (step == 6 or not orders.save), "only a vote decides"

    monkeypatch.setattr(trainer, "train_step", observed)
    assert not trainer.fit() and trainer.progress.step == 7 and trainer.votes.to_stop
    assert store.steps(run / "checkpoints") == [7, 5, 1]
    assert not (run / SAVE).exists() and not (run / STOP).exists()


def test_an_order_that_cannot_be_removed_is_followed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another user's, or on a file system that has become read-only; and a folder is no order."""
    (tmp_path / SAVE).touch()
    (tmp_path / STOP).mkdir()
    orders = Orders(tmp_path, looks=False)
    denied = mock.Mock(
        side_effect=PermissionError(errno.EPERM, "Not permitted", f"{tmp_path / SAVE}")
    )
    monkeypatch.setattr(Path, "unlink", denied)
    for wanted in (1.0, 0.0):
        orders._look()
        assert orders.votes() == (wanted, 0.0)
        orders.count(*orders.votes())
        orders.done()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tmp_path / SAVE}: Not permitted: it has been followed")
    monkeypatch.undo()
    (tmp_path / SAVE).unlink()  # as the line says
    orders._look()
    (tmp_path / SAVE).touch()
    orders._look()
    assert orders.votes() == (1.0, 0.0), "another order"


def test_ranks_meet_after_the_start_while_its_long_limit_holds(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may compile for longer than a validation or a step may take."""
    trainer, events = start(tmp_path / "run").trainer, []
    monkeypatch.setattr(trainer.watchdog, "beat", events.append)
    monkeypatch.setattr(collectives, "barrier", lambda: events.append("barrier"))
    trainer.begin()
    assert events == ["barrier", "validating"]


@pytest.mark.parametrize("where", ["validator.validate", "train_step", "checkpointer.export"])
def test_what_follows_an_error_is_not_watched(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It may take longer than guard.hang_seconds, and would end before the error is told."""
    trainer = start(tmp_path / "run", **{"train.steps": 1, "guard.hang_seconds": 1000}).trainer
    failed = mock.Mock(side_effect=UserError("the true error"))
    *part, name = where.split(".")
    monkeypatch.setattr(getattr(trainer, *part) if part else trainer, name, failed)
    watched = []

    def leave(*_: object) -> None:
        watched.append(not trainer.watchdog._closed.is_set())

    monkeypatch.setattr(AsyncSaver, "__exit__", leave)
    with pytest.raises(UserError, match="the true error"):
        trainer.fit()
    assert watched == [False]


def test_the_last_save_is_watched_to_its_end(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(tmp_path / "run", **{"train.steps": 1, "guard.hang_seconds": 1000}).trainer
    watched, wait = [], AsyncSaver.wait

    def observed(saver: AsyncSaver) -> None:
        if saver._writing is not None:
            watched.append(not trainer.watchdog._closed.is_set())
        wait(saver)

    monkeypatch.setattr(AsyncSaver, "wait", observed)
    assert trainer.fit() and watched == [True] and trainer.watchdog._closed.is_set()


@pytest.mark.parametrize("way", ["restore", "roll_back"])
def test_a_checkpoint_that_another_rank_cannot_read_stops_this_one_too(
    stopped: tuple[TrainedRun, TrainedRun],
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """It would wait for the other in what the ranks do together next."""
    trainer = start(tmp_path / "run").trainer
    path = verify.newest_whole(
        stopped[0].settings.run.path / "checkpoints", trainer.checkpointer.saver.job
    )
    assert path is not None
    monkeypatch.setattr(verify, "newest_whole", lambda *_: path)
    monkeypatch.setattr(
        collectives, "gather_objects", lambda mine, _=None: [mine, (None, "not here")]
    )
    with pytest.raises(UserError, match=r"^not here$"):
        if way == "restore":
            trainer.checkpointer.restore(path, read_state(path))
        else:
            trainer.recovery.roll_back()
    assert trainer.progress.step == 0
