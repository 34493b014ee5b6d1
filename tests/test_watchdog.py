"""The watchdog of one process: silent while the run goes on, and stopped by nothing that hangs."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

HEAD = """
import os, re, time
from i3dist.dist import Job
from i3dist.watchdog import Watchdog
watchdog = Watchdog({seconds}, Job.detect({{}}))
"""
SLEEP = "watchdog.beat('taking a step')\ntime.sleep(60)\n"
# A regular expression that backtracks for ever holds the interpreter: no other thread runs.
HOLD = "watchdog.beat('taking a step')\nre.match('(a+)+b', 'a' * 64)\n"
ALIVE = """
for _ in range(12):
    watchdog.beat('taking a step')
    time.sleep(0.5)
watchdog.close()
"""


def run(text: str, seconds: float) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", HEAD.format(seconds=seconds) + text]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def test_what_sleeps_is_ended_in_time_and_says_where() -> None:
    result = run(SLEEP, 2)
    assert result.returncode == 1
    first, *stacks = result.stderr.splitlines()
    assert first.startswith("error: rank 0 is taking a step for ")
    assert any('File "<string>"' in line for line in stacks)


def test_what_holds_the_interpreter_is_ended_too() -> None:
    result = run(HOLD, 2)
    assert result.returncode == 1
    assert "Timeout (0:00:02)!" in result.stderr and 'File "<string>"' in result.stderr


@pytest.mark.parametrize("seconds", [0, 4])
def test_what_goes_on_is_left_alone(seconds: float) -> None:
    result = run(ALIVE, seconds)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_closed_watchdog_watches_nothing() -> None:
    result = run("watchdog.beat('saving')\nwatchdog.close()\ntime.sleep(2)\n", 1)
    assert (result.returncode, result.stderr) == (0, "")
