"""Asked to stop at any moment, two ranks save at the same step and leave with 75. 3 minutes."""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from i3dist.distributed.attempt import REQUEUE
from tests.conftest import QUICK, SAVING, STEPS, losses, program, run_ranks
from tests.faults.running import Running, running


def early(job: Running) -> None:
    """Before the first step, as when a terminal is closed."""
    job.ranks()[1].send_signal(signal.SIGHUP)


def every_process(job: Running) -> None:
    """As srun passes a signal on: to readers of data as well."""
    for process in [*job.readers(), *job.ranks()]:
        process.send_signal(signal.SIGUSR1)


def on_and_on(job: Running) -> None:
    """First one rank, then both while they follow it."""
    job.ranks()[1].send_signal(signal.SIGTERM)
    for rank in job.ranks() * 20:
        time.sleep(0.02)
        with suppress(psutil.NoSuchProcess):  # it may have left meanwhile
            rank.send_signal(signal.SIGTERM)


def by_order(job: Running) -> None:
    """RUN/STOP, which no launcher is to undo."""
    (job.output.parent / "run" / "STOP").touch()


def the_launcher(job: Running) -> None:
    """Which then signals a rank and its readers, and itself returns 1 whatever the ranks do."""
    job.launcher().terminate()


@pytest.mark.parametrize(
    ("ask", "moment", "status"),
    [
        (early, "parameters", REQUEUE),
        (every_process, "step  5/", REQUEUE),  # while it saves as it would anyway
        (on_and_on, "step  7/", REQUEUE),
        (by_order, "step  3/", 0),
        (the_launcher, "step  2/", 1),
    ],
)
def test_asked_to_stop(
    ask: Callable[[Running], None],
    moment: str,
    status: int,
    whole: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    run, words = tmp_path / "run", [*QUICK, *SAVING, f"data.path={data}", "data.workers=1"]
    if ask is early:
        words += ["validate.every=9"]  # before the first step, which is not to come first
    with running(tmp_path / "output", *words, f"run.path={run}") as job:
        job.wait_for(moment)
        ask(job)
        assert job.command.wait(60) == status, job.output.read_text()
        said = job.output.read_text()
    assert "Traceback" not in said and "error:" not in said
    asked = f"as {run}/STOP asked" if ask is by_order else "on request"
    step = int(said.split(f"stopped {asked} at step ")[1].split(":")[0])
    assert not (run / "STOP").exists()
    if ask is early:
        assert "told to stop by SIGHUP on rank 1 (" in said
        assert step == 0 and not (run / "checkpoints").exists()
        return
    assert 2 <= step < STEPS
    assert (run / "checkpoints" / "latest").read_text() == f"step-{step:08d}"
    assert not list((run / "checkpoints").glob(".*"))
    assert (run / "plots" / "loss.png").is_file()
    if ask is on_and_on:  # once is enough to show that what was saved is whole
        assert run_ranks(*words, f"run.path={run}").returncode == 0
        assert losses(run) == losses(whole)
        assert program("launch/ledger.py", run, whole, "--data", data).returncode == 0
        weights = "model.safetensors"
        assert (run / weights).read_bytes() == (whole / weights).read_bytes()
