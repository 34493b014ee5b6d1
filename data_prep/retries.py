"""Does work on a network again until it succeeds, with growing pauses."""

import math
import multiprocessing
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from i3dist.data.download import TEMPORARY, shown
from i3dist.errors import UserError, printable

Result = TypeVar("Result")

PATIENCE_SECONDS = 300.0
"""How long work may fail without a success."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_TOLD_PAUSE = 4.0
"""The pause before which a person is told: after about three seconds without a success."""

_telling, _told = threading.Lock(), -math.inf  # when it last was told

_FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError)


def retried(work: Callable[[], Result], place: str, doing: str = "read") -> Result:
    """Do `work`, and again while it raises what may be temporary; `place` is what it reads, or is
    `doing` something else to.

    Raises:
        UserError: it has failed for good, or for `PATIENCE_SECONDS`.
    """
    start = time.monotonic()
    pause = _FIRST_PAUSE
    in_main = multiprocessing.parent_process() is None  # workers would all say the same
    while True:
        try:
            return work()
        except UserError:
            raise
        except Exception as error:  # libraries of many kinds of stores raise as many kinds
            tried = time.monotonic() - start
            if is_final(error):
                raise UserError(f"cannot {doing} {place}: {why(error)}; check the URL") from None
            if tried + pause > PATIENCE_SECONDS:
                raise UserError(
                    f"cannot {doing} {place} ({why(error)}; tried for {tried:.0f} s): run the same "
                    "command again when it can be reached, and it continues"
                ) from None
            if in_main and pause == _TOLD_PAUSE:
                _tell(f"cannot {doing} {place} ({why(error)})")
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _tell(problem: str) -> None:
    """Say that something is tried again; once in a while, as threads have the same problem."""
    global _told
    with _telling:
        if time.monotonic() - _told < _LONGEST_PAUSE:
            return
        _told = time.monotonic()
    again = f"trying again for up to {PATIENCE_SECONDS:.0f} s"
    print(printable(f"{problem}: {again}"), file=sys.stderr)


def is_final(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    cause = _cause(error)
    status = _status(cause)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in TEMPORARY
    return isinstance(cause, _FINAL) or "Credentials" in type(cause).__name__


def _cause(error: BaseException) -> BaseException:
    """What went wrong: fsspec says of whatever it is that a file is not there."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error


def _status(error: BaseException) -> object:
    """The HTTP status that an error of a library tells, if any."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None) or getattr(response, "status_code", None)


def why(error: BaseException) -> str:
    """An error of a library in a few words, without the passwords that its URLs may hold."""
    error = _cause(error)
    text = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
    return re.sub(r"\S+://\S+", lambda url: shown(url[0]), text)[:200]
