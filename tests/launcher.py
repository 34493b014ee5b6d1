"""Starts programs as forks of a process that has imported already what takes seconds to import.

It stands in for torchrun and a fresh interpreter, of which other tests have enough: each rank is a
process of its own with torchrun's environment, and where one fails the others are ended.

    python -u -m tests.launcher     takes requests on standard input, a JSON line each, and answers
                                    each with the first status that is not 0
"""

import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

TIMED_OUT = "timed out"
SLOW = (
    "i3dist.tracking.plots",
    "i3dist.tracking.tracker",
    "i3dist.training.trainer",
    "torch._dynamo",
)
DEEPSPEED = "i3dist.training.run"  # imports it, and it looks for GPUs: then no fork can use one


class Launcher:
    """The process that programs are forks of, as its user sees it."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        """Programs run in `folder`; `environ` is what importing sees."""
        words = [sys.executable, "-u", "-m", "tests.launcher"]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            words, cwd=folder, env=environ, stdin=pipe, stdout=pipe, text=True
        )

    def run(
        self,
        words: list[str],
        environs: list[dict[str, str]],
        timeout: float,
        folder: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program, its path first, in one process for each environment.

        `folder` is the one to run it in, if it is another than this class was given.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        with TemporaryDirectory() as outputs:
            files = [Path(outputs, name) for name in ("stdout", "stderr")]
            request = {"words": words, "environs": environs, "timeout": timeout, "folder": folder}
            self._server.stdin.write(json.dumps(request | {"output": list(map(str, files))}) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
            assert answer, "the launcher has ended: its standard error says why"
            status = json.loads(answer)
            stdout, stderr = (file.read_text() for file in files)
        if status == TIMED_OUT:
            raise subprocess.TimeoutExpired(words, timeout, stdout, stderr)
        return subprocess.CompletedProcess(words, status, stdout, stderr)


def main() -> None:
    """Serve until standard input ends. In a fork: be the program that was asked for."""
    for module in SLOW:
        __import__(module)
    if not Path("/dev/nvidiactl").exists():
        __import__(DEEPSPEED)
    # A fork's garbage collector leaves alone what is here: it would copy it all, for a second.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        ranks = []
        for environ in request["environs"]:
            pid = os.fork()
            if not pid:
                os.chdir(request["folder"] or ".")
                become(request["words"], environ, request["output"])
                return
            ranks.append(psutil.Process(pid))
        print(json.dumps(status_of(ranks, request["timeout"])))


def become(words: list[str], environ: dict[str, str], output: list[str]) -> None:
    """Go on as a fresh interpreter that runs `words`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, path in enumerate(output, start=1):
        os.dup2(os.open(path, flags), stream)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def status_of(ranks: list[psutil.Process], timeout: float) -> int | str:
    """Wait for all ranks: the first status that is not 0, or that it took too long."""
    failures: list[int] = []

    def ended(rank: Any) -> None:
        if rank.returncode and not failures:
            failures.append(rank.returncode)
            for other in ranks:
                if other.is_running():
                    other.terminate()

    _, alive = psutil.wait_procs(ranks, timeout, callback=ended)
    for rank in alive:
        rank.kill()
    psutil.wait_procs(alive)
    return TIMED_OUT if alive else next(iter(failures), 0)


if __name__ == "__main__":
    main()
