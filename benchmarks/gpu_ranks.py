"""What each process of benchmarks/multi_gpu.py does, one on each GPU."""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import synthetic
import torch
import torch.distributed as torch_dist
from data_parallel import DataParallelLoop
from i3_steps import I3Steps, Shape, in_engine
from measure import time_steps
from torch import Tensor

from i3dist.config import ModelSettings, OptimizerSettings, TrainSettings
from i3dist.data.lanes import windows
from i3dist.data.schedule import lanes_of_rank
from i3dist.distributed import collectives, devices
from i3dist.engine.flat_parameters import FlatModel
from i3dist.model.lm import I3LM

LR = 2e-4
WINDOW = 8
# Forms of compiled code that one process holds: two forms of the model, two shapes, and AdamW for
# each. Beyond torch's default of 8 it would run them uncompiled.
FORMS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXCHANGES = 5  # that are timed


class Case(NamedTuple):
    """A loop with some lanes on each GPU."""

    loop: str  # zero2, disk, stock or ddp
    lanes: int  # of a GPU, computed at once
    wire: str  # what gradients are summed in, fp32 or bf16
    network: str = "local"  # or sockets

    @property
    def name(self) -> str:
        """As on the command line."""
        parts = [self.loop, str(self.lanes), self.wire]
        return "-".join([*parts, self.network] if self.network != "local" else parts)

    @classmethod
    def named(cls, name: str) -> "Case":
        """The case of a name."""
        return next(case for case in CASES if case.name == name)

    @property
    def base(self) -> "Case":
        """The case that one GPU runs to compare with: nothing is sent there."""
        wire = "bf16" if self.loop == "ddp" else self.wire
        return self._replace(wire=wire, network="local")

    @property
    def compilation(self) -> tuple[str, int]:
        """Cases for which this is equal run the same compiled code."""
        return {"disk": "zero2"}.get(self.loop, self.loop), self.lanes


CASES = [
    *(Case("zero2", lanes, wire) for lanes in (4, 16) for wire in ("fp32", "bf16")),
    Case("stock", 4, "fp32"),
    *(Case("ddp", 4, wire) for wire in ("bf16", "fp32")),
    *(Case("disk", lanes, "fp32") for lanes in (4, 16)),
    *(Case("zero2", lanes, wire, "sockets") for lanes in (4, 16) for wire in ("fp32", "bf16")),
    Case("ddp", 4, "bf16", "sockets"),
]


class Results:
    """A file of JSON lines, which several processes add to."""

    def __init__(self, path: Path):
        self.path = path
        self.start = len(path.read_text().splitlines()) if path.exists() else 0

    def add(self, row: dict[str, Any], text: str) -> None:
        """Write a row, and print a text about it."""
        with self.path.open("a") as file:
            file.write(f"{json.dumps(row)}\n")
        print(text, flush=True)

    def read(self) -> list[dict[str, Any]]:
        """The rows of this call."""
        return [json.loads(line) for line in self.path.read_text().splitlines()[self.start :]]


@dataclass(frozen=True)
class Setting:
    """What all processes share."""

    gpus: int
    model: ModelSettings
    data: synthetic.Data
    warm_up: int
    steps: int
    results: Results
    meeting: Path  # a file by which processes find each other


def compile_one(process: int, setting: Setting, cases: list[Case]) -> None:
    """Fill the compile caches with what one case needs on one GPU; other processes do the rest."""
    case, gpu = cases[process], process % setting.gpus
    with on_gpu(gpu), group(0, 1, torch_dist.HashStore()):
        started = time.perf_counter()
        steps, take = prepare(case, setting, case.lanes)
        time_steps(take, 1, 1)
        steps.close()
    seconds = round(time.perf_counter() - started, 1)
    row = {"stage": "compile", "gpu": gpu, "case": case.name, "seconds": seconds}
    setting.results.add(row, f"{case.name} compiled for GPU {gpu} in {seconds} s")


def measure_local(process: int, setting: Setting, cases: list[Case]) -> None:
    """Every case on this GPU alone, then those without a slow network on all together."""
    with on_gpu(process):
        with group(0, 1, torch_dist.HashStore()):
            for case, lanes in dict.fromkeys(single(cases, setting.gpus)):
                measure(case, setting, lanes, {"stage": "alone", "gpu": process})
        local = [case for case in cases if case.network == "local"]
        measure_all(process, setting, local)


def measure_slow(process: int, setting: Setting, cases: list[Case]) -> None:
    """The cases with a slow network, in an environment that makes it slow."""
    with on_gpu(process):
        measure_all(process, setting, [case for case in cases if case.network == "sockets"])


def measure_all(process: int, setting: Setting, cases: list[Case]) -> None:
    """Cases on all GPUs together, then what their network does by itself."""
    if not cases:
        return
    store = torch_dist.FileStore(str(setting.meeting), setting.gpus)
    with group(process, setting.gpus, store):
        for case in cases:
            measure(case, setting, case.lanes * setting.gpus, {"stage": "together"})
        for wire in dict.fromkeys(case.wire for case in cases):
            exchange(setting, cases[0].network, wire)


def single(cases: Iterable[Case], gpus: int) -> Iterable[tuple[Case, int]]:
    """What one GPU runs to compare cases with: a case, and lanes."""
    for case in cases:
        yield case.base, case.lanes
        if case.loop == "zero2" and case.wire == "fp32":
            yield case.base, case.lanes * gpus


