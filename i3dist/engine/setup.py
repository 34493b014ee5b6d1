"""Before training: the device, the engine's file, the process group, and which engine trains."""

import logging
from pathlib import Path
from typing import Any

from i3dist.config import OptimizerSettings, TrainSettings
from i3dist.distributed import devices, rendezvous
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.job import Job
from i3dist.distributed.peers import Peers
from i3dist.engine import config_file
from i3dist.engine.deepspeed_internals import (
    UnknownDeepSpeedError,
    choose_device,
    deepspeed,
    refusal,
)
from i3dist.engine.interface import Engine, complete
from i3dist.engine.stock import StockEngine
from i3dist.engine.toolchain import writable_caches
from i3dist.engine.zero2 import Zero2Engine
from i3dist.errors import UserError
from i3dist.model.lm import I3LM

__all__ = ["build", "choose_device", "read_engine_config", "start"]


def read_engine_config(path: Path) -> dict[str, Any]:
    """Read and check the engine's file (configs/zero2.json).

    Raises:
        UserError: unreadable, not ZeRO-2, or a key or value that the engine does not honour.
    """
    config = config_file.read_engine_file(path)
    if reason := refusal(complete(config, clip=1.0)):
        raise UserError(f"engine config {path}: DeepSpeed refuses it: {reason}")
    return config


def start(job: Job, name: str = "") -> Peers:
    """Join the job's process group: NCCL on GPUs, else gloo. `name` tells the job from others.

    Returns:
        This rank's connection with the others.

    Raises:
        UserError: ranks do not find each other (`rendezvous.meet`), or DEEPSPEED_TIMEOUT is wrong.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    timeout = rendezvous.read_timeout()
    job.export()
    if devices.uses_cuda():
        devices.make_current(devices.device(job))
        writable_caches()
    with rendezvous.meet(job, name, timeout) as peers:
        rendezvous.form_group(job, timeout)
        deepspeed.init_distributed(dist_backend=devices.backend(), verbose=False, timeout=timeout)
    return peers


def build(
    model: I3LM, config: dict[str, Any], optimizer: OptimizerSettings, train: TrainSettings
) -> Engine:
    """The engine that `train.engine` names, or `StockEngine` with a warning for want of it.

    Every rank calls this, and all get the same kind. The arguments are those of `Zero2Engine`.
    """
    if train.engine == "zero2":
        try:
            return Zero2Engine(model, config, optimizer, train)
        except UnknownDeepSpeedError as difference:
            print_rank_0(
                f"warning: train.engine=zero2 does not fit DeepSpeed {deepspeed.__version__} "
                f"({difference}), so train.engine=stock trains: the same losses to rounding, but "
                "slower (docs/decisions.md); the version in constraints.txt fits"
            )
    return StockEngine(model, config, optimizer, train)
