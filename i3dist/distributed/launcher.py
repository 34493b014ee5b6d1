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

from i3dist.config import Device
from i3dist.distributed.cuda_driver import count_gpus
from i3dist.distributed.held_signals import release
from i3dist.distributed.job import Job
from i3dist.errors import UserError

# First entries of CUDA_VISIBLE_DEVICES that hide all GPUs on purpose.
HIDDEN = ("", "-1", "NoDevFiles")


def start_ranks(
    number: int, words: Sequence[str], device: Device, program: str = "train"
) -> NoReturn:
    """Become the launcher of so many ranks of `i3dist train`.

    Args:
        number: of ranks, 1 or more.
        words: the command line of each.
        device: train.device of each.
        program: the command that each runs, if it is another.

    Raises:
        UserError: there are fewer GPUs to be seen or, on the CPU, fewer cores; or this process is a
            rank of another launcher.
    """
    environ = dict(os.environ)
    command = launcher_command(number, words, environ, device, program)
    sys.stdout.flush()
    sys.stderr.flush()
    release()
    os.execve(command[0], command, environ)


def launcher_command(
    number: int,
    words: Sequence[str],
    environ: dict[str, str],
    device: Device = "auto",
    program: str = "train",
) -> list[str]:
    """The command that starts the ranks; adds to `environ` what it needs.

    Arguments and errors are those of `start_ranks`.
    """
    if (launcher := Job.detect(environ).launcher) != "python":
        raise UserError(f"--gpus starts the ranks itself: leave it out under {launcher}")
    gpus = visible_gpus(environ)
    if device == "cpu" or gpus == []:
        environ["DS_ACCELERATOR"] = "cpu"  # else the launcher would show the hidden GPUs
    on_cpu = environ.get("DS_ACCELERATOR") == "cpu"
    check_number(number, 0 if on_cpu else count_gpus(), None if on_cpu else gpus)
    hosts = {"localhost": list(range(number)) if on_cpu or not gpus else gpus[:number]}
    port = Job.detect({}).master_port  # a free one
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch", "--quiet", "--no_local_rank"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()}",
        *(f"--master_port={port}", "--module", "i3dist", program, *words),
    ]


def check_number(number: int, there: int, named: Sequence[str] | None) -> None:
    """Check that each of so many ranks has a GPU of its own, or on the CPU a core.

    Args:
        number: of ranks.
        there: GPUs that this process can see.
        named: the entries of CUDA_VISIBLE_DEVICES, if it chooses among them.

    Raises:
        UserError: it has not; or GPUs are named and there is none.
    """
    if named is not None and there < number:
        other = "ask for as many, or unset it" if there else "unset it to train on the CPU"
        raise UserError(
            f"--gpus {number}: CUDA_VISIBLE_DEVICES={','.join(named)} shows {there}; {other}"
        )
    if there and there < number:
        raise UserError(f"--gpus {number}: this machine has {there}; ask for at most as many")
    cores = len(os.sched_getaffinity(0))
    if not there and cores < number:
        raise UserError(
            f"--gpus {number}: there is no GPU to be used here, and on the CPU each rank takes a "
            f"core, of which there are {cores}; ask for at most as many"
        )


def visible_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES: none if it hides all GPUs; None if it is not set."""
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    entries = [entry.strip() for entry in text.split(",")]
    return [] if entries[0] in HIDDEN else entries
