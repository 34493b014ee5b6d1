"""Paths and names as users type them: literal, except that a leading `~` is the home folder."""

import argparse
import os
import re
from pathlib import Path
from typing import Literal

from i3dist.errors import UserError
from i3dist.files import check_writable

CONFIGS = Path(__file__).parent.parent / "configs"
"""The settings files that come with the package."""

Place = Path | str
"""A path, or a URL as text."""


def literal_path(text: str) -> Path:
    """The path that a user typed: a leading `~` is the home folder, everything else is literal.

    Raises:
        ValueError: the text is empty, a URL or no path, or names a home folder that is unknown.
    """
    if not text:
        raise ValueError("the path is empty: name a file or folder")
    if is_url(text):
        raise ValueError(
            f"a URL cannot be used here: name a file or folder (./{text} is one of this disk)"
        )
    if "\0" in text:
        raise ValueError("no path has a zero byte in it: name another")
    # Not Path.expanduser: Path("./~x") is Path("~x"), and would be expanded too.
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise ValueError(f"there is no such home folder; write ./{text} for a folder of that name")
    return Path(expanded)


def is_url(text: str) -> bool:
    """Whether a text is a URL: SCHEME://... or pipe:COMMAND."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", text) is not None


def literal_place(text: str) -> Place:
    """The URL or the path that a user typed.

    Raises:
        ValueError: as `literal_path`, and for a URL with bytes that are no text.
    """
    return literal_name(text) if is_url(text) else literal_path(text)


def path_or_auto(text: str) -> Path | Literal["auto"]:
    """The path that a user typed, or the word auto (./auto is a path)."""
    return "auto" if text == "auto" else literal_path(text)


def optional_path(text: str) -> Path:
    """The path that a user typed where there may be none: in a file, ~ is none."""
    return literal_path(text)


def path_text(path: Path) -> str:
    """The inverse of `literal_path` and of `literal_place`."""
    return f"./{path}" if str(path).startswith("~") or is_url(str(path)) else str(path)


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


def typed_place(text: str) -> Place:
    """`literal_place`, as the `type` of a command-line option; errors as `typed_path`'s."""
    try:
        return literal_place(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def typed_path(text: str) -> Path:
    """`literal_path`, as the `type` of a command-line option.

    Raises:
        argparse.ArgumentTypeError: with the message of `literal_path`.
    """
    try:
        return literal_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def result_path(text: str) -> Path:
    """A file for `write_result` to write, as the `type` of a command-line option.

    Raises:
        argparse.ArgumentTypeError: it cannot be written: better now than after the work.
    """
    return _writable_path(text, appended=False)


def appended_path(text: str) -> Path:
    """A file to open and add results to; otherwise as `result_path`."""
    return _writable_path(text, appended=True)


def _writable_path(text: str, appended: bool) -> Path:
    path = typed_path(text)
    try:
        check_writable(path, appended)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def typed_config(text: str) -> Path:
    """A settings file, as the `type` of a command-line option: its path, or the name of one of
    `CONFIGS` where there is no such path.

    Raises:
        argparse.ArgumentTypeError: the text is no path, or a name of none.
    """
    path = typed_path(text)
    if path.exists() or not re.fullmatch(r"\w[\w-]*", text):
        return path
    named = CONFIGS / f"{text}.yaml"
    if not named.exists():
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise argparse.ArgumentTypeError(f"{text!r} is no file, and none of {names}")
    return named
