"""Time of WKV, of other implementations, and of a plain copy of the bytes that it must move.

    python benchmarks/wkv.py [--json FILE] [--rwkv-lm DIR]

Bytes: forward reads k and v and writes y; backward reads k, v and y's gradient and writes two more.
"% copy" is a form's share of the bandwidth of a copy of as many bytes, timed in the same run.

On the CPU, in fp32, with autograd: ours and the same recurrence as a TorchScript loop over time.

On CUDA, in bf16, the operators alone, replayed from a graph: ours, that of `fla` where the package
fla-core is installed (https://github.com/fla-org/flash-linear-attention), and the kernels of
https://github.com/BlinkDL/RWKV-LM where --rwkv-lm names a folder with wkv_cuda_bf16.cu and
wkv_op_bf16.cpp. The latter run on the default stream, which a graph cannot record, so their
launches are timed in a row. All start from an empty state and run without restarts, which the other
two do not support; ours is also timed with restarts.
"""

import functools
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser
from i3dist.distributed import host
from i3dist.files import write_result
from i3dist.ops.wkv import WkvInputs, empty_state, wkv

CPU_SHAPES = [(4, 512, 256), (4, 512, 1180)]
CUDA_SHAPES = [(4, 512, 1184), (32, 512, 1180), (32, 512, 1184), (64, 512, 1184)]
TENSORS_MOVED = {"forward": 3, "backward": 5}

Shape = tuple[int, int, int]  # B, T, C
Call = Callable[[], Any]


@dataclass(frozen=True)
class Form:
    """An implementation, ready to run on inputs of one shape."""

    name: str
    y: Tensor
    forward: Call
    backward: Call
    milliseconds: Callable[[Call], float]


@dataclass(frozen=True)
class Timing:
    """One line of the table; times in milliseconds."""

    shape: str
    dtype: str
    form: str
    what: str
    ms: float
    gb_per_s: float
    percent_of_copy: float
    times_ours: float


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


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, restarts: bool) -> list[Tensor]:
    """A training step's inputs: decays of every length, documents of a few hundred tokens."""
    rows, length, channels = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    restart = torch.rand(rows, length, generator=generator, device=device) < 0.003
    restart[:, 0] = True
    restart &= restarts
    decay = -torch.exp(torch.linspace(-5, 3, channels, device=device))
    bonus = normal(channels).bfloat16().float()  # some forms take it in bf16
    k, v = (normal(*shape).to(dtype).requires_grad_() for _ in range(2))
    state = empty_state(rows, channels, device)
    return [decay.requires_grad_(), bonus.requires_grad_(), k, v, restart, state]


def cpu_ms(call: Call, least: float) -> float:
    """Median over at least `least` seconds."""
    for _ in range(3):
        call()
    threads = torch.get_num_threads()
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=least).median * 1e3


