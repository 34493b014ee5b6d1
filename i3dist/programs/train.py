"""Train an i3 model, or continue its run from the newest checkpoint in run.path.

examples:
  the model card, on one GPU:
    python launch/train.py
  on 8 GPUs of this machine:
    i3dist train --gpus 8
  a small model on data of your own:
    python launch/train.py --config tiny data.path=data/mine run.path=runs/mine

Runs under deepspeed, torchrun, Slurm (see slurm/train.sbatch) or by itself (one rank, or --gpus).
The same command continues a run.

SIGTERM, SIGUSR1 or SIGHUP to any rank, or the launcher's end, stops the job after the current step:
it saves, and exits with status 75, which asks to be started again. Status 1 is an error, in one
line. `touch RUN/SAVE` makes it save and go on, `touch RUN/STOP` save and end with status 0 (RUN is
run.path). --fresh counts for a job's first start; when its launcher starts it again, it continues.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from i3dist import garbage
from i3dist.cli.extend import add_extend_option
from i3dist.cli.paths import CONFIGS, typed_config, typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.cli.settings_text import all_settings, help_text
from i3dist.cli.suggest import hint
from i3dist.config import Settings
from i3dist.distributed.held_signals import hold
from i3dist.distributed.launcher import start_ranks
from i3dist.errors import UserError


def parse_arguments(text: str = f"{__doc__}\n{help_text(Settings)}") -> argparse.Namespace:
    """Read the command line; `--help` shows `text`.

    Raises:
        UserError: an option is unknown, or its value is wrong.
    """
    description, _, more = text.partition("\n\n")
    parser = ArgumentParser(description=description, epilog=more)
    parser.add_argument(
        "--gpus",
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="start N ranks on this machine, each on a GPU of its own, or if there is none on a "
        "core of the CPU",
    )
    parser.add_argument(
        "--deepspeed",
        type=typed_path,
        metavar="FILE",
        default=CONFIGS / "zero2.json",
        help="engine settings (default: configs/zero2.json)",
    )
    parser.add_argument(
        "--config",
        type=typed_config,
        metavar="FILE",
        help="settings as YAML: a file, or the name of one in configs/, such as tiny",
    )
    add_extend_option(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="start over; keep the old run under another name"
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="print all settings, parameters and memory first, then where the start's time went",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would be, its memory and expected speed, and stop",
    )
    parser.add_argument(
        "--no-preflight",
        action="store_true",
        help="on several hosts, do not check first that they fit together (launch/preflight.py)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed appends it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, see below"
    )
    arguments, unknown = parser.parse_known_intermixed_args()  # settings and options in any order
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        known = all_settings(Settings)
        meant = f"; settings have no dashes: {name}=..." if name in known else hint(name, known)
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus} must be 1 or more")
    return arguments


def main() -> None:
    """Train, or print one line that says why not."""
    arguments = parse_arguments()
    settings = Settings.load(arguments.config, arguments.overrides)
    if arguments.gpus != 1 and not arguments.dry_run:
        start_ranks(arguments.gpus, without_gpus(sys.argv[1:]), settings.train.device)
    # When a rank is gone, torch's warnings of it are stacks of C++; `Peers` says it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    garbage.pause()  # until the trainer reads data
    from i3dist.training.run import run  # imports torch, which takes seconds

    run(arguments, settings)


def without_gpus(words: Sequence[str]) -> list[str]:
    """The command line of each rank: that of the program without --gpus."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--gpus", "--ranks")
    return parser.parse_known_args(words)[1]


def start() -> None:
    """Run the program."""
    hold()
    with one_line_errors():
        main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # skip what libraries do at exit: it must not decide the status


if __name__ == "__main__":
    start()
