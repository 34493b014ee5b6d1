"""The watchdog of one process: silent while the run goes on, and stopped by nothing that hangs."""

import signal
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.distributed import collectives, watchdog
from i3dist.distributed.attempt import REQUEUE
from i3dist.distributed.job import Job
from i3dist.distributed.patience import DATA, SAVE, START, STEP
from i3dist.distributed.watchdog import Watchdog
from tests.conftest import environment, launcher

HEAD = """
import os, re, subprocess, sys, threading, time
from pathlib import Path
from i3dist.distributed.job import Job
from i3dist.distributed.watchdog import Watchdog
watchdog = Watchdog({seconds}, Job.detect({{}}), Path({folder!r}))
watchdog.beat('taking a step')
"""
SLEEP = "time.sleep(60)\n"
# A regular expression that backtracks for ever holds the interpreter: no other thread runs.
HOLD = "re.match('(a+)+b', 'a' * 64)\n"
ALIVE = """
for _ in range({beats}):
    time.sleep(0.5)
    watchdog.beat('taking a step')
watchdog.close()
"""
# A second of the machine's sleep, seen by all of its processes.
SUSPENDED = """
subprocess.Popen(["sh", "-c", f"kill -STOP {os.getpid()}; sleep 3; kill -CONT {os.getpid()}"])
"""
# A file system that does not answer: nobody opens the pipe's other end.
BLOCKED = """
def write():
    with watchdog.saving():
        open(sys.argv[1])
os.mkfifo(sys.argv[1])
threading.Thread(target=write, daemon=True).start()
"""


def run(folder: Path, text: str, seconds: float) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(HEAD.format(seconds=seconds, folder=str(folder)) + text)
    return launcher().run([str(script), str(folder / "fifo")], [environment()], 60)


def test_what_sleeps_is_ended_in_time_and_says_where(tmp_path: Path) -> None:
    result = run(tmp_path, SLEEP, 2)
    assert result.returncode == REQUEUE
    first, *stacks = result.stderr.splitlines()
    assert first.startswith("error: rank 0 has been taking a step for 2 s, so the job ends")
    assert any('script.py"' in line for line in stacks)


def test_what_holds_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    result = run(tmp_path, HOLD, 1)
    assert result.returncode == -signal.SIGPROF
    assert 'script.py"' in result.stderr


@pytest.mark.parametrize("before", ["", SUSPENDED])
def test_what_goes_on_is_left_alone(tmp_path: Path, before: str) -> None:
    """Also where it was stopped for longer than the limit."""
    result = run(tmp_path, before + ALIVE.format(beats=6), 2)
    assert (result.returncode, result.stderr) == (0, "")


def test_what_writes_a_checkpoint_is_watched_while_training_goes_on(tmp_path: Path) -> None:
    result = run(tmp_path, BLOCKED + ALIVE.format(beats=60), 2)
    assert result.returncode == REQUEUE
    assert result.stderr.startswith("error: rank 0 has been saving for 2 s")
    assert "in write" in result.stderr


@pytest.mark.parametrize("seconds", [0, 2])
def test_a_collective_that_times_out_ends_it_as_a_hang_does(tmp_path: Path, seconds: int) -> None:
    """Those of a job that was suspended for long, for example; 0 watches nothing."""
    error = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 70000ms for recv"
    result = run(tmp_path, f"with watchdog:\n    raise RuntimeError({error!r})\n", seconds)
    assert result.returncode == REQUEUE
    first, *stacks = result.stderr.splitlines()
    assert first.startswith("error: rank 0 waited for another") and error in first
    assert any('script.py"' in line for line in stacks)


@pytest.mark.parametrize("told", [True, False])
def test_who_finds_the_others_gone_asks_to_be_started_again_if_they_hung(
    tmp_path: Path, told: bool
) -> None:
    """As a rank that is continued when they have left; its main thread notices first."""
    hears = "threading.Timer(0.3, watchdog.other_hangs).start()\n" * told
    fails = "with watchdog:\n    raise RuntimeError('Connection closed by peer [::1]:1')\n"
    result = run(tmp_path, hears + fails, 4)
    assert result.returncode == (REQUEUE if told else 1)
    assert ("ends with another rank, which hangs" in result.stderr) == told