@contextmanager
def on_gpu(index: int) -> Iterator[None]:
    """Inside, this process uses one GPU, or the CPU where there is none."""
    torch._dynamo.config.recompile_limit = FORMS
    os.environ["LOCAL_RANK"] = str(index)
    if torch.cuda.is_available():
        torch.cuda.set_device(index)
    else:
        torch.set_num_threads(1)
    yield


@contextmanager
def group(rank: int, ranks: int, store: torch_dist.Store) -> Iterator[None]:
    """Inside, this process is a rank of a process group."""
    from i3dist.engine.deepspeed_internals import deepspeed

    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "localhost"}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_PORT="29500")
    torch_dist.init_process_group(devices.backend(), store=store, rank=rank, world_size=ranks)
    yield
    collectives.leave_group()
    # DeepSpeed keeps what it knows of a group that has ended.
    deepspeed.utils.groups._WORLD_GROUP = deepspeed.comm.comm.cdb = None


def measure(case: Case, setting: Setting, lanes: int, facts: dict[str, Any]) -> None:
    """Time the steps of a case with so many lanes in all; rank 0 writes the result."""
    started = time.perf_counter()
    steps, take = prepare(case, setting, lanes)
    losses, times, memory = time_steps(take, setting.warm_up, setting.steps)
    loss = float(collectives.all_sum(torch.tensor(losses[-1], device=steps.gate.device)))
    norm = float(steps.norm)
    steps.close()
    del steps, take
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch_dist.get_rank() == 0:
        ms, seconds = statistics.median(times), round(time.perf_counter() - started, 1)
        speed = 1e3 * lanes * WINDOW * setting.model.chunk_length / ms
        row = facts | {"case": case.name, "lanes": lanes, "ms": ms, "tokens_per_second": speed}
        row |= {"least_ms": min(times), "most_ms": max(times), "loss": loss, "norm": norm}
        row |= {"memory_gib": memory, "seconds": seconds}
        text = f"{facts['stage']}, {case.name}, {lanes} lanes: {speed:,.0f} tokens/s ({seconds} s)"
        setting.results.add(row, text)


def prepare(case: Case, setting: Setting, lanes: int) -> tuple[I3Steps, Callable[[], Tensor]]:
    """A new model in a loop, and what takes its next step."""
    rank, ranks = torch_dist.get_rank(), torch_dist.get_world_size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        model = I3LM(setting.model, synthetic.BOS)
    shape = Shape(lanes // ranks, case.lanes, WINDOW)
    if case.loop == "ddp":
        steps = in_data_parallel(model, shape, device, case.wire)
    else:
        train = TrainSettings(engine="stock" if case.loop == "stock" else "zero2")
        steps = in_engine(model, shape, device, train, communication_data_type=case.wire)
    own = lanes_of_rank(lanes, rank, ranks)
    reader = setting.data.lane_windows(lanes, WINDOW, own)
    if case.loop == "disk":
        total = setting.warm_up + setting.steps
        batches = windows(reader, 0, total, workers=1, device=device)
    else:
        batches = repeat(synthetic.batches(reader, 1, device)[0])
    return steps, lambda: steps([next(batches)], LR, synthetic.PAD)


def in_data_parallel(model: I3LM, shape: Shape, device: torch.device, wire: str) -> I3Steps:
    """Steps of plain data parallelism."""
    if device.type == "cuda":
        model.compile_blocks()
    loop = DataParallelLoop(model, OptimizerSettings(), TrainSettings().clip, wire)
    return I3Steps(loop, model, shape, device)


def exchanged(call: Callable[[Tensor, Tensor], Any], out: Tensor, given: Tensor) -> Tensor:
    """Call, and return a number of what came out."""
    call(out, given)
    return out[0].float()


def exchange(setting: Setting, network: str, wire: str) -> None:
    """Time a step's exchanges by themselves: gradients' reduce-scatter, weights' all-gather."""
    ranks = torch_dist.get_world_size()
    with torch.device("meta"):
        flats = FlatModel(I3LM(setting.model, synthetic.BOS)).flats
    elements = -(-sum(flat.parameter.numel() for flat in flats) // ranks) * ranks
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gradient = torch.zeros(elements, dtype=DTYPES[wire], device=device)
    weights = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    parts = [whole.new_empty(elements // ranks) for whole in (gradient, weights)]
    pairs = {
        f"reduce-scatter, {wire}": (torch_dist.reduce_scatter_tensor, parts[0], gradient),
        "all-gather, bf16": (torch_dist.all_gather_into_tensor, weights, parts[1]),
    }
    for what, (call, out, given) in pairs.items():
        _, times, _ = time_steps(partial(exchanged, call, out, given), 2, EXCHANGES)
        if torch_dist.get_rank() == 0:
            ms, size = statistics.median(times), max(out.nbytes, given.nbytes)
            # What each rank sends, as the formula of docs/scaling.md counts it.
            bandwidth = (ranks - 1) / ranks * size / (ms / 1e3)
            facts = {"stage": "exchange", "network": network, "what": what, "ms": ms}
            text = f"{network}, {what}, {size / 1e9:.3f} GB: {bandwidth / 1e9:.1f} GB/s"
            setting.results.add(facts | {"bytes": size, "bandwidth": bandwidth}, text)
