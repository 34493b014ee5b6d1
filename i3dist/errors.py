"""Errors as users see them: one line that says what is wrong, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 1000  # characters
LONGEST_REASON = 300  # characters of a message that was not written for users


class UserError(Exception):
    """Bad input or a bad environment. The message is one line: what, where, what to do.

    It may quote a damaged file: characters that cannot be printed become "?", and the middle of a
    very long line is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(printable(message))


def printable(text: object) -> str:
    """The text with "?" in place of every character that cannot be printed."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def explain(error: UserError | OSError) -> str:
    """An error as one line; a system error (such as a full disk) with its file and reason."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def reason(error: BaseException) -> str:
    """Any exception as one line; one that was not written for users begins with its type."""
    if isinstance(error, UserError | OSError):
        return str(UserError(explain(error)))
    lines = str(error).strip().splitlines()
    # The error of another process includes its traceback, whose last line says most.
    lines = [lines[0], lines[-1]] if "Traceback" in str(error) else lines[:1]
    text = " ".join([f"{type(error).__name__}:", *lines])[:LONGEST_REASON]
    return str(UserError(text.rstrip(":")))


@contextmanager
def warned(what: str) -> Iterator[None]:
    """Turn an error inside into one line, ``warning: WHAT: reason``, and go on."""
    try:
        yield
    except Exception as error:
        print(f"warning: {what}: {reason(error)}", flush=True)
