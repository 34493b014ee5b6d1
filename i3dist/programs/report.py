"""Write a report of runs: `python launch/report.py RUN [RUN ...] --out FILE.html`.

One page that needs no other file and no network. It says what each run is, and shows loss, learning
rate, speed, gradient norms, what history gains, attention to history, restarts, skipped steps and
samples of text. Several runs are overlaid, and the settings in which they differ are listed. A run
may still be going on; what it does not have (yet) is left out.
"""

import argparse

from i3dist.cli.extend import add_extend_option
from i3dist.cli.paths import result_path, typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.files import printing_beside, write_result
from i3dist.report.page import page
from i3dist.report.run import Run


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=typed_path, metavar="RUN", nargs="+", help="a run's folder")
    parser.add_argument(
        "--out", type=result_path, metavar="FILE.html", required=True, help="the page to write"
    )
    add_extend_option(parser)
    return parser.parse_args()


def main() -> None:
    """Write the page.

    Raises:
        UserError: a folder is no run's, or --out cannot be written.
    """
    arguments = parse_arguments()
    text = page([Run.read(folder) for folder in arguments.runs])
    write_result(arguments.out, text.encode())
    with printing_beside(arguments.out):
        print(f"written: {arguments.out}")


def start() -> None:
    """Run the program."""
    with one_line_errors():
        main()


if __name__ == "__main__":
    start()
