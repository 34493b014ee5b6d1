"""A running job of two ranks, and its processes, for tests that break something."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.conftest import ROOT, deepspeed_command, environment


class Running:
    """A job of two ranks under the deepspeed launcher, and its processes."""

    def __init__(self, command: subprocess.Popen[str], output: Path) -> None:
        self.command = command
        self.output = output

    def said(self) -> str:
        """Its output so far, which may end in the middle of a character."""
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.said():
            assert self.command.poll() is None, self.said()
            assert time.monotonic() < deadline, f"no {text!r} in {self.said()}"
            time.sleep(0.02)

    def launcher(self) -> psutil.Process:
        (launcher,) = psutil.Process(self.command.pid).children()
        return launcher

    def ranks(self) -> list[psutil.Process]:
        return self.launcher().children()

    def readers(self) -> list[psutil.Process]:
        """Processes that read data for the ranks."""
        return [child for rank in self.ranks() for child in rank.children()]

    def processes(self) -> list[psutil.Process]:
        """Whatever lives of the job: all of it is in the session that the command began."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            owned = os.getsid(process.pid) == self.command.pid
            return owned and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ProcessLookupError):
            return False


@contextmanager
def running(output: Path, *words: object) -> Iterator[Running]:
    """Start a job; whatever of it is left at the end is killed."""
    with output.open("w") as file:
        command = subprocess.Popen(
            [str(word) for word in [*deepspeed_command(), *words]],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    job = Running(command, output)
    try:
        yield job
    finally:
        for process in job.processes():
            with suppress(psutil.Error):
                process.kill()
        command.wait(30)
