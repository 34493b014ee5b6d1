"""Time of WKV: against a plain copy of the bytes it must move and, on the CPU, the scripted loop.

    python benchmarks/wkv.py [--json FILE]

On CUDA the two kernels are timed alone, replayed from a graph; on the CPU with autograd around
them, as is the loop. Bytes: forward reads k and v and writes y; backward reads k, v and y's
gradient and writes two more. A copy of as many bytes is timed in the same way.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from i3dist import dist
from i3dist.ops.wkv import empty_state, wkv

CPU_SHAPES = [(4, 512, 256), (4, 512, 1180)]
CUDA_SHAPES = [(4, 512, 1180), (32, 512, 1180), (64, 512, 1180)]
TENSORS_MOVED = {"forward": 3, "backward": 5}


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds."""

    shape: str
    dtype: str
    what: str
    ms: float
    gb_per_s: float
    times_copy: float
    loop_ms: float | None = None

    @property
    def times_faster_than_loop(self) -> float | None:
        """How much longer the scripted loop takes."""
        return self.loop_ms / self.ms if self.loop_ms else None


@torch.jit.script
def scripted_loop(
    decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, restart: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The usual form on a CPU: the recurrence under TorchScript, differentiated by autograd."""
    a, b, m = state.unbind(1)
    outputs: list[Tensor] = []
    keys, values, cuts = k.unbind(1), v.unbind(1), restart.unsqueeze(2).unbind(1)
    for t in range(len(keys)):
        a, b = a.masked_fill(cuts[t], 0.0), b.masked_fill(cuts[t], 0.0)
        m = m.masked_fill(cuts[t], -1e38)
        present_key = bonus + keys[t]
        top = torch.maximum(m, present_key)
        past, present = torch.exp(m - top), torch.exp(present_key - top)
        outputs.append((past * a + present * values[t]) / (past * b + present))
        top = torch.maximum(decay + m, keys[t])
        past, present = torch.exp(decay + m - top), torch.exp(keys[t] - top)
        a, b, m = past * a + present * values[t], past * b + present, top
    return torch.stack(outputs, 1), torch.stack([a, b, m], 1)


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """A training step's inputs: documents of a few hundred tokens, decays of every length."""
    rows, length, channels = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    restart = torch.rand(rows, length, generator=generator, device=device) < 0.003
    restart[:, 0] = True
    decay = -torch.exp(torch.linspace(-5, 3, channels, device=device))
    k, v = (normal(*shape).to(dtype).requires_grad_() for _ in range(2))
    state = empty_state(rows, channels, device)
    return [decay.requires_grad_(), normal(channels).requires_grad_(), k, v, restart, state]


def cpu_ms(call: Callable[[], Any], least: float) -> float:
    """Median over at least `least` seconds."""
    for _ in range(3):
        call()
    threads = torch.get_num_threads()
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=least).median * 1e3


def cuda_ms(call: Callable[[], Any]) -> float:
    """Median of replays of a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=200, return_mode="median")


def cpu_times(form: Callable, inputs: list[Tensor], least: float) -> dict[str, float]:
    """Forward and backward through autograd."""
    y, final = form(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    grads = [torch.ones_like(y), torch.ones_like(final)]

    def backward() -> None:
        torch.autograd.grad([y, final], leaves, grads, retain_graph=True)

    return {"forward": cpu_ms(lambda: form(*inputs), least), "backward": cpu_ms(backward, least)}


def cuda_times(inputs: list[Tensor]) -> dict[str, float]:
    """The two operators alone."""
    inputs = [x.detach() for x in inputs]
    y, final, entries = torch.ops.i3dist.wkv(*inputs)
    saved = (torch.ones_like(y), torch.ones_like(final), *inputs[:5], entries, final)
    return {
        "forward": cuda_ms(lambda: torch.ops.i3dist.wkv(*inputs)),
        "backward": cuda_ms(lambda: torch.ops.i3dist.wkv_backward(*saved)),
    }


def copy_ms(size: float, device: str, least: float) -> float:
    """A copy that moves `size` bytes, half of them in and half out."""
    source = torch.empty(int(size) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    return cuda_ms(copy) if device == "cuda" else cpu_ms(copy, least)


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, least: float
) -> list[Row]:
    """Rows of one shape."""
    inputs = make_inputs(shape, dtype, device)
    loop: dict[str, float] = {}
    if device == "cuda":
        times = cuda_times(inputs)
    else:
        times, loop = (cpu_times(form, inputs, least) for form in (wkv, scripted_loop))
    moved: dict[str, float] = {what: n * inputs[2].nbytes for what, n in TENSORS_MOVED.items()}
    copies = {what: copy_ms(size, device, least) for what, size in moved.items()}
    for table in (times, loop, moved, copies):
        if table:
            table["both"] = table["forward"] + table["backward"]
    name, kind = "x".join(map(str, shape)), str(dtype).removeprefix("torch.")
    return [
        Row(name, kind, what, ms, moved[what] / ms / 1e6, ms / copies[what], loop.get(what))
        for what, ms in times.items()
    ]


def show(rows: list[Row], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("B x T x C", "dtype", "pass", "ms", "GB/s", "x copy", "loop ms", "x faster"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row.ms, row.gb_per_s, row.times_copy, row.loop_ms, row.times_faster_than_loop)
        texts = ("" if x is None else f"{x:,.{1 if x >= 100 else 3}f}" for x in figures)
        table.add_row(row.shape, row.dtype, row.what, *texts)
    Console(width=100).print(table)


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--seconds", type=float, default=2.0, help="least per CPU figure")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        dist.keep_freed_memory()  # as training does
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    rows: list[Row] = []
    for shape in CUDA_SHAPES if cuda else CPU_SHAPES:
        rows += measure(shape, dtype, device, arguments.seconds)
    show(rows, f"WKV, {name}, PyTorch {torch.__version__}")
    if arguments.json:
        figures = [asdict(row) for row in rows]
        record = {"device": name, "torch": torch.__version__, "rows": figures}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
