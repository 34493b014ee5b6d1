"""Paths as they are typed: literally, but for a leading `~`."""

import argparse
from pathlib import Path


def typed_path(text: str) -> Path:
    """The path that a user typed; the `type` of every command-line option that names one.

    A leading `~` is the home folder, everything else is literal.

    Raises:
        argparse.ArgumentTypeError: the text is empty, or the home folder that it names is unknown.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: name a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: there is no such home folder; write ./{text} for a folder of that name"
        ) from None