def test_that_nothing_can_be_said_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    """Its standard error is a pipe that nobody reads."""
    full = "reader, writer = os.pipe()\nos.dup2(writer, 2)\nos.set_blocking(2, False)\n"
    full += "while True:\n    try:\n        os.write(2, b'x' * 4096)\n"
    full += "    except BlockingIOError:\n        break\nos.set_blocking(2, True)\n"
    assert run(tmp_path, full + SLEEP, 1).returncode == REQUEUE


class Ended(BaseException):
    """The process, at a time."""


class Simulation:
    """A run of a few seconds in no time: its clock moves when the watchdog's thread waits.

    It stands in for the modules that the watchdog uses, and for its neighbours.
    """

    def __init__(self, patch: pytest.MonkeyPatch, setting: float | str) -> None:
        self.now, self.asleep = 0.0, 0.0
        self.said: list[tuple[float, str]] = []
        self.todo: list[tuple[float, Callable[[], object]]] = []
        self.timeouts: list[float] = []
        for name in ("time", "faulthandler", "os", "signal"):
            patch.setattr(watchdog, name, self)
        fakes = SimpleNamespace(Thread=self.thread, Event=threading.Event, Lock=threading.Lock)
        patch.setattr(watchdog, "threading", fakes)
        patch.setattr(watchdog, "Neighbours", lambda _: self)
        patch.setattr(watchdog.hang_report, "report", lambda line, *_: self.say(line))
        patch.setattr(collectives, "set_timeout", self.timeouts.append)
        self.dog = Watchdog(setting, Job.detect({}), Path("run"))  # type: ignore[arg-type]

    def at(self, when: float, do: Callable[[], object]) -> None:
        self.todo.append((when, do))

    def run(self) -> float | None:
        """When the process was ended; None where it was not."""
        self.advance(0.0)
        try:
            self.dog._watch()
        except Ended:
            return self.now
        return None

    def say(self, line: str) -> None:
        self.said.append((self.now, line))

    # what the watchdog calls
    ITIMER_PROF, SIGPROF = signal.ITIMER_PROF, signal.SIGPROF

    def thread(self, target: Callable[[], None], **_: object) -> SimpleNamespace:
        watches = target == self.dog._watch
        return SimpleNamespace(start=lambda: None if watches else target())

    def monotonic(self) -> float:
        return self.now + self.asleep

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def setitimer(self, *_: object) -> None:
        pass

    def register(self, *_: object, **__: object) -> None:
        pass

    def sched_getaffinity(self, _: int) -> set[int]:
        return {0}

    def _exit(self, status: int) -> None:
        assert status == REQUEUE
        raise Ended

    def tell(self) -> None:
        pass

    def wait(self, seconds: float) -> bool:
        """What is due at the very end happens when the thread has woken, so as to race with it."""
        self.advance(self.now + seconds)
        return False

    def advance(self, until: float) -> None:
        while self.todo and self.todo[0][0] < until + (until == 0.0):
            self.now, do = self.todo.pop(0)
            do()
        self.now = until


LIMIT = 8.0
LENGTHS = st.lists(st.sampled_from([0.25, 1.0, 3.0, 6.0, 7.0, 7.75]), min_size=1, max_size=8)


def simulate(
    works: list[tuple[str, float]], setting: float | str = LIMIT, asleep: float = 0.0
) -> tuple[float | None, Simulation]:
    """When a run of such works is ended, if it is; it sleeps so long in the middle of each."""
    with pytest.MonkeyPatch.context() as patch:
        simulation, now = Simulation(patch, setting), 0.0

        def suspend() -> None:
            simulation.asleep += asleep

        for work, seconds in works:
            simulation.at(now, lambda work=work: simulation.dog.beat(work))
            simulation.at(now + seconds / 2, suspend)
            now += seconds
        simulation.at(now, lambda: simulation.dog.close())
        return simulation.run(), simulation


