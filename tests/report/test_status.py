"""How a run fares, concluded from its folder: states, figures and warnings."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.programs.status import STATUS, lines, main, shown
from i3dist.report.status import _trend, lock_holder, read_status
from i3dist.tracking.metrics_log import EVENTS, METRICS, STARTS, MetricsLog
from tests.launch.conftest import typed

HOLDER = """
import fcntl, os, sys
fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    values = {"train.steps": 1000, "checkpoint.every": 100}
    (tmp_path / "settings.yaml").write_text(Settings().with_values(**values).to_yaml())
    (tmp_path / ".lock").touch()
    return tmp_path


@contextmanager
def held(run: Path) -> Iterator[int]:
    """The run's process, which holds its folder."""
    words = [sys.executable, "-c", HOLDER, str(run / ".lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process.pid
        process.communicate()


def write(run: Path, name: str, step: int, age: float = 0.0, **line: Any) -> None:
    """A line of a log, written so many seconds ago."""
    MetricsLog(run / name).extend([{"step": step, **line, "time": time.time() - age}])
    os.utime(run / name, (time.time() - age,) * 2)


def train(run: Path, steps: int = 500, age: float = 0.0, **last: Any) -> None:
    """The run was started, and has reported every 10 steps; a step takes a second."""
    write(run, STARTS, 0, age + steps + 1)
    write(run, EVENTS, 0, age + steps, event="start", host=os.uname().nodename)
    figures = {"tokens_per_second": 1000.0, "skipped_steps": 0, "data_wait": 0.0, "loss": 3.0}
    for step in range(10, steps + 1, 10):
        figures["mean_loss"] = 4.0 - step / 1000
        more = last if step == steps else {}
        write(run, METRICS, step, age + steps - step, **figures | more)


def event(run: Path, name: str, **more: Any) -> None:
    write(run, EVENTS, 500, 0.0, event=name, host=os.uname().nodename, **more)


def test_each_state_has_its_exit_status(run: Path) -> None:
    write(run, STARTS, 0, 100)
    assert read_status(run).state == "starting"
    train(run)
    with held(run):
        assert read_status(run).state == "training"
    assert read_status(run).state == "failed"  # it is of this host, and nobody holds the folder
    event(run, "failure", reason="disk full")
    status = read_status(run)
    assert (status.state, status.why) == ("failed", "disk full")
    event(run, "requeue", reason="SIGUSR1")
    assert read_status(run).state == "waiting"
    write(run, STARTS, 500)
    assert read_status(run).state == "starting"
    write(run, METRICS, 1000)
    event(run, "end")
    assert read_status(run).state == "ended"
    (run / METRICS).unlink()
    assert read_status(run).state == "ended"
    assert sorted(STATUS.values()) == [0, 0, 2, 3, 4, 5]


@pytest.mark.parametrize("words", [[], ["--watch", "0.2"]])
def test_the_program_exits_with_it_and_watches_until_the_run_stops(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    train(run)
    if words:  # it ends while it is watched
        begun = iter([lambda: None, lambda: event(run, "requeue", reason="SIGTERM")])
        monkeypatch.setattr("i3dist.programs.status.time.sleep", lambda _: next(begun)())
    else:
        event(run, "requeue", reason="SIGTERM")
    typed(monkeypatch, run, *words)
    with held(run) if words else nullcontext(), pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == STATUS["waiting"] == 3
    out = capsys.readouterr().out
    assert "state     waiting: SIGTERM" in out and out.endswith("\n")
    assert out.count("state     training: ") == 2 * len(words[:1]), "as a file keeps it"


@pytest.mark.parametrize("pause", ["0", "-3", "nan", "inf", "1e12"])
def test_a_pause_that_cannot_be_kept_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, pause: str
) -> None:
    typed(monkeypatch, run, "--watch", pause)
    with pytest.raises(UserError, match=r"name a number of seconds from 0.1 to 86,400"):
        main()


def test_a_run_that_reports_nothing_is_silent_as_soon_as_its_pace_allows_no_doubt(
    run: Path,
) -> None:
    train(run, age=290)
    with held(run):
        assert read_status(run).state == "training"
        for name in (METRICS, EVENTS, STARTS):
            os.utime(run / name, (time.time() - 310,) * 2)
        status = read_status(run)
        assert (status.state, STATUS[status.state]) == ("silent", 5)
        assert "it hangs: nothing was written for 310 s" in status.why
    (run / METRICS).unlink()
    for step in (100, 200, 300):  # a line in 100 s: five of them may be late
        write(run, METRICS, step, 400 + 300 - step)
    with held(run):
        assert read_status(run).state == "training"


def test_a_suspended_run_is_silent_at_once_and_one_that_waits_for_data_says_so(run: Path) -> None:
    train(run)
    with held(run) as process:
        os.kill(process, signal.SIGSTOP)
        status = read_status(run)
        os.kill(process, signal.SIGCONT)
        assert (status.state, STATUS[status.state]) == ("silent", 5)
        assert f"process {process} is suspended" in status.why
        write(run, EVENTS, 500, 50, event="wait", reason="rank 1 waits", host=os.uname().nodename)
        status = read_status(run)
        assert (status.state, "50 s ago: rank 1 waits" in status.why) == ("training", False)
        os.utime(run / METRICS, (time.time() - 100,) * 2)
        (run / METRICS).write_text("")
        status = read_status(run)
        assert (status.state, "rank 1 waits" in status.why) == ("training", True)
        write(run, METRICS, 501)
        assert "rank 1" not in read_status(run).why
        write(run, EVENTS, 501, 150, event="wait", reason="rank 1 waits", host=os.uname().nodename)
        (run / METRICS).write_text("")
        os.utime(run / METRICS, (time.time() - 200,) * 2)
        assert "rank 1" not in read_status(run).why  # not said again since


def test_a_run_of_another_host_is_not_called_dead_for_a_lock_that_is_not_seen(run: Path) -> None:
    train(run)
    write(run, EVENTS, 0, 500, event="start", host="another")
    assert read_status(run).state == "training"


def test_asking_for_the_lock_does_not_take_it(run: Path) -> None:
    assert lock_holder(run) == 0
    with held(run) as process:
        assert lock_holder(run) == process
    assert lock_holder(run / "absent") is None
    with (run / ".lock").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_figures_are_those_of_the_last_lines(run: Path) -> None:
    train(run, mfu=0.47, slowest_rank=3, slowest_compute=1.2, fastest_compute=1.0)
    checkpoint = run / "checkpoints" / "step-00000400"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(1000))
    with held(run):
        text = str(shown(read_status(run)))
    for said in (
        "step      500 of 1,000 (50.0%)",
        "loss      3.5000, falls by 1 in 1,000 steps",
        "speed     1.0k tok/s, MFU 47%",
        "slowest   rank 3, which computes 20% more time than the fastest",
        "ETA       8m20s",
        "saved     step 400, ",
        "started   1 time\n",
        "warning   rank 3 holds up the others",
    ):
        assert said in text
    assert max(map(len, text.splitlines()[1:])) <= 80


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({"loss": None}, "the last loss is not a number"),
        ({"skipped_steps": 4}, "4 steps were skipped as bad"),
        ({"tokens_per_second": 700.0}, "speed is 70% of what it was"),
        ({"data_wait": 0.25}, "rank 0 waits for data in 25% of the time"),
    ],
)
def test_what_a_person_should_look_at_is_a_warning(
    run: Path, last: dict[str, Any], says: str
) -> None:
    train(run, steps=150, **last)
    assert [text for topic, text in lines(read_status(run)) if topic == "warning"] == [
        says + (" not long ago" if "skipped" in says else "")
    ]


