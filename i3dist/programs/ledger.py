"""Check a run's ledger: `python launch/ledger.py RUN [OTHER]`.

RUN/ledger.jsonl has a line for every optimizer step. The check fails if a step is missing or there
twice, or if the ledger ends before the run's checkpoint; with --data also if a step read something
else than its schedule says. With OTHER it compares two runs, step by step. Status 0: unbroken, and
equal; 1: not, and one line names the first such step.
"""

import argparse
from pathlib import Path

from i3dist.checkpoint import store
from i3dist.cli.extend import add_extend_option
from i3dist.cli.paths import Place, typed_path, typed_place
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import Settings
from i3dist.data.corpus import Split
from i3dist.data.folder import open_folder
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError
from i3dist.training.ledger import (
    LEDGER,
    Entry,
    first_break,
    first_difference,
    first_misread,
    read,
    unsaved,
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=typed_path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "other", type=typed_path, metavar="OTHER", nargs="?", help="one to compare with"
    )
    parser.add_argument(
        "--data",
        type=typed_place,
        metavar="DIR",
        help="the run's data (path or URL), to check what each step read",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="largest relative difference of losses and norms, for runs on different numbers of "
        "ranks; the lanes' state is not compared then (default: compare every bit)",
    )
    add_extend_option(parser)
    return parser.parse_args()


def checked(run: Path, data: Place | None) -> list[Entry]:
    """A run's ledger, unbroken.

    Raises:
        UserError: it is not; names the first break.
    """
    entries = read(run)
    fault = first_break(entries) or unsaved(entries, run)
    if fault is None and data is not None:
        train = Settings.load(run / store.SETTINGS).of_saved_run().train
        folder = open_folder(data) / "train"
        split = Split(folder, Manifest.load(folder))
        schedule = split.schedule(
            train.lane_count, train.window_chunks, train.seed, train.schedule_version
        )
        fault = first_misread(entries, schedule, train.accumulation)
    if fault is not None:
        raise UserError(f"{run / LEDGER} is broken: {fault}")
    return entries


def main() -> None:
    """Check one run's ledger, or compare two, and say so in one line.

    Raises:
        UserError: a ledger is broken, or the two differ; names the first step that does.
    """
    arguments = parse_arguments()
    entries = checked(arguments.run, arguments.data)
    skipped = sum(entry.skipped is not None for entry in entries)
    print(f"{arguments.run}: unbroken, {len(entries)} steps, {skipped} skipped")
    if arguments.other is not None:
        other = checked(arguments.other, arguments.data)
        if difference := first_difference(entries, other, arguments.tolerance):
            raise UserError(f"{arguments.run} and {arguments.other} differ: {difference}")
        print(f"{arguments.other}: the same steps")


def start() -> None:
    """Run the program."""
    with one_line_errors(output_is_result=True):
        main()


if __name__ == "__main__":
    start()
