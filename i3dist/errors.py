"""The one kind of error a user is meant to see: a line that says what, where, and what to do."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Ranks but the first wait so long before they speak: most errors strike all ranks alike, and the
# launcher ends the others once the first has spoken and gone.
OTHERS_WAIT_SECONDS = 3.0


class UserError(Exception):
    """Bad input or a bad environment. The message is one line: what, where, what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `UserError` as one line on stderr and leave with status 1, with no traceback.

    The exit skips interpreter teardown, so a rank that fails ends at once even where other ranks
    wait for it in a collective.
    """
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    try:
        yield
    except UserError as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = "error: interrupted"
    else:
        return
    if rank:
        time.sleep(OTHERS_WAIT_SECONDS)
        message = f"[rank {rank}] {message}"
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
