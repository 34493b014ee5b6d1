"""The watchdog of one process: silent while the run goes on, and stopped by nothing that hangs."""

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.distributed import watchdog
from i3dist.distributed.job import Job
from i3dist.distributed.watchdog import Watchdog
from tests.conftest import ROOT

HEAD = """
import os, re, time
from i3dist.distributed.job import Job
from i3dist.distributed.watchdog import Watchdog
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
    assert first.startswith("error: rank 0 has been taking a step for ")
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


class Ended(BaseException):
    """The process, at a time."""


class Simulation:
    """A run of a few seconds in no time: its clock moves when the watchdog's thread waits.

    It stands in for the modules that the watchdog uses, and is the event that ends its thread.
    """

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float, beats: list[float]) -> None:
        """`beats` are times; after the last the run closes its watchdog."""
        self.now, self.timer = 0.0, math.inf
        self.spoke: list[float] = []
        self.todo: list[tuple[float, Callable[[], None]]] = [
            (when, lambda: self.dog.beat("taking a step")) for when in beats[1:-1]
        ]
        self.todo.append((beats[-1], lambda: self.dog.close()))
        self.closed = False
        for name in ("time", "faulthandler", "os"):
            patch.setattr(watchdog, name, self)
        fakes = SimpleNamespace(Thread=lambda **_: self, Event=lambda: self, Lock=threading.Lock)
        patch.setattr(watchdog, "threading", fakes)
        patch.setattr(Watchdog, "_report", lambda *_: self.spoke.append(self.now))
        self.dog = Watchdog(seconds, Job.detect({}))
        self.dog.beat("taking a step")  # at time 0

    def run(self) -> float | None:
        """When the process was ended; None where it was not."""
        try:
            self.dog._watch()
        except Ended:
            return self.now
        assert self.timer == math.inf, "the timer would still strike"
        return None

    # time, os and faulthandler
    def monotonic(self) -> float:
        return self.now

    def _exit(self, _: int) -> None:
        raise Ended

    def sleep(self, seconds: float) -> None:
        self._advance(self.now + seconds)

    def dump_traceback_later(self, seconds: float, exit: bool) -> None:
        assert exit
        self.timer = self.now + seconds

    def cancel_dump_traceback_later(self) -> None:
        self.timer = math.inf

    # the thread and the event
    def start(self) -> None:
        pass

    def set(self) -> None:
        self.closed = True

    def is_set(self) -> bool:
        return self.closed

    def wait(self, seconds: float) -> bool:
        """What is due at the very end happens when the thread has woken, so as to race with it."""
        if self.closed:
            return True
        until = self.now + seconds
        self._advance(until, strictly=True)
        woken = self.closed
        self._advance(until)
        return woken

    def _advance(self, until: float, strictly: bool = False) -> None:
        while self.todo and (
            self.todo[0][0] < until or (self.todo[0][0] == until and not strictly)
        ):
            self.now, do = self.todo.pop(0)
            assert self.now < self.timer, "the timer has struck"
            do()
        self.now = until
        if self.now >= self.timer:
            raise Ended


LIMIT = 8.0
STEPS = st.lists(st.sampled_from([0.25, 1.0, 3.0, 6.0, 7.0, 7.75]), min_size=1, max_size=8)


def simulate(lengths: list[float]) -> tuple[float | None, list[float]]:
    """When a run of steps of these lengths is ended, and when its ranks speak."""
    beats = [0.0]
    for length in lengths:
        beats.append(beats[-1] + length)
    with pytest.MonkeyPatch.context() as patch:
        simulation = Simulation(patch, LIMIT, beats)
        return simulation.run(), simulation.spoke


@given(lengths=STEPS)
def test_steps_below_the_limit_are_never_ended(lengths: list[float]) -> None:
    """The last of them closes the watchdog, at whatever moment of its thread."""
    assert simulate(lengths) == (None, [])


@given(before=STEPS, longer=st.sampled_from([8.25, 9.0, 60.0]))
def test_a_step_above_the_limit_ends_all_after_a_time_to_speak(
    before: list[float], longer: float
) -> None:
    """Ranks whose step began up to so much later have spoken by then."""
    ended, spoke = simulate([*before, longer])
    assert spoke == [sum(before) + LIMIT]
    assert ended == spoke[0] + min(watchdog.GRACE_SECONDS, LIMIT / 4)


def test_that_nothing_can_be_said_does_not_keep_it_from_ending() -> None:
    """Its standard error is closed."""
    result = run("os.close(2)\n" + SLEEP, 1)
    assert (result.returncode, result.stderr) == (1, "")
