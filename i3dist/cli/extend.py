"""The option --extend FILE.py: import a user's own file, which adds kinds to registries."""

import argparse
import importlib.util
import sys
import traceback
from pathlib import Path

from i3dist.cli.paths import typed_path
from i3dist.errors import UserError, reason

LOADED: list[Path] = []
"""The files that were imported, in order: a process that is spawned imports them again."""


def add_extend_option(parser: argparse.ArgumentParser) -> None:
    """Add --extend, which imports its file as soon as it is parsed."""
    parser.add_argument(
        "--extend",
        action="append",
        type=lambda text: load_extension(typed_path(text)),
        metavar="FILE.py",
        help="import this file first: it may register layer kinds, schedules, data sources and "
        "more (docs/extending.md); repeatable",
    )


def load_extension(path: Path) -> None:
    """Import a user's file, once.

    Raises:
        UserError: there is no such Python file, or an error inside it; the line names its place.
    """
    path = path.resolve()
    if path in LOADED:
        return
    if not path.exists():
        raise UserError(f"--extend {path} does not exist: name a Python file")
    name = f"extension_{len(LOADED)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--extend {path} is no Python file: name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle finds its classes by this name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"--extend {path}{where}: {reason(error)}") from error
    LOADED.append(path)
