"""Starting the ranks of this machine, through DeepSpeed's launcher.

Of the two launchers at hand it passes on what a rank exits with, so that 75 still asks to be
started again, and adds no lines of its own to a rank's error; torchrun's agent exits with 1 and
prints a table. Its command `deepspeed` would ignore CUDA_VISIBLE_DEVICES; the module that the
command starts on each host is told which GPUs to use.
"""

import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from i3dist.distributed.held_signals import release
from i3dist.distributed.job import Job
from i3dist.errors import UserError

# First entries of CUDA_VISIBLE_DEVICES that hide all GPUs on purpose.
HIDDEN = ("", "-1", "NoDevFiles")


def start_ranks(number: int, words: Sequence[str], program: str = "train") -> NoReturn:
    """Become the launcher of so many ranks of `i3dist train`.

    Args:
        number: of ranks.
        words: the command line of each.
        program: the command that each runs, if it is another.

    Raises:
        UserError: the number is not 1 or more, there are fewer GPUs to be seen, or this process is
            a rank of another launcher.
    """
    environ = dict(os.environ)
    command = launcher_command(number, words, environ, program)
    sys.stdout.flush()
    sys.stderr.flush()
    release()
    os.execve(command[0], command, environ)


def launcher_command(
    number: int, words: Sequence[str], environ: dict[str, str], program: str = "train"
) -> list[str]:
    """The command that starts the ranks; adds to `environ` what it needs.

    Arguments and errors are those of `start_ranks`.
    """
    if number < 1:
        raise UserError(f"--gpus {number} must be 1 or more")
    if (launcher := Job.detect(environ).launcher) != "python":
        raise UserError(f"--gpus starts the ranks itself: leave it out under {launcher}")
    gpus = visible_gpus(environ)
    if gpus == []:
        environ["DS_ACCELERATOR"] = "cpu"  # else the launcher would show the hidden GPUs
    elif gpus is not None and len(gpus) < number:
        raise UserError(
            f"--gpus {number}: CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']} shows "
            f"{len(gpus)}; ask for as many, or unset it"
        )
    hosts = {"localhost": gpus[:number] if gpus else list(range(number))}
    port = Job.detect({}).master_port  # a free one
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch", "--quiet", "--no_local_rank"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()}",
        *(f"--master_port={port}", "--module", "i3dist", program, *words),
    ]


def visible_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES: none if it hides all GPUs; None if it is not set."""
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    entries = [entry.strip() for entry in text.split(",")]
    return [] if entries[0] in HIDDEN else entries
