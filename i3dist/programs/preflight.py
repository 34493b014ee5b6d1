"""Check that the hosts of a job fit together, without training.

examples:
  under Slurm, as train.sbatch starts launch/train.py:
    srun python launch/preflight.py run.path=runs/large
  on every host, with torchrun:
    torchrun --nnodes=2 ... launch/preflight.py run.path=runs/large

Takes the arguments of launch/train.py (see its --help for the settings), of which --verbose,
--dry-run and --no-preflight change nothing here, and is started like it. On all ranks it compares
code, packages, settings, engine file and data; sees whether all hosts share run.path and have room
for two checkpoints; whether the GPUs granted are there, sound, of one kind and free; how far clocks
are apart; and how fast hosts exchange data. A table says what was found. A run on several hosts
does the same before its first step, unless it has --no-preflight.

Status 0: the hosts fit. Status 1: not, or something else is wrong; a line names the host and what
to do.
"""

import os
import sys

from i3dist.cli.program import one_line_errors
from i3dist.config import Settings
from i3dist.distributed.held_signals import hold
from i3dist.distributed.launcher import start_ranks
from i3dist.programs.train import parse_arguments, without_gpus


def main() -> None:
    """Check, and print what was found."""
    arguments = parse_arguments(__doc__)
    settings = Settings.load(arguments.config, arguments.overrides)
    if arguments.gpus != 1:
        words, device = without_gpus(sys.argv[1:]), settings.train.device
        start_ranks(arguments.gpus, words, device, "preflight")
    from i3dist.training.run import only_preflight  # imports torch, which takes seconds

    only_preflight(arguments, settings)


def start() -> None:
    """Run the program."""
    hold()
    with one_line_errors():
        main()
        sys.stdout.flush()
        os._exit(0)  # as launch/train.py does


if __name__ == "__main__":
    start()
