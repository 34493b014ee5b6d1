"""One document as a source gives it, and the check of whether it is usable text."""

import enum
from dataclasses import dataclass


class Skip(enum.Enum):
    """Why a document is left out."""

    NULL = "null"
    EMPTY = "empty"
    NOT_TEXT = "not text"
    UNDECODABLE = "undecodable"


@dataclass(frozen=True)
class Record:
    """A document as read. `position` is its place in the source, and differs for every one."""

    position: str
    id: str
    url: str
    text: object


def usable_text(raw: object) -> str | Skip:
    """The text of `raw` (a str, or UTF-8 bytes), or the reason why there is none."""
    if raw is None:
        return Skip.NULL
    try:
        if isinstance(raw, bytes):
            text = raw.decode()
        elif isinstance(raw, str):
            raw.encode()
            text = raw
        else:
            return Skip.NOT_TEXT
    except UnicodeError:
        return Skip.UNDECODABLE
    return text if text.strip() else Skip.EMPTY


def clean_name(value: object) -> str:
    """`value` as text that can be stored: what is not Unicode in it becomes a question mark."""
    return str(value).encode("utf-8", "replace").decode()


def clean_file_name(name: str) -> str:
    """The name of a file as text that can be stored and differs from other files' names."""
    return name.encode("utf-8", "backslashreplace").decode()
