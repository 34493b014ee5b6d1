"""Worker processes: one that dies is reported, and none outlives the run that started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_prep.passes import SpillPlan, spill_all
from data_prep.sources import Part, Record
from data_prep.workers import Report, run_jobs
from i3dist.cli.program import one_line_errors  # noqa: F401  # of the code that tests run
from i3dist.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class DeadlyPart(Part):
    """Kills the process that reads it."""

    def records(self) -> Iterator[Record]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield Record("", "", "", "")


@dataclass(frozen=True)
class EndlessPart(Part):
    """Never comes to an end."""

    def records(self) -> Iterator[Record]:
        while True:
            time.sleep(0.01)
            yield Record("", "", "", "text")


def spill(folder: Path, tokenizer: Path, part: type[DeadlyPart] | type[EndlessPart]) -> None:
    plan = SpillPlan([part(), part()], tokenizer, folder, 0)
    spill_all(plan, 2, lambda parts, tokens: None)


def test_a_worker_that_dies_is_reported(built: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a worker process died .* it continues"):
        spill(tmp_path, built / "tokenizer.json", DeadlyPart)


@dataclass(frozen=True)
class Uneven:
    """The first job fails, the others go on for minutes."""

    def start(self, report: Report) -> Callable[[int], None]:
        def work(job: int) -> None:
            for _ in range(6000 if job else 10):
                time.sleep(0.05)
                report(0, 1)
            raise UserError(f"job {job} has failed")

        return work


def test_a_job_that_fails_ends_the_others() -> None:
    """They would write into a folder that the next run is writing. All that is said is one line."""
    code = "from tests.data_prep.test_passes import *\n"
    code += "with one_line_errors(): run_jobs(Uneven(), range(3), 3, lambda *_: None)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "error: job 0 has failed\n"


def test_verifying_that_fails_is_one_line() -> None:
    code = "from tests.data_prep.test_passes import *\n"
    code += "from data_prep.checks.verification import _Pool\n"
    code += "with one_line_errors(), _Pool(2) as pool: list(pool.in_order([fails, sleeps, sleeps]))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "error: a task has failed\n"


def fails() -> None:
    raise UserError("a task has failed")


def sleeps() -> None:
    time.sleep(300)


def test_jobs_are_counted_and_their_results_in_order() -> None:
    for workers in (1, 2):
        counts = [0, 0]

        def report(units: int, tokens: int, counts: list[int] = counts) -> None:
            counts[0] += units
            counts[1] += tokens

        assert run_jobs(Squares(), range(20), workers, report) == [n * n for n in range(20)]
        assert counts == [20, 190]


@dataclass(frozen=True)
class Squares:
    """Squares numbers."""

    def start(self, report: Report) -> Callable[[int], int]:
        def work(job: int) -> int:
            report(1, job)
            return job * job

        return work


def test_no_worker_outlives_a_run_that_is_killed(built: Path, tmp_path: Path) -> None:
    code = "import sys; from tests.data_prep.test_passes import *; "
    code += "spill(Path(sys.argv[1]), Path(sys.argv[2]), EndlessPart)"
    words = [sys.executable, "-c", code, str(tmp_path), str(built / "tokenizer.json")]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL) as run:
        parent = psutil.Process(run.pid)
        while len(workers := parent.children()) < 3:  # with multiprocessing's resource tracker
            time.sleep(0.05)
        time.sleep(1.0)
        run.kill()
    deadline = time.monotonic() + 10
    while any(map(_is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, workers))


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
