"""Work in a thread of its own, while the caller does something else."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

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