def cuda_ms(call: Call) -> float:
    """Median of replays of a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=20, return_mode="median")


def default_stream_ms(call: Call, repeats: int = 20, launches: int = 10) -> float:
    """Median of several rows of launches, for what does not follow the current stream."""
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return statistics.median(times[1:])


def cpu_form(name: str, operator: Callable, inputs: list[Tensor], least: float) -> Form:
    """An operator and autograd's backward pass."""
    y, final = operator(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    grads = [torch.ones_like(y), torch.ones_like(final)]

    def backward() -> None:
        torch.autograd.grad([y, final], leaves, grads, retain_graph=True)

    return Form(name, y, lambda: operator(*inputs), backward, lambda call: cpu_ms(call, least))


def cuda_form(name: str, inputs: list[Tensor]) -> Form:
    """Our two operators."""
    inputs = [x.detach() for x in inputs]
    y, final, entries = torch.ops.i3dist.wkv(*inputs, None)
    saved = (torch.ones_like(y), torch.ones_like(final), *inputs[:5], entries, final)
    return Form(
        name,
        y,
        lambda: torch.ops.i3dist.wkv(*inputs, None),
        lambda: torch.ops.i3dist.wkv_backward(*saved, None),
        cuda_ms,
    )


def fla_form(inputs: list[Tensor]) -> Form:
    """The two halves of fla's `fused_recurrent_rwkv4`."""
    from fla.ops.rwkv4 import fused_recurrent as fla

    decay, bonus, k, v, _, state = (x.detach() for x in inputs)
    state = state.clamp(min=-1e38).unsqueeze(2)  # [B, 3, 1, C]
    y, states = fla.fused_recurrent_rwkv4_forward(decay, bonus, k, v, state)
    grads = torch.ones_like(y), torch.ones_like(states[:, :, -1:])
    saved = decay, bonus, k, v, states[:, :, :-1]
    return Form(
        "fla",
        y,
        lambda: fla.fused_recurrent_rwkv4_forward(decay, bonus, k, v, state),
        lambda: fla.fused_recurrent_rwkv4_backward(*saved, *grads),
        cuda_ms,
    )


@functools.cache
def rwkv_lm_kernels(folder: Path, length: int) -> Any:
    """RWKV-LM's kernels, compiled with its own flags for up to `length` tokens."""
    from torch.utils.cpp_extension import load

    flags = f"-O3 --use_fast_math --maxrregcount 60 --extra-device-vectorization -DTmax={length}"
    sources = [str(folder / name) for name in ("wkv_op_bf16.cpp", "wkv_cuda_bf16.cu")]
    return load(f"wkv_rwkv_lm_{length}", sources, extra_cuda_cflags=flags.split())


def rwkv_lm_form(inputs: list[Tensor], folder: Path) -> Form:
    """RWKV-LM's two kernels."""
    decay, bonus, k, v, _, _ = (x.detach() for x in inputs)
    rows, length, channels = k.shape
    kernels = rwkv_lm_kernels(folder, length)
    bonus, y, grad_y = bonus.bfloat16(), torch.empty_like(k), torch.ones_like(k)
    grads = (*bonus.new_empty(2, rows, channels), torch.empty_like(k), torch.empty_like(v))
    given = rows, length, channels, decay, bonus, k, v, y
    kernels.forward(*given)

    def backward() -> tuple[Tensor, Tensor]:
        kernels.backward(*given, grad_y, *grads)
        return grads[0].sum(0), grads[1].sum(0)

    return Form("RWKV-LM", y, lambda: kernels.forward(*given), backward, default_stream_ms)


def cuda_forms(shape: Shape, dtype: torch.dtype, rwkv_lm: Path | None) -> list[Form]:
    """Ours, and those that are there and take this shape."""
    inputs = make_inputs(shape, dtype, "cuda", restarts=False)
    forms = [cuda_form("i3dist", inputs)]
    if importlib.util.find_spec("fla"):
        forms.append(fla_form(inputs))
    if rwkv_lm and shape[0] * shape[2] % min(shape[2], 32) == 0:
        forms.append(rwkv_lm_form(inputs, rwkv_lm))
    for form in forms:
        # The same function: what differs is rounding.
        torch.testing.assert_close(form.y, forms[0].y, rtol=0.02, atol=0.02)
    with_restarts = make_inputs(shape, dtype, "cuda", restarts=True)
    return [*forms, cuda_form("i3dist, restarts", with_restarts)]


def cpu_forms(shape: Shape, dtype: torch.dtype, least: float) -> list[Form]:
    """Ours and the loop."""
    inputs = make_inputs(shape, dtype, "cpu", restarts=True)
    ours: Callable = lambda *inputs: wkv(WkvInputs(*inputs))  # noqa: E731
    operators = {"i3dist": ours, "scripted loop": scripted_loop}
    return [cpu_form(name, operator, inputs, least) for name, operator in operators.items()]


def copy_ms(size: float, form: Form) -> float:
    """A copy that moves `size` bytes, half of them in and half out, timed as the form is."""
    source = torch.empty(int(size) // 2, dtype=torch.uint8, device=form.y.device)
    target = torch.empty_like(source)
    return form.milliseconds(lambda: target.copy_(source))


def measure(shape: Shape, forms: list[Form]) -> list[Timing]:
    """Rows of one shape; the first form is ours."""
    ours = forms[0]
    moved = {what: float(n * ours.y.nbytes) for what, n in TENSORS_MOVED.items()}
    copies = {what: copy_ms(size, ours) for what, size in moved.items()}
    tables = [
        {"forward": form.milliseconds(form.forward), "backward": form.milliseconds(form.backward)}
        for form in forms
    ]
    for table in (moved, copies, *tables):
        table["both"] = table["forward"] + table["backward"]
    name, dtype = "x".join(map(str, shape)), str(ours.y.dtype).removeprefix("torch.")
    rows = []
    for form, times in zip(forms, tables, strict=True):
        for what, ms in times.items():
            percent, times_ours = 100 * copies[what] / ms, ms / tables[0][what]
            speed = moved[what] / ms / 1e6
            rows.append(Timing(name, dtype, form.name, what, ms, speed, percent, times_ours))
    return rows


def show(rows: list[Timing], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("B x T x C", "dtype", "form", "pass", "ms", "GB/s", "% copy", "x i3dist"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (f"{row.ms:,.3f}", f"{row.gb_per_s:,.0f}", f"{row.percent_of_copy:.1f}")
        table.add_row(row.shape, row.dtype, row.form, row.what, *figures, f"{row.times_ours:.2f}")
    Console(width=100).print(table)


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=result_path, metavar="FILE", help="also write the figures here"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="least per CPU figure")
    parser.add_argument("--rwkv-lm", type=Path, metavar="DIR", help="RWKV-LM's RWKV-v4neo/cuda")
    arguments = parser.parse_args()
    rows: list[Timing] = []
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if not importlib.util.find_spec("fla"):
            print("fla is left out: fla-core is not installed")
        for shape in CUDA_SHAPES:
            rows += measure(shape, cuda_forms(shape, torch.bfloat16, arguments.rwkv_lm))
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
        host.keep_freed_memory()  # as training does
        for shape in CPU_SHAPES:
            rows += measure(shape, cpu_forms(shape, torch.float32, arguments.seconds))
    show(rows, f"WKV, {name}, PyTorch {torch.__version__}")
    if arguments.json:
        figures = [asdict(row) for row in rows]
        record = {"device": name, "torch": torch.__version__, "rows": figures}
        write_result(arguments.json, f"{json.dumps(record, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
