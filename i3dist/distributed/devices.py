"""The device of a job: a GPU for each rank, or the CPU."""

import logging
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal, get_args

import torch

from i3dist.config import Device
from i3dist.distributed.job import Job, host_name
from i3dist.distributed.launcher import HIDDEN
from i3dist.errors import UserError

log = logging.getLogger(__name__)

DEVICES = Path("/dev")
ACCELERATOR = "DS_ACCELERATOR"  # DeepSpeed's variable: cpu or cuda
NO_GPU = "there is no CUDA GPU here"


def choose_device(wanted: Device, environ: MutableMapping[str, str] = os.environ) -> bool:
    """Choose the job's device, and set DS_ACCELERATOR for `uses_cuda`.

    DS_ACCELERATOR=cpu in the environment makes "auto" the CPU.

    Returns:
        Whether the job falls back to the CPU: nobody chose it, but there is no GPU.

    Raises:
        UserError: there is no GPU, but the user asks for one or the job was granted some; or
            DS_ACCELERATOR is neither cpu nor cuda.
    """
    named = _named_device(environ)
    if wanted == "auto" and named == "cpu":
        return False
    if wanted == "cpu" or torch.cuda.is_available():
        environ[ACCELERATOR] = "cpu" if wanted == "cpu" else "cuda"
        return False
    if unseen := unseen_gpus(environ):
        raise UserError(f"{unseen}, or set train.device=cpu to train on the CPU all the same")
    if wanted == "cuda":
        raise UserError(f"train.device=cuda: {NO_GPU}; use train.device=auto or cpu")
    return True


def make_current(device: torch.device) -> None:
    """Make a GPU the one that this thread uses unless another is named; nothing for the CPU.

    Otherwise it is the host's first one, where each process would take memory.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _named_device(environ: Mapping[str, str]) -> str | None:
    """What DS_ACCELERATOR names; None if it is not set."""
    named = environ.get(ACCELERATOR)
    if named not in (None, "cpu", "cuda"):
        raise UserError(
            f"environment variable {ACCELERATOR}={named!r} is neither cpu nor cuda; correct it, or "
            "unset it to run on a GPU where there is one"
        )
    return named


def unseen_gpus(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why torch cannot see the GPUs that the job has on this host, and what to do; else None."""
    granted = _granted_gpus(environ)
    if granted is None or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        fault = f"{torch.__version__} is a build without CUDA"
        remedy = "install one with CUDA (https://pytorch.org/get-started)"
    else:
        fault = f"is built for CUDA {torch.version.cuda}, and finds no driver that fits"
        remedy = "see what nvidia-smi says there, and renew the driver or install another torch"
    host = host_name()
    return f"{host}: the job has GPUs ({granted}) that torch cannot see: torch {fault}; {remedy}"


def _granted_gpus(environ: Mapping[str, str]) -> str | None:
    """The sign that the job has GPUs on this host, or None."""
    # DeepSpeed's launcher sets it on hosts without GPUs too; CROSS_SIZE is how to tell.
    visible = None if "CROSS_SIZE" in environ else environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.split(",")[0].strip()
        return None if first in HIDDEN else f"CUDA_VISIBLE_DEVICES={visible}"
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        value = environ.get(name, "")
        if value and (name, value) != ("SLURM_GPUS_ON_NODE", "0"):
            return f"{name}={value}"
    return next((str(path) for path in sorted(DEVICES.glob("nvidia[0-9]*"))), None)


def uses_cuda() -> bool:
    """Whether the job runs on GPUs: if there is one, unless DS_ACCELERATOR=cpu.

    `choose_device` sets that variable as train.device says.
    """
    return torch.cuda.is_available() and os.environ.get(ACCELERATOR, "cuda") == "cuda"


def backend() -> Literal["nccl", "gloo"]:
    """The torch.distributed backend of the device that the job runs on."""
    return "nccl" if uses_cuda() else "gloo"


def device(job: Job) -> torch.device:
    """This rank's device: its own GPU if the job runs on GPUs, else the CPU.

    Raises:
        UserError: this host shows fewer GPUs than it has ranks.
    """
    if not uses_cuda():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if job.local_rank >= visible:
        raise UserError(
            f"local rank {job.local_rank} has no GPU: this host shows {visible}; start at most "
            "one rank per GPU, and let each see all GPUs of its host (Slurm: --gpu-bind=none)"
        )
    return torch.device("cuda", job.local_rank)


def pick_device(wanted: str) -> torch.device:
    """The device of a single process: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        UserError: there is no GPU, or the word is another.
    """
    if wanted not in get_args(Device):
        raise UserError(f"device {wanted!r} should be {', '.join(get_args(Device))}")
    if wanted == "auto":
        named = _named_device(os.environ)
        wanted = "cuda" if uses_cuda() else "cpu"
        if named is None and (unseen := unseen_gpus()):
            log.warning("warning: %s; until then this runs on the CPU", unseen)
    elif wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device cuda: {unseen_gpus() or NO_GPU}; or use device cpu")
    return torch.device(wanted)
