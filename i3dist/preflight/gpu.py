"""A rank's GPU: what it is, whether its driver reports faults, and whether it computes rightly."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from i3dist.distributed.devices import uses_cuda

LEAVE_SECONDS = 10.0  # that an earlier job's processes may take to leave the GPU
SIZE, REPEATS = 8192, 20  # of the product: 2 x SIZE^3 operations, 1.6 ms each on an H200


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, as a rank sees it."""

    name: str
    memory: int
    """Bytes in all."""
    seen: int
    """GPUs of this host that the rank sees."""
    granted: int | None = None
    """GPUs of this host that the job was given; None if nothing says it."""
    index: int = 0
    """Number on the host, of those that the rank sees."""
    driver: str = "unknown"
    faults: tuple[str, ...] = ()
    """What the driver reports against it."""
    users: tuple[int, ...] = ()
    """Processes that use it, this one among them where the driver sees the same process ids."""
    product: int = 0
    """Checksum of a matrix product of numbers that are equal on all ranks."""
    flops: float = 0.0
    """Operations per second of that product."""


def describe_gpu() -> GpuFacts | None:
    """This rank's GPU; None if the job runs on the CPU."""
    if not uses_cuda():
        return None
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    product, flops = multiply()
    return GpuFacts(
        name=properties.name,
        memory=properties.total_memory,
        seen=torch.cuda.device_count(),
        granted=granted_gpus(),
        index=index,
        product=product,
        flops=flops,
        **_ask_driver(str(properties.uuid)),
    )


def granted_gpus(environ: Mapping[str, str] = os.environ) -> int | None:
    """GPUs of this host that the job was given, by the lower of Slurm and CUDA_VISIBLE_DEVICES."""
    counts = []
    if environ.get("SLURM_GPUS_ON_NODE", "0").isdecimal():
        counts.append(int(environ.get("SLURM_GPUS_ON_NODE", "0")))
    # DeepSpeed's launcher sets the variable from its own list; CROSS_SIZE is how to tell.
    if "CUDA_VISIBLE_DEVICES" in environ and "CROSS_SIZE" not in environ:
        counts.append(len(environ["CUDA_VISIBLE_DEVICES"].split(",")))
    return min(filter(None, counts), default=None)


def multiply() -> tuple[int, float]:
    """A checksum of a bf16 matrix product, and operations per second.

    GPUs of one kind compute the same bits, so one that differs from its peers computes wrongly.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    matrix = torch.randn(SIZE, SIZE, generator=generator, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(matrix)
    torch.mm(matrix, matrix, out=product)  # sets up the library
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        torch.mm(matrix, matrix, out=product)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    checksum = int(product.view(torch.int16).long().sum())
    del matrix, product
    torch.cuda.empty_cache()
    return checksum, REPEATS * 2 * SIZE**3 / seconds


def wait_for_others(users: Callable[[], set[int]]) -> tuple[int, ...]:
    """The processes that use the GPU, once this one is alone or others have had time to leave."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        found = users()
        others = found - {os.getpid()}
        # Without this process among them the driver counts process ids otherwise.
        if not others or others == found or time.monotonic() > deadline:
            return tuple(sorted(found))
        time.sleep(0.5)


def _ask_driver(uuid: str) -> dict[str, Any]:
    """What NVIDIA's management library says of a GPU; nothing where it does not know the GPU."""
    found: dict[str, Any] = {}
    with suppress(Exception):  # no such library, or a slice of a GPU, which it does not describe
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if "-" in uuid[:4] else f"GPU-{uuid}")
        found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        found["users"] = wait_for_others(
            lambda: {use.pid for use in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        )
        found["faults"] = tuple(_faults(pynvml, handle))
    return found


def _faults(pynvml: Any, handle: Any) -> list[str]:
    """Faults of its memory; a question that the GPU does not know is left out."""

    def ask(question: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return question()
        except pynvml.NVMLError:
            return otherwise

    errors = ask(
        lambda: pynvml.nvmlDeviceGetTotalEccErrors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        ),
        0,
    )
    remapped = ask(lambda: pynvml.nvmlDeviceGetRemappedRows(handle), (0, 0, 0, 0))
    found = [f"{errors} uncorrected memory errors since the driver was loaded"] if errors else []
    if remapped[2]:
        found.append("rows of memory wait to be remapped")
    if remapped[3]:
        found.append("remapping rows of memory has failed")
    return found
