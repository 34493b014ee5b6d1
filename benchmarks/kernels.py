"""The GPU time of a training step, by kernel."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

# The first pattern that a kernel's name matches names its kind.
KINDS = {
    "matrix products": r"nvjet|gemm|cutlass|cublas",
    "attention": r"flex_attention|flash|fmha|sdpa",
    "WKV": r"wkv_(forward|backward)_kernel",
    "LayerNorm, shift, mixes": r"shift_mix_",
    "loss": r"log_softmax|nll_loss|copy__exp_log",
    "AdamW": r"FusedOptimizer|[Aa]dam|triton_poi\w*_sqrt",
    "communication": r"nccl",
    "other compiled": r"^triton_",
    "other": "",
}


STEPS = 3
PROFILED = STEPS + 1  # steps that a profile takes


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel))


def kernels(step: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """(name, ms, launches) of every kernel in a step, on average, the longest first."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found = [
        (event.key, event.self_device_time_total / STEPS / 1e3, event.count / STEPS)
        for event in recorded.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda row: -row[1])


def show(found: Iterable[tuple[str, float, float]], title: str, longest: int = 45) -> None:
    """Print the time of each kind of kernel, and of the longest kernels."""
    found = list(found)
    total = sum(ms for _, ms, _ in found)
    by_kind: Counter[str] = Counter()
    for name, ms, _ in found:
        by_kind[kind_of(name)] += ms  # type: ignore[assignment]
    table = Table(title=f"{title}: GPU busy for {total:.1f} ms a step")
    for heading in ("kernels", "ms", "share", "launches"):
        table.add_column(heading, justify="left" if heading == "kernels" else "right")
    for kind, ms in by_kind.most_common():
        table.add_row(kind, f"{ms:.2f}", f"{ms / total:.1%}", "")
    table.add_section()
    for name, ms, launches in found[:longest]:
        table.add_row(name[:70], f"{ms:.2f}", f"{ms / total:.1%}", f"{launches:.0f}")
    Console(width=120).print(table)