@given(lengths=LENGTHS)
def test_steps_below_the_limit_are_never_ended(lengths: list[float]) -> None:
    """The last of them closes the watchdog, at whatever moment of its thread."""
    ended, simulation = simulate([(STEP, length) for length in lengths])
    assert (ended, simulation.said) == (None, [])


@given(before=LENGTHS, longer=st.sampled_from([8.25, 9.0, 60.0]))
def test_a_step_above_the_limit_ends_all_after_a_time_to_speak(
    before: list[float], longer: float
) -> None:
    """Ranks whose step began up to so much later have spoken by then."""
    ended, simulation = simulate([(STEP, length) for length in (*before, longer)])
    ((spoke, line),) = simulation.said
    assert spoke == sum(before) + LIMIT
    assert ended == spoke + min(watchdog.GRACE_SECONDS, LIMIT / 4)
    assert "taking a step for 8 s" in line


@given(lengths=st.lists(st.sampled_from([0.25, 1.0, 2.5]), min_size=1, max_size=8))
def test_a_machine_that_sleeps_ends_nothing(lengths: list[float]) -> None:
    """Nor does that time count as seen."""
    for setting in (LIMIT, "auto"):
        works = [(work, length) for length in lengths for work in ("validating", STEP)]
        ended, simulation = simulate(works, setting, asleep=1e5)
        assert (ended, simulation.said) == (None, [])
    assert simulation.dog.patience.limit("validating") == 300


@pytest.mark.parametrize(
    ("works", "at"),
    [
        ([(START, 1700.0), (START, 5000.0)], 1800.0),
        ([(START, 1700.0), (STEP, 1.0)], None),
        ([(START, 1700.0), (STEP, 10.0)], LIMIT),  # others are watched themselves
    ],
)
def test_each_part_of_a_start_has_half_an_hour_at_least(
    works: list[tuple[str, float]], at: float | None
) -> None:
    """Whatever number is the limit of all other work: it compiles, and reads checkpoints."""
    ended, simulation = simulate(works)
    if at is None:
        assert (ended, simulation.said) == (None, [])
    else:
        ((spoke, line),) = simulation.said
        assert spoke == works[0][1] + at
        wanted = "(guard.hang_seconds=8.0 allows 1800 s)" if at > LIMIT else "hang_seconds=8.0)"
        assert wanted in line


LEARNED = [(STEP, 1.0)] * 50


@pytest.mark.parametrize(
    ("works", "at"),
    [
        ([(STEP, 5000.0)], 1800.0),
        ([*LEARNED, (STEP, 5000.0)], 60.0),
        ([*LEARNED, ("validating", 100.0), (STEP, 1700.0)], None),  # others may still validate
        ([*LEARNED, ("validating", 100.0), (STEP, 1.0), ("validating", 1100.0)], 1000.0),
        ([*LEARNED, ("validating", 9.0), (STEP, 1.0), ("validating", 9.0), (STEP, 400.0)], 300.0),
        ([*LEARNED, ("validating", 100.0), (STEP, 1700.0), (STEP, 70.0)], 60.0),  # and not learned
        ([*LEARNED, (SAVE, 1.0), (STEP, 1.0), (SAVE, 1700.0), (STEP, 1.0)], None),
        ([(DATA, 5000.0)], 1800.0),
        ([*LEARNED, (DATA, 1.0), (STEP, 1.0), (DATA, 290.0), (STEP, 70.0)], 60.0),
        ([*LEARNED, (DATA, 1.0), (STEP, 1.0), (DATA, 310.0)], 300.0),
        ([*LEARNED, (DATA, 100.0), (STEP, 1.0), (DATA, 1100.0)], 1000.0),
        ([*LEARNED, ("validating", 100.0), (DATA, 1.0), (STEP, 1700.0)], None),
    ],
)
def test_auto_learns_from_what_it_sees(works: list[tuple[str, float]], at: float | None) -> None:
    """Collectives' time-outs follow: another rank may wait for data before, and a minute more."""
    ended, simulation = simulate(works, "auto")
    last = sum(seconds for _, seconds in works[:-1])
    assert ended == (None if at is None else pytest.approx(last + at + watchdog.GRACE_SECONDS))
    if at is not None and works[-1][0] != DATA:
        waits = [seconds for work, seconds in works if work == DATA]
        assert simulation.timeouts[-1] == at + (max(300, 10 * max(waits)) if waits else 1800) + 60


