"""What all programs share: an option parser, and errors that are one line."""

import argparse
import os
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from i3dist.cli import streams
from i3dist.errors import UserError, reason

# Most errors hit all ranks alike. The other ranks wait so long before they print theirs; meanwhile
# the first has printed its own and exited, and the launcher ends the others.
OTHERS_WAIT_SECONDS = 3.0
# srun ends the others as soon as one exits. Before they have met, those that started later need so
# long until they can leave with status 1 (`programs.train.start`).
LATE_SECONDS = 3.0
HELP_WIDTH = 80
DEBUG = "I3DIST_DEBUG"  # set to 1, tracebacks are printed too


@dataclass
class _Program:
    """What this process has said of itself."""

    name: str | None = None
    """What the user typed to start it."""
    commands: dict[str, str] = field(default_factory=dict)
    """By a program's file: what starts the same."""
    traceback_folder: Path | None = None
    on_failure: Callable[[str], None] | None = None
    tell_others: Callable[[], None] | None = None
    """That this rank has failed."""


_this = _Program()


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps help at 80 columns, not at hyphens: they are in the names of options.

    A paragraph with indented lines keeps its line breaks.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=HELP_WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = []
        for part in text.strip().split("\n\n"):
            lines = part.splitlines() if "\n " in f"\n{part}" else [" ".join(part.split())]
            wrapped = (
                textwrap.fill(
                    line,
                    width,
                    subsequent_indent=" " * 8 * line.startswith(" "),
                    break_on_hyphens=False,
                )
                for line in lines
            )
            parts.append("\n".join(wrapped))
        return "\n\n".join(parts)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class ArgumentParser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line like all others."""

    def __init__(self, **options: Any) -> None:
        if _this.name is not None:
            options["prog"] = _this.name
        super().__init__(**{"allow_abbrev": False, "formatter_class": _HelpFormatter, **options})

    def format_help(self) -> str:
        """The help; where this program is a command, it names others as commands too."""
        return as_typed(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and exiting."""
        raise UserError(f"{message} (see --help)")


def type_as(name: str, commands: Mapping[str, str] = {}) -> None:
    """From now on this program is called `name` in its help, and others by these commands.

    Args:
        name: "i3dist train".
        commands: what starts the same as each file, such as "launch/train.py".
    """
    _this.name = name
    _this.commands.update(commands)


def as_typed(text: str) -> str:
    """A text for the user, with commands in place of the programs' files."""
    for file, command in _this.commands.items():
        text = text.replace(f"python {file}", command).replace(file, command)
    return text


def keep_tracebacks_in(folder: Path) -> None:
    """From now on write tracebacks to this folder, if it exists, instead of a temporary one."""
    _this.traceback_folder = folder


def call_on_failure(call: Callable[[str], None]) -> None:
    """From now on pass an error's line to this too, when it has been printed, before the exit."""
    _this.on_failure = call


def tell_others_by(tell: Callable[[], None]) -> None:
    """From now on call this when the line of an error has been printed, before the exit."""
    _this.tell_others = tell


@contextmanager
def one_line_errors(output_is_result: bool = False) -> Iterator[None]:
    """Print an error as one line on stderr and exit with status 1, without a traceback.

    The traceback of an unexpected error is written to a file, which the line names. With
    I3DIST_DEBUG=1 every traceback is printed too. The exit skips interpreter teardown, so a failed
    rank ends at once even while others wait for it. For `output_is_result` see `streams.prepare`.
    """
    streams.prepare(output_is_result)
    threading.excepthook = _report_thread
    if os.environ.get(DEBUG) != "1":
        sys.unraisablehook = lambda _: None  # errors in destructors change nothing
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _leave("interrupted")
    except BaseException as error:  # a panic of a library in Rust is no Exception
        _leave(_describe(error))


def _leave(message: str) -> NoReturn:
    rank = _rank()
    late = LATE_SECONDS * (_this.tell_others is None and is_one_of_several_tasks())
    if rank != "0":
        time.sleep(OTHERS_WAIT_SECONDS + late)
    where = "" if rank == "0" else f"[rank {rank}] "
    print(f"{where}error: {as_typed(message)}", file=sys.stderr, flush=True)
    if _this.on_failure is not None:
        _this.on_failure(as_typed(message))
    if _this.tell_others is not None:
        _this.tell_others()
    elif rank == "0":
        time.sleep(late)
    os._exit(1)


def is_one_of_several_tasks() -> bool:
    """Whether srun started this process beside others, all of which it ends when one fails."""
    return os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def _describe(error: BaseException) -> str:
    """An error as one line; an unexpected one with the file of its traceback."""
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename):
        return reason(error)
    unforeseen = "" if isinstance(error, OSError) else "unexpected "
    return f"{unforeseen}{reason(error)}; {_keep(error)}"


def _keep(error: BaseException) -> str:
    """Write a traceback to a file that stays, and return words that say where it is."""
    text = "".join(traceback.format_exception(error))
    own = _this.traceback_folder
    ours = [own] if own and own.is_dir() else []
    for folder in (*ours, None):  # None is the folder for temporary files
        try:
            number, name = tempfile.mkstemp(".txt", f"i3dist-error-rank{_rank()}-", folder)
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        return f"the traceback is in {name}"
    return f"no folder takes a file with the traceback: {DEBUG}=1 prints it"


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """Print one line about a thread that failed; the code that waits for it decides what to do."""
    if failed.exc_value is not None and failed.exc_type is not SystemExit:
        name = failed.thread.name if failed.thread else "unknown"
        print(f"warning: thread {name}: {_describe(failed.exc_value)}", file=sys.stderr, flush=True)
