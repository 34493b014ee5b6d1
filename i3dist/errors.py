"""The one kind of error a user is meant to see: a line that says what, where, and what to do."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

# Ranks but the first wait so long before they speak: most errors strike all ranks alike, and the
# launcher ends the others once the first has spoken and gone.
OTHERS_WAIT_SECONDS = 3.0
LONGEST_MESSAGE = 1000  # characters


class UserError(Exception):
    """Bad input or a bad environment. The message is one line: what, where, what to do.

    What a damaged file put into it does no harm: characters that cannot be printed become "?", and
    of a very long line the middle is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__("".join(char if char.isprintable() else "?" for char in message))


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line like all others, and which keeps help text as it is."""

    def __init__(self, **options: object) -> None:
        """As argparse, without abbreviations."""
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and exiting."""
        raise UserError(f"{message} (see --help)")


def explain(error: UserError | OSError) -> str:
    """An error as one line; one of the system's (a full disk, say) with its file and reason."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `UserError` as one line on stderr and leave with status 1, with no traceback.

    So is an `OSError` that nobody explained. The exit skips interpreter teardown, so a rank that
    fails ends at once even where others wait for it.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        message = "error: interrupted"
    except BrokenPipeError:  # the reader of our output has seen enough
        os._exit(1)
    except (UserError, OSError) as error:
        message = f"error: {explain(error)}"
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank != "0":
        time.sleep(OTHERS_WAIT_SECONDS)
        message = f"[rank {rank}] {message}"
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
