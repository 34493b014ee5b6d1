"""Errors as a user is meant to see them: a line that says what, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 1000  # characters
LONGEST_REASON = 300  # characters of a message that was not written for users


class UserError(Exception):
    """Bad input or a bad environment. The message is one line: what, where, what to do.

    What a damaged file put into it does no harm: characters that cannot be printed become "?", and
    of a very long line the middle is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(printable(message))


def printable(text: object) -> str:
    """As text, "?" in place of every character that cannot be printed."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def explain(error: UserError | OSError) -> str:
    """An error as one line; one of the system's (a full disk, say) with its file and reason."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def reason(error: BaseException) -> str:
    """Any exception as one line, its type first where it was not made for users."""
    if isinstance(error, UserError | OSError):
        return str(UserError(explain(error)))
    lines = str(error).strip().splitlines()
    # An error of another process comes with its traceback, the last line of which says most.
    lines = [lines[0], lines[-1]] if "Traceback" in str(error) else lines[:1]
    text = " ".join([f"{type(error).__name__}:", *lines])[:LONGEST_REASON]
    return str(UserError(text.rstrip(":")))


@contextmanager
def warned(what: str) -> Iterator[None]:
    """Do what decides nothing: whatever fails inside costs one line, ``warning: WHAT: reason``."""
    try:
        yield
    except Exception as error:
        print(f"warning: {what}: {reason(error)}", flush=True)
