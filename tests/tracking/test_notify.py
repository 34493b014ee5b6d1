"""What is told of a run, and to whom: events.jsonl and the user's command, in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from i3dist.tracking.metrics_log import EVENTS, METRICS, MetricsLog, read_lines
from i3dist.tracking.notify import UNSAID, Notifier
from tests.conftest import ROOT

COMMAND = 'echo "$I3DIST_EVENT|$I3DIST_STEP|$I3DIST_REASON|$I3DIST_RUN" >> "$I3DIST_RUN/../told"'
# A rank 0 that begins, says so, and waits; a data reader of it lives on.
RANK_0 = """
import os, sys, time
from pathlib import Path
from i3dist.tracking.notify import Notifier
told = Notifier(Path(sys.argv[1]), sys.argv[2])
told.start(lambda: 7)
if os.fork() == 0:
    time.sleep(90)
    os._exit(0)
print("begun", flush=True)
time.sleep(90)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    return folder


def told(run: Path) -> list[str]:
    file = run.parent / "told"
    return file.read_text().splitlines() if file.exists() else []


def events(run: Path) -> list[tuple[int, str, str]]:
    lines = read_lines(run / EVENTS)
    return [(line["step"], line["event"], line["reason"]) for line in lines]


def test_each_event_is_told_with_the_step_and_the_reason(run: Path) -> None:
    """The steps taken by then, of which metrics.jsonl may have reported none."""
    steps = [5]
    notifier = Notifier(run, COMMAND)
    notifier.start(lambda: steps[0])
    MetricsLog(run / METRICS).append(6, {})
    steps[0] = 9
    notifier.stop("requeue", 'it\'s "SIGTERM"; $HOME\n')
    notifier.leave("rank 1 failed", False)  # what the first call has told stays the last word
    assert told(run) == [f"start|5||{run}", f'requeue|9|it\'s "SIGTERM"; $HOME?|{run}']
    assert events(run) == [(5, "start", ""), (9, "requeue", 'it\'s "SIGTERM"; $HOME\n')]


def test_a_wait_is_told_after_a_minute_and_each_further_one_until_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notifier = Notifier(run, None)
    notifier.start(lambda: 5)

    def wait(seconds: float, at: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: at)
        notifier.waits(seconds, f"rank 1 waits for {seconds} s")
        if notifier.telling:
            notifier.telling.join()

    for seconds in (59, 61, 100, 121):
        wait(seconds, 1000.0 + seconds)
    notifier.stop("failure", "gone")
    wait(182, 1182.0)
    told = [(event, reason) for _, event, reason in events(run)]
    waits = [("wait", f"rank 1 waits for {seconds} s") for seconds in (61, 121)]
    assert told == [("start", ""), *waits, ("failure", "gone")]


def test_what_comes_before_the_run_began_leaves_the_folder_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process may hold it."""
    notifier = Notifier(run, COMMAND)
    notifier.waits(61, "rank 1 waits")
    assert notifier.telling is not None
    notifier.telling.join()
    assert capsys.readouterr().err == "warning: rank 1 waits\n"
    notifier.stop("failure", "no data")
    assert told(run) == [f"failure|0|no data|{run}"]
    assert not (run / EVENTS).exists()


def test_other_ranks_and_runs_without_a_command_start_nothing(run: Path) -> None:
    for notifier in (Notifier(run, COMMAND, active=False), Notifier(run, None)):
        notifier.start(lambda: 0)
        notifier.stop("end")
    assert told(run) == []
    assert [event for _, event, _ in events(run)] == ["start", "end"]


@pytest.mark.parametrize("reported", [[], [8, 9]])
def test_a_killed_process_is_told_of_by_another(run: Path, reported: list[int]) -> None:
    """Also while a fork of it holds the pipe, and if a launcher signals the children first; with
    the last step that it has reported."""
    MetricsLog(run / METRICS).append(99, {})  # of a start before, which was killed
    words = [sys.executable, "-c", RANK_0, str(run), COMMAND]
    rank = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert rank.stdout is not None
    with rank.stdout as said:
        said.readline()
        children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
        for step in reported:
            MetricsLog(run / METRICS).append(step, {})
        (watcher,) = [pid for pid in children if os.getsid(int(pid)) != rank.pid]
        deadline = time.monotonic() + 20
        while not told(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(int(watcher), signal.SIGTERM)
        os.kill(rank.pid, signal.SIGKILL)
        while len(told(run)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()
    assert told(run) == [f"start|7||{run}", f"failure|{[7, *reported][-1]}|{UNSAID}|{run}"]


def test_a_command_that_fails_or_hangs_costs_a_warning_and_little_time(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("i3dist.tracking.notify.WAIT_SECONDS", 0.5)
    began = time.monotonic()
    notifier = Notifier(run, 'test "$I3DIST_EVENT" = end && sleep 3; exit 7')
    notifier.start(lambda: 0)
    assert time.monotonic() - began < 0.5
    notifier.stop("end")
    assert time.monotonic() - began < 2
    assert "warning: tracking.notify: the command ended with status 7" in capfd.readouterr().err
