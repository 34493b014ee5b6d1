"""All that i3dist uses of DeepSpeed: no other file imports it or touches its internals.

`StockEngine` needs none of the internals. `Zero2Engine` reaches them through `ZeroInternals`, which
names each, says why, and checks it against the installed DeepSpeed when the engine is built. It was
written for 0.19.8, the version in constraints.txt.

`i3dist.distributed` relies on three things of DeepSpeed's launcher. It sets LOCAL_SIZE and
CROSS_SIZE beside torch's variables (`job`, `devices`). The command `deepspeed` starts a process
whose children are the ranks, and passes no signal on (`signals`). DEEPSPEED_TIMEOUT is in minutes
(`rendezvous`).
"""

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from i3dist.config import Device
from i3dist.distributed import collectives, devices
from i3dist.engine.toolchain import absent, variables

# DeepSpeed calls names that torch is about to retire.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# DeepSpeed's hooks make the nodes of flat parameters before CUDA graphs are recorded.
warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")

# DeepSpeed reads these variables on import and fails on a wrong value; `devices` and `rendezvous`
# report it in one line later. DeepSpeed's autotuner would import MLflow, which takes seconds.
_accelerator = "cuda" if devices.uses_cuda() else "cpu"
with absent("mlflow"), variables(DS_ACCELERATOR=_accelerator, DEEPSPEED_TIMEOUT=None):
    import deepspeed

# On a CPU DeepSpeed would compile an operator for shared memory at every start. Only inference uses
# it, and it needs a compiler, a cache in the home folder and 66 MiB of /dev/shm for each rank.
with suppress(AttributeError):
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class UnknownDeepSpeedError(Exception):
    """The installed DeepSpeed is not as `Zero2Engine` needs it; the message says what differs."""


def is_known_version() -> bool:
    """Whether the installed DeepSpeed is 0.19.8 or a later 0.19."""
    match = re.match(r"0\.19\.(\d+)", deepspeed.__version__)
    return match is not None and int(match[1]) >= 8


def choose_device(wanted: Device) -> bool:
    """`devices.choose_device`, for DeepSpeed too, which chose an accelerator on import."""
    fell_back_to_cpu = devices.choose_device(wanted)
    name = "cuda" if devices.uses_cuda() else "cpu"
    if deepspeed.accelerator.get_accelerator().device_name() != name:
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        kinds = {"cuda": CUDA_Accelerator, "cpu": CPU_Accelerator}
        deepspeed.accelerator.set_accelerator(kinds[name]())
    return fell_back_to_cpu


def refusal(config: dict[str, Any]) -> str | None:
    """What DeepSpeed's parser says against a config, or None."""
    try:
        from deepspeed.runtime.config import DeepSpeedConfig

        inspect.signature(DeepSpeedConfig).bind(config)
    except (ImportError, TypeError):
        return None  # another version; `deepspeed.initialize` says what it refuses
    try:
        DeepSpeedConfig(config)
    except Exception as error:  # the parser lets its own errors through
        return " ".join(str(error).split())[:200]
    return None


def initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """`deepspeed.initialize`; returns DeepSpeed's engine."""
    # Muon's module imports torch's compiler, which takes seconds. Another version may need it.
    muon = "deepspeed.runtime.zero.muon.muon_optimizer"
    with absent(muon) if is_known_version() else nullcontext():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


class Address(NamedTuple):
    """Which part of a flat parameter this rank's partition holds, and where."""

    group: int  # number of the partition
    start: int  # first element in the flat parameter
    length: int  # elements
    at: int  # first element in the partition