def test_a_missing_checkpoint_is_a_warning_when_two_should_be_there(run: Path) -> None:
    train(run, steps=210)
    assert list(read_status(run).warnings()) == ["the newest checkpoint is 210 steps old"]


def test_a_full_disk_is_a_warning_without_a_checkpoint_too_and_one_rank_is_not_the_slowest(
    run: Path,
) -> None:
    train(run, steps=150, slowest_compute=1.2, fastest_compute=1.0)  # of a job of one rank
    status = replace(read_status(run), free=0)
    assert list(status.warnings()) == ["the disk is almost full"]
    assert "slowest" not in str(shown(status))


def test_a_run_without_any_line_has_a_status(run: Path) -> None:
    text = str(shown(read_status(run)))
    assert "step      0 of 1,000 (0.0%)" in text and "no checkpoint yet" in text
    (run / "checkpoints" / "step-00000006").mkdir(parents=True)  # it was stopped early
    assert "step      6 of 1,000 (0.6%)" in str(shown(read_status(run)))


def test_what_is_no_run_is_one_line(run: Path) -> None:
    for folder, says in ((run / "no", "is no folder"), (run / "checkpoints", "holds no run")):
        (run / "checkpoints").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=says):
            read_status(folder)


@settings(max_examples=50)
@given(
    slope=st.floats(-1e-2, 1e-2),
    noise=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
    count=st.integers(3, 50),
)
def test_a_trend_is_told_from_noise(slope: float, noise: float, seed: int, count: int) -> None:
    steps = 10 * np.arange(count)
    losses = slope * steps + noise * np.random.default_rng(seed).standard_normal(count)
    found = _trend([{"step": s, "mean_loss": y} for s, y in zip(steps, losses, strict=True)])
    assert (found is None) == (count < 8)
    spread = noise / (10 * (count**3 / 12) ** 0.5)  # of the slope, by least squares
    if found is not None and abs(slope) > 20 * spread + 1e-9:
        assert found == pytest.approx(1000 * slope, abs=1000 * 7 * spread + 1e-6)


def test_noise_is_no_trend() -> None:
    flat = [{"step": n, "mean_loss": 3.0 + 0.1 * (-1) ** n} for n in range(50)]
    assert _trend(flat) == 0.0