def test_time_outs_of_collectives_follow_another_ranks_wait_for_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulation = Simulation(monkeypatch, "auto")
    simulation.at(0.0, partial(simulation.dog.beat, STEP))
    simulation.at(50.0, partial(simulation.dog.other_waits, 50.0))
    simulation.at(51.0, partial(simulation.dog.beat, STEP))
    simulation.at(52.0, simulation.dog.close)
    assert simulation.run() is None
    assert [seconds - 1800 - 60 for seconds in simulation.timeouts] == [1800, 500]


def test_a_rank_ends_soon_with_one_of_another_host_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that has waited for that rank's data, which does not count as a hang of its own."""
    simulation = Simulation(monkeypatch, 100)
    simulation.at(0.0, partial(simulation.dog.beat, STEP))
    simulation.at(3.5, simulation.dog.other_hangs)
    assert simulation.run() == 4 + watchdog.GRACE_SECONDS
    ((_, line),) = simulation.said
    assert (
        line
        == "error: rank 0 has been taking a step for 4 s and ends with another rank, which hangs"
    )


def end_beside_a_rank_that_waits(work: str, waits: list[int], longer: float) -> float | None:
    """When a rank is ended whose works take so much longer than another rank's waits for data."""
    with pytest.MonkeyPatch.context() as patch:
        simulation, now = Simulation(patch, LIMIT), 0.0
        for wait in waits:
            simulation.at(now, partial(simulation.dog.beat, work))
            for second in range(1, wait + 1):
                simulation.at(now + second, partial(simulation.dog.other_waits, float(second)))
            now += wait + longer
        simulation.at(now, simulation.dog.close)
        return simulation.run()


@given(
    waits=st.lists(st.sampled_from([0, 7, 50]), min_size=1, max_size=4),
    longer=st.sampled_from([0.25, 6.75, 9.0]),
)
def test_a_step_may_take_longer_by_the_time_that_another_rank_waits_for_data(
    waits: list[int], longer: float
) -> None:
    ended = end_beside_a_rank_that_waits(STEP, waits, longer)
    grace = min(watchdog.GRACE_SECONDS, LIMIT / 4)
    assert ended == (None if longer < LIMIT else waits[0] + LIMIT + grace)


def test_a_rank_says_each_second_that_it_waits_for_data_also_while_it_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulation, told = Simulation(monkeypatch, LIMIT), []
    simulation.dog.on_wait = lambda *said: told.append(said)
    simulation.dog.reads = lambda: ["shard-7"]
    saving = simulation.dog.saving()
    simulation.at(0.0, saving.__enter__)  # so this has less time left
    simulation.at(0.5, partial(simulation.dog.beat, STEP))
    simulation.at(2.5, partial(simulation.dog.beat, DATA))
    simulation.at(6.75, simulation.dog.close)
    assert simulation.run() is None
    assert [seconds for seconds, _ in told] == [1.5, 2.5, 3.5]
    assert told[0][1] == "rank 0 has been waiting for data for 2 s (shard-7)"


def test_two_ranks_that_wait_for_data_do_not_excuse_each_other() -> None:
    assert end_beside_a_rank_that_waits(DATA, [50], 1.0) == LIMIT + LIMIT / 4
