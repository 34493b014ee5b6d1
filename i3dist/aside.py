"""Work in a thread or a process of its own, while the caller does something else."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def aside(work: Callable[[], Result], name: str) -> Callable[[], Result]:
    """Begin `work` in a thread, which does not keep the process from ending.

    Returns:
        What waits for the result, and raises what went wrong.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome.result


def start_module(
    name: str, *words: str, environ: dict[str, str], **options: Any
) -> subprocess.Popen[bytes]:
    """Run a module in a process of its own, with a pipe as its standard input.

    It imports the code that this process runs. The working directory, where `python -m` would look
    first (without -P), may hold another copy.

    Args:
        name: of the module, as "i3dist.tracking.notify".
        words: its command line.
        environ: variables in addition to this process's own.
        options: of `subprocess.Popen`.
    """
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", name, *words],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path} | environ,
        **options,
    )