class ZeroInternals:
    """The ZeRO-2 optimizer of an initialized engine (runtime/zero/stage_1_and_2.py)."""

    def __init__(self, engine: Any, flats: Sequence[nn.Parameter], optimizer: object):
        """Check everything below; every rank calls this.

        Args:
            engine: from `initialize`, before its first step.
            flats: the parameters that it trains, one for each of the optimizer's groups.
            optimizer: the one that it was given.

        Raises:
            UnknownDeepSpeedError: on every rank, if any found a difference.
        """
        try:
            # The ZeRO optimizer, which holds partitions, buckets and reduced gradients.
            self._zero = zero = engine.optimizer
            # With fp32 parameters DeepSpeed itself keeps its part of the reduced gradient.
            self.keeps_fp32_gradients: bool = zero.dtype == torch.float32
            # This rank's fp32 weights, one flat tensor a group.
            self.partitions: list[Tensor] = zero.single_partition_of_fp32_groups
            # Elements of each of them, with padding; the same on every rank.
            self.partition_sizes: list[int] = zero.partition_size
            difference = self._difference(flats, optimizer)
        except Exception as error:  # whatever looking at another DeepSpeed may raise
            difference = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for found in filter(None, collectives.gather_objects(difference)):
            raise UnknownDeepSpeedError(found)

    @property
    def gradients(self) -> dict[int, Any]:
        """`averaged_gradients`: group -> [this rank's part of its reduced gradient, padding]."""
        return self._zero.averaged_gradients

    def keep_gradient(self, group: int, part: Tensor) -> None:
        """Add a reduced part to `gradients`, in the form that DeepSpeed's step accepts uncopied.

        `GradPartitionBufferGroup` is a list of buffers with the flat tensor that they lie in.

        Args:
            group: number of the partition.
            part: [partition_sizes[group]] fp32; it is kept, and added to.
        """
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        earlier = self.gradients.get(group)
        if earlier is None:
            self.gradients[group] = GradPartitionBufferGroup([part], part)
        else:
            earlier.flat_partition.add_(part)

    def bucket(self, dtype: torch.dtype) -> list[int]:
        """`ipg_buckets[dtype].params`: groups of the gradients in a bucket, in their order."""
        return [group for group, _, _ in self._zero.ipg_buckets[dtype].params]

    def replace_reduction(self, reduce: Callable[[Tensor, torch.dtype], None]) -> None:
        """`average_tensor`: what DeepSpeed calls with each full bucket and the dtype to sum in.

        A bucket is [elements]: the gradients of the groups that `bucket` names, one after another.
        """
        self._zero.average_tensor = reduce

    def address(self, flat: nn.Parameter) -> Address | None:
        """`_hp_mapping` of a parameter: None if this rank's partition holds nothing of it."""
        mapping = flat._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Address(mapping.param_group_index, here.start, here.numel, there.start)

    def _difference(self, flats: Sequence[nn.Parameter], optimizer: object) -> str | None:
        """The first difference from what is described above, or None."""
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        zero, probe = self._zero, torch.zeros(1)
        checks = {
            "dtype is not the parameters'": lambda: zero.dtype == flats[0].dtype,
            "gradient_accumulation_dtype is not fp32": lambda: (
                zero.gradient_accumulation_dtype == torch.float32
            ),
            "its optimizer is not the one that it was given": lambda: zero.optimizer is optimizer,
            "bit16_groups is not one group for each flat parameter": lambda: (
                [len(group) for group in zero.bit16_groups] == [1] * len(flats)
                and all(g[0] is flat for g, flat in zip(zero.bit16_groups, flats, strict=True))
            ),
            "single_partition_of_fp32_groups is not fp32 tensors of partition_size": lambda: (
                [(len(part), part.dtype) for part in self.partitions]
                == [(size, torch.float32) for size in self.partition_sizes]
            ),
            "averaged_gradients is not an empty dict": lambda: self.gradients == {},
            "ipg_buckets does not hold an empty bucket for each dtype": lambda: (
                zero.ipg_buckets and not any(map(self.bucket, zero.ipg_buckets))
            ),
            "average_tensor does not take a tensor and a dtype": lambda: (
                len(inspect.signature(zero.average_tensor).parameters) == 2
            ),
            "GradPartitionBufferGroup has no flat_partition": lambda: (
                GradPartitionBufferGroup([probe], probe).flat_partition is probe
            ),
            "_hp_mapping does not say where the fp32 weights lie": lambda: all(
                self._lies_there(group, flat) for group, flat in enumerate(flats)
            ),
        }
        return next((what for what, holds in checks.items() if not holds()), None)

    def _lies_there(self, group: int, flat: nn.Parameter) -> bool:
        """Whether the partition holds, at the parameter's address, the parameter's values."""
        address = self.address(flat)
        if address is None:
            return True
        part = self.partitions[group].narrow(0, address.at, address.length)
        own = flat.detach().narrow(0, address.start, address.length)
        return address.group == group and part.to(own.dtype).equal(own)
