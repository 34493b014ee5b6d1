"""Paths and names as users type them: literal, except that a leading `~` is the home folder."""

import argparse
import os
from pathlib import Path


def literal_path(text: str) -> Path:
    """The path that a user typed: a leading `~` is the home folder, everything else is literal.

    Raises:
        ValueError: the text is empty, is no path, or the home folder that it names is unknown.
    """
    if not text:
        raise ValueError("the path is empty: name a file or folder")
    if "\0" in text:
        raise ValueError("no path has a zero byte in it: name another")
    # Not Path.expanduser: Path("./~x") is Path("~x"), and would be expanded too.
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise ValueError(f"there is no such home folder; write ./{text} for a folder of that name")
    return Path(expanded)


def path_text(path: Path) -> str:
    """The inverse of `literal_path`."""
    return f"./{path}" if str(path).startswith("~") else str(path)


def as_unicode(name: object) -> str:
    """A name or path as valid Unicode: bytes that are no text become "?"."""
    return str(name).encode("utf-8", "replace").decode()


def literal_name(text: str) -> str:
    """The name that a user typed.

    Raises:
        ValueError: the text is empty, or has bytes that are no text.
    """
    if not text:
        raise ValueError("the name is empty: give one, or leave the setting out")
    if "\0" in text or text != as_unicode(text):
        raise ValueError("the name has bytes that are no text: give another")
    return text


def typed_path(text: str) -> Path:
    """`literal_path`, as the `type` of a command-line option.

    Raises:
        argparse.ArgumentTypeError: with the message of `literal_path`.
    """
    try:
        return literal_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
