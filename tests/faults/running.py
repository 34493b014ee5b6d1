"""A job of two ranks that is under way, and its processes: to be disturbed."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import ROOT, deepspeed_command, environment


class Running:
    """A job of two ranks under the deepspeed launcher, and its processes."""

    def __init__(self, command: subprocess.Popen[str], output: Path) -> None:
        self.command = command
        self.output = output

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.output.read_text():
            assert self.command.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, f"no {text!r} in {self.output.read_text()}"
            time.sleep(0.02)

    def launcher(self) -> psutil.Process:
        (launcher,) = psutil.Process(self.command.pid).children()
        return launcher

    def ranks(self) -> list[psutil.Process]:
        return self.launcher().children()

    def readers(self) -> list[psutil.Process]:
        """Processes that read data for the ranks."""
        return [child for rank in self.ranks() for child in rank.children()]


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
    try:
        yield Running(command, output)
    finally:
        # All of the job is in the session that the command began.
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == command.pid:
                    process.kill()
            except (psutil.Error, ProcessLookupError):
                pass
        command.wait(30)
