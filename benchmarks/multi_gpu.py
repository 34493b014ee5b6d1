"""Several GPUs of one host against one: how much of their speed training gets.

    python benchmarks/multi_gpu.py [--only CASE ...] [--json FILE]

A case is a loop with some lanes (rows of the batch) on each GPU:

  zero2   i3-4096ctx through the engine (train.engine=zero2)
  disk    the same, reading shards from disk with one worker
  stock   DeepSpeed's public API alone (train.engine=stock)
  ddp     PyTorch's DistributedDataParallel around the model

fp32 and bf16 are what gradients are summed in. "sockets" sends them through the host's network
stack instead of NVLink: a slow network.

Weak scaling compares with one GPU that has as many lanes as each of several, strong scaling
(zero2-*-fp32) with one that has as many lanes as all of them, in micro-batches. One GPU is measured
in the same call, on every GPU at once, and the mean counts. Every step is a full optimizer step on
packed documents of random tokens. Results are written as lines of JSON as they come.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import synthetic
import torch
import torch.multiprocessing
from gpu_ranks import CASES, Case, Results, Setting, compile_one, measure_local, measure_slow
from rich.console import Console
from rich.table import Table
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from train_throughput import CARD, TOY

from i3dist.cli.paths import appended_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.engine.toolchain import variables
from i3dist.errors import UserError

# NCCL between GPUs of one host as between hosts without InfiniBand.
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    names = [case.name for case in CASES]
    only = f"of {', '.join(names)} (default: all)"
    kinds = {"metavar": "CASE", "choices": names, "default": names}
    parser.add_argument("--only", nargs="+", **kinds, help=only)
    for name, default, text in (
        ("--gpus", torch.cuda.device_count(), "how many (default: all here)"),
        ("--warm-up", 3, "steps before the clock starts (default: 3)"),
        ("--steps", 20, "steps that are timed (default: 20)"),
    ):
        parser.add_argument(name, type=int, metavar="N", default=default, help=text)
    parser.add_argument(
        "--json", type=appended_path, metavar="FILE", help="add lines of JSON to this file"
    )
    toy = "models of a few thousand parameters, to check that everything runs; on CPUs too"
    parser.add_argument("--toy", action="store_true", help=toy)
    options = parser.parse_args(arguments)
    if min(options.warm_up, options.steps) < 1 or options.gpus < 2:
        raise UserError("--warm-up and --steps must be 1 or more, --gpus 2 or more")
    if options.gpus > torch.cuda.device_count() and not options.toy:
        raise UserError(
            f"{options.gpus} GPUs are asked for, {torch.cuda.device_count()} are here; "
            "--toy runs everything at a small size on CPUs"
        )
    return options


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure in stages, each with processes of its own; returns all results."""
    sizes = TOY if options.toy else CARD
    vocab, length = sizes.model.vocab, sizes.model.chunk_length
    data = synthetic.Data.write(folder, vocab, length, 64, 64)
    results = Results(options.json or folder / "results.jsonl")
    setting = Setting(
        *(options.gpus, sizes.model, data, options.warm_up, options.steps),
        *(results, folder / "meeting"),
    )
    chosen = [case for case in CASES if case.name in options.only]
    here = machine()
    results.add({"stage": "machine", "gpus": options.gpus, **here}, ", ".join(here.values()))
    if torch.cuda.is_available():
        forms = {case.compilation: case.base for case in chosen}.values()
        compiled = [form for form in forms for _ in range(options.gpus)]  # code is of one GPU
        threads = max(1, (os.cpu_count() or 1) // len(compiled))
        with variables(TORCHINDUCTOR_COMPILE_THREADS=str(threads)):
            start(compile_one, len(compiled), setting, compiled)
    start(measure_local, options.gpus, setting, chosen)
    if any(case.network == "sockets" for case in chosen):
        with variables(**SOCKETS):
            start(measure_slow, options.gpus, setting, chosen)
    return results.read()


def start(stage: Callable[..., None], processes: int, setting: Setting, cases: list[Case]) -> None:
    """Run a stage in so many processes, and wait until all have ended.

    Raises:
        UserError: one failed; the others are ended.
    """
    # A fork, which need not import everything again, cannot use CUDA if this process has.
    method = "spawn" if torch.cuda.is_available() else "fork"
    try:
        torch.multiprocessing.start_processes(
            stage, (setting, cases), nprocs=processes, start_method=method
        )
    except (ProcessExitedException, ProcessRaisedException) as error:
        why = error.msg.strip().splitlines()[-1]
        raise UserError(f"{stage.__name__}, process {error.error_index}: {why}") from None
    finally:
        setting.meeting.unlink(missing_ok=True)


def machine() -> dict[str, str]:
    """What the results depend on besides the code."""
    if not torch.cuda.is_available():
        return {"device": "CPU", "torch": torch.__version__}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "nccl": nccl}


def efficiencies(rows: list[dict[str, Any]], gpus: int) -> Iterator[dict[str, Any]]:
    """For every case on several GPUs: its speed, and its share of as many single GPUs' speed."""
    speeds: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["stage"] == "alone":
            speeds.setdefault((row["case"], row["lanes"]), []).append(row["tokens_per_second"])
    for row in rows:
        if row["stage"] != "together":
            continue
        found = {key: row[key] for key in ("case", "lanes", "ms", "tokens_per_second", "loss")}
        base = Case.named(row["case"]).base.name
        for kind, lanes in (("weak", row["lanes"] // gpus), ("strong", row["lanes"])):
            single = speeds.get((base, lanes))
            share = single and row["tokens_per_second"] / gpus / statistics.mean(single)
            found |= {kind: share, f"{kind}_single": single and statistics.mean(single)}
        yield found


def show(rows: list[dict[str, Any]], gpus: int) -> None:
    """Print the table."""
    table = Table(title=f"{gpus} GPUs against one")
    columns = ("case", "lanes in all", "ms", "tokens/s", "loss")
    columns += ("one GPU, weak", "weak", "one GPU, strong", "strong")
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in efficiencies(rows, gpus):
        shown = [row["case"], str(row["lanes"]), f"{row['ms']:,.1f}"]
        shown += [f"{row['tokens_per_second']:,.0f}", f"{row['loss']:.4f}"]
        for kind in ("weak", "strong"):
            single, share = row[f"{kind}_single"], row[kind]
            shown += ["", ""] if single is None else [f"{single:,.0f}", f"{share:.1%}"]
        table.add_row(*shown)
    Console(width=120).print(table)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print; returns the rows of the table."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options, Path(folder))
    show(rows, options.gpus)
    return list(efficiencies(rows, options.gpus))


if __name__ == "__main__":
    with one_line_errors():
        main()
