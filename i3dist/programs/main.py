"""The program `i3dist`: a name for each of the project's programs. It imports only what it starts.

A new command is a line in `COMMANDS`. Its module does its work where it is run as `__main__`.
"""

import argparse
import difflib
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple

from i3dist import __version__
from i3dist.cli.program import ArgumentParser, one_line_errors, type_as
from i3dist.errors import UserError


class Command(NamedTuple):
    """What a command starts."""

    module: str
    file: str  # that starts the same in a checkout
    does: str


COMMANDS = {
    "shard": Command("data_prep.shard", "data_prep/shard.py", "turn text into training data"),
    "verify": Command("data_prep.verify", "data_prep/verify.py", "check such data"),
    "show": Command("data_prep.show", "data_prep/show.py", "lead from a token to its source"),
    "data-report": Command("data_prep.report", "data_prep/report.py", "describe such data"),
    "train": Command("i3dist.programs.train", "launch/train.py", "train a model"),
    "torchrun": Command(
        "i3dist.programs.torchrun", "launch/torchrun.py", "start ranks on several hosts"
    ),
    "preflight": Command(
        "i3dist.programs.preflight", "launch/preflight.py", "check the hosts of a job"
    ),
    "status": Command("i3dist.programs.status", "launch/status.py", "say how a run fares"),
    "ledger": Command("i3dist.programs.ledger", "launch/ledger.py", "check or compare runs"),
    "evaluate": Command("i3dist.programs.evaluate", "launch/evaluate.py", "measure a model's loss"),
    "generate": Command("i3dist.programs.generate", "launch/generate.py", "continue a text"),
    "chat": Command("i3dist.programs.chat", "launch/chat.py", "talk with a model"),
    "export": Command("i3dist.programs.export", "launch/export.py", "make a transformers model"),
    "report": Command("i3dist.programs.report", "launch/report.py", "show runs on one page"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Start a command, as if its words were all that was typed."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    type_as("i3dist", {command.file: f"i3dist {name}" for name, command in COMMANDS.items()})
    with one_line_errors():  # also while the command's modules are imported, which takes seconds
        name = parse_arguments(words[:1]).command
        type_as(f"i3dist {name}")
        sys.argv = [f"i3dist {name}", *words[1:]]
        runpy.run_module(COMMANDS[name].module, run_name="__main__", alter_sys=True)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the first word."""
    lines = [f"  {name:<12} {command.does}" for name, command in COMMANDS.items()]
    parser = ArgumentParser(
        description="Train language models whose past is compressed, and use them.",
        epilog="\n".join(["commands (each explains itself with --help):", *lines]),
    )
    parser.add_argument("--version", action="version", version=f"i3dist {__version__}")
    parser.add_argument("command", type=typed_command, metavar="COMMAND", help="see below")
    return parser.parse_args(words)


def typed_command(name: str) -> str:
    """A command's name.

    Raises:
        UserError: there is no such command; the line names those that are like it, or all.
    """
    if name in COMMANDS:
        return name
    meant = difflib.get_close_matches(name, COMMANDS, 1) or list(COMMANDS)
    raise UserError(f"there is no command {name!r}: use {', '.join(meant)} (see i3dist --help)")
