"""Both engines side by side: what replacing DeepSpeed's slow parts gains.

    python benchmarks/engines.py [--json FILE]

Two copies of the i3 take the same optimizer steps on the same batches in one process, by turns: one
through train.engine=zero2, one through train.engine=stock, DeepSpeed's public API alone. On a GPU
the model is that of i3-4096ctx; on a CPU, or with --toy, a small one. A round is a few steps of
each, and the ratio is the median over rounds of zero2's tokens per second to stock's. The largest
difference of their losses, relative, is printed beside it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from i3_steps import I3Steps, Shape, in_engine
from synthetic import BOS, PAD, Data, batches

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import ModelSettings, TrainSettings
from i3dist.data.lanes import Batch
from i3dist.distributed import collectives
from i3dist.errors import UserError
from i3dist.files import write_result
from i3dist.model.lm import I3LM

ENGINES = ("zero2", "stock")
LR = 1e-4
CARD = ModelSettings(vocab_size=32_000)
TOY = ModelSettings(vocab_size=512, d_model=128, layers="3xrwkv,1xdual-attention", heads=4)
TOY = TOY.model_copy(update={"chunk_length": 128, "latents": 16})


def build(engine: str, model: ModelSettings, shape: Shape, device: torch.device) -> I3Steps:
    """One of the two copies: equal weights, nothing in common."""
    torch.manual_seed(0)
    train = TrainSettings.model_validate({"engine": engine})
    return in_engine(I3LM(model, BOS).to(device), shape, device, train)


def take(steps: I3Steps, given: list[Batch]) -> tuple[float, list[float]]:
    """A step over each batch; returns seconds, and the mean loss of each step."""
    started = time.perf_counter()
    losses = [steps([batch], LR, PAD) for batch in given]
    if losses[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, torch.stack(losses).tolist()


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time both; returns the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TOY if options.toy or device.type == "cpu" else CARD
    shape = Shape(options.lanes, options.lanes, options.window)
    data = Data.write(folder, model.vocab, model.chunk_length, 2 * shape.lanes, 64)
    given = batches(data.lane_windows(shape.lanes, shape.window), options.steps, device)
    copies = {engine: build(engine, model, shape, device) for engine in ENGINES}
    for _ in range(2):  # compiles, and lets caches settle
        for steps in copies.values():
            take(steps, given)
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    difference = 0.0
    for number in range(options.rounds):
        losses = {}
        for engine in ENGINES[:: 1 if number % 2 else -1]:  # neither is always first
            spent, losses[engine] = take(copies[engine], given)
            seconds[engine].append(spent)
        pairs = zip(losses["zero2"], losses["stock"], strict=True)
        difference = max(difference, *(abs(a - b) / b for a, b in pairs))
    tokens = shape.chunks * model.chunk_length * options.steps
    ratios = [s / z for z, s in zip(seconds["zero2"], seconds["stock"], strict=True)]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in copies["zero2"].model.parameters()),
        "shape": str(shape),
        "tokens_per_second": {k: tokens / statistics.median(v) for k, v in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest_loss_difference": difference,
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    for name, default, text in (
        ("--lanes", 4, "lanes of a step"),
        ("--window", 8, "chunks of a window"),
        ("--steps", 5, "steps of each engine in a round"),
        ("--rounds", 10, "rounds"),
    ):
        parser.add_argument(
            name, type=int, metavar="N", default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument("--toy", action="store_true", help="a small model on a GPU too")
    parser.add_argument("--json", type=result_path, metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    if min(options.lanes, options.window, options.steps, options.rounds) < 1:
        raise UserError("--lanes, --window, --steps and --rounds must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Compare, print, and write JSON where asked."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(options, Path(folder))
    print(f"{found['device']}, {found['parameters'] / 1e6:.1f}M parameters, {found['shape']}")
    for engine, rate in found["tokens_per_second"].items():
        print(f"  {engine}: {rate:,.0f} tokens/s")
    low, high = min(found["ratios"]), max(found["ratios"])
    print(
        f"  zero2/stock: {found['ratio']:.2f} ({low:.2f} to {high:.2f}); losses differ by at most "
        f"{found['largest_loss_difference']:.1e}"
    )
    if options.json:
        write_result(options.json, f"{json.dumps(found, indent=1)}\n".encode())
    collectives.leave_group()
    return found


if __name__ == "__main__":
    with one_line_errors():
        main()
