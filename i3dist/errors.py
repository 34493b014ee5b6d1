"""The one kind of error a user is meant to see: a line that says what, where, and what to do."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input or a bad environment. The message is one line: what, where, what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `UserError` as one line on stderr and leave with status 1, with no traceback.

    The exit skips interpreter teardown, so a rank that fails ends at once even where other ranks
    wait for it in a collective.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
    else:
        return
    sys.stdout.flush()
    os._exit(1)
