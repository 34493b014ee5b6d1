"""What every program of the project does: read its options, and end in one line where it fails."""

import argparse
import os
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from i3dist.cli import streams
from i3dist.errors import UserError, reason

# Ranks but the first wait so long before they speak: most errors strike all ranks alike, and the
# launcher ends the others once the first has spoken and gone.
OTHERS_WAIT_SECONDS = 3.0
HELP_WIDTH = 80
DEBUG = "I3DIST_DEBUG"  # set to 1, tracebacks are printed too

_traceback_folder: Path | None = None


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps help at 80 columns; a paragraph with indented lines keeps its line breaks."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=HELP_WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for part in text.strip().split("\n\n"):
            lines += part.splitlines() if "\n " in f"\n{part}" else [" ".join(part.split())]
            lines.append("")
        return "\n".join(
            textwrap.fill(line, width, subsequent_indent=" " * _indent(line)) for line in lines
        ).strip()


def _indent(line: str) -> int:
    """Where a line that is continued goes on: deeper than it begins, if that is indented."""
    blanks = len(line) - len(line.lstrip())
    return blanks + 4 if blanks else 0


class ArgumentParser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line like all others."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and exiting."""
        raise UserError(f"{message} (see --help)")


def keep_tracebacks_in(folder: Path) -> None:
    """Write tracebacks to this folder from now on, while it exists, rather than to a temporary."""
    global _traceback_folder
    _traceback_folder = folder


@contextmanager
def one_line_errors(output_is_result: bool = False) -> Iterator[None]:
    """Print an error as one line on stderr and leave with status 1, with no traceback.

    The traceback of an error that the program did not foresee is written to a file, which the line
    names; with I3DIST_DEBUG=1 every traceback is printed too. The exit skips interpreter teardown,
    so a rank that fails ends at once even where others wait for it. See `streams.prepare` for
    standard output.
    """
    streams.prepare(output_is_result)
    threading.excepthook = _say_of_thread
    if os.environ.get(DEBUG) != "1":
        sys.unraisablehook = lambda _: None  # what a destructor raises is of no consequence
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
        return
    except SystemExit:
        raise
    except KeyboardInterrupt:
        message = "interrupted"
    except BaseException as error:  # a panic of a library in Rust is no Exception
        message = _describe(error)
    _leave(message)


def _leave(message: str) -> NoReturn:
    rank = _rank()
    if rank != "0":
        time.sleep(OTHERS_WAIT_SECONDS)
    print(
        f"[rank {rank}] error: {message}" if rank != "0" else f"error: {message}", file=sys.stderr
    )
    sys.stderr.flush()
    os._exit(1)


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def _describe(error: BaseException) -> str:
    """An error as one line, with the file of its traceback where that may be wanted."""
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename):
        return reason(error)
    unforeseen = "" if isinstance(error, OSError) else "unexpected "
    return f"{unforeseen}{reason(error)}; {_keep(error)}"


def _keep(error: BaseException) -> str:
    """Write a traceback to a file that stays, and say where it is."""
    text = "".join(traceback.format_exception(error))
    ours = [_traceback_folder] if _traceback_folder and _traceback_folder.is_dir() else []
    for folder in (*ours, None):  # None is the folder for temporary files
        try:
            number, name = tempfile.mkstemp(".txt", f"i3dist-error-rank{_rank()}-", folder)
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        return f"the traceback is in {name}"
    return f"no folder takes a file with the traceback: {DEBUG}=1 prints it"


def _say_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Say in one line that a thread has failed; what waits for it decides what follows."""
    if failed.exc_value is not None and failed.exc_type is not SystemExit:
        name = failed.thread.name if failed.thread else "unknown"
        print(f"warning: thread {name}: {_describe(failed.exc_value)}", file=sys.stderr, flush=True)
