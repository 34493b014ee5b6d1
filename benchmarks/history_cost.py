"""Measures the time and memory of the arms of benchmarks/history.py, each alone on the device.

    python benchmarks/history_cost.py --data DIR [--arms ARM ...] [--json FILE]

It takes full optimizer steps of the experiment's models on its data, and reports their median time
and the GPU memory that they reserve. recipe-dual has the layers and the compressor of the settings'
default. History is on from the first step, so -soon and -drop change nothing.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from history import WINDOW, add_sizes, model_settings, read, steps_of
from history_arms import build, named_arm
from measure import free, time_steps
from rich.console import Console
from rich.table import Table
from torch import Tensor

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import ModelSettings, TrainSettings
from i3dist.data.corpus import Split
from i3dist.data.manifest import Manifest
from i3dist.distributed import collectives
from i3dist.files import write_result

ARMS = ["none", "recipe-dual", "recipe", "mean", "literal", "ceiling", "carry", "recipe-carry"]
FIRST = 16  # first window to read: inside long documents, so that histories are full
LR = 1e-4


@dataclass(frozen=True)
class Cost:
    """Time and memory of one arm."""

    arm: str
    parameters: int
    ms: float  # of a step
    tokens_per_s: float
    gib: float | None  # reserved


def measure(arm: str, settings: ModelSettings, split: Split, options: argparse.Namespace) -> Cost:
    """Time an arm's steps over successive windows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build(arm, settings, split.manifest.bos_id, seed=0)
    steps = steps_of(model, options.lanes, device, TrainSettings().clip)
    span = range(FIRST, FIRST + options.warm_up + options.steps)
    batches = read(split, options.lanes, 0, span, device)

    def step() -> Tensor:
        return steps([next(batches)], LR, split.manifest.pad_id)

    _, times, memory = time_steps(step, options.warm_up, options.steps)
    parameters = sum(p.numel() for p in model.parameters())
    steps.close()
    ms = statistics.median(times)
    tokens = options.lanes * WINDOW * settings.chunk_length
    return Cost(arm, parameters, ms, 1e3 * tokens / ms, memory)


def show(costs: list[Cost]) -> None:
    """Print a table; times are also shown relative to the first arm's."""
    table = Table(title="an optimizer step of each arm")
    for heading in ("arm", "parameters", "ms", "tokens/s", f"ms, {costs[0].arm} = 1", "GiB"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for c in costs:
        gib = "" if c.gib is None else f"{c.gib:.1f}"
        ratio = f"{c.ms / costs[0].ms:.3f}"
        table.add_row(
            c.arm, f"{c.parameters:,}", f"{c.ms:.1f}", f"{c.tokens_per_s:,.0f}", ratio, gib
        )
    Console(width=100).print(table)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data to train on")
    parser.add_argument(
        "--arms", nargs="+", type=named_arm, default=ARMS, help=f"(default: {' '.join(ARMS)})"
    )
    add_sizes(parser)
    parser.add_argument("--warm-up", type=int, default=10, help="steps (default: 10)")
    parser.add_argument("--steps", type=int, default=40, help="steps to time (default: 40)")
    parser.add_argument(
        "--json", type=result_path, metavar="FILE", help="write the results to this file"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Cost]:
    """Measure and show every arm."""
    options = parse_arguments(arguments)
    split = Split(options.data / "train", Manifest.load(options.data / "train"))
    settings, costs = model_settings(options, split.manifest), []
    for arm in options.arms:
        free()
        costs.append(measure(arm, settings, split, options))
        if options.json:
            text = json.dumps([asdict(c) for c in costs], indent=1)
            write_result(options.json, f"{text}\n".encode())
    show(costs)
    collectives.leave_group()
    return costs


if __name__ == "__main__":
    with one_line_errors():
        main()
