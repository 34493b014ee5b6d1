"""Measures the time that checkpoints cost training.

    python benchmarks/saving.py [--config FILE] [--interval N] [--rounds N]

It takes intervals of optimizer steps through the engine, as training does. Three kinds of interval
take turns: without a checkpoint; with one that is begun before the first step and written during
the steps; and with one that training waits for. An interval ends when its steps and its checkpoint
are done. The cost of a checkpoint is the time beyond that of an interval without one.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from i3_steps import Shape, in_engine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from synthetic import BOS, PAD, Data, batches

from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.checkpoint.format import RunState
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import CheckpointSettings, Settings
from i3dist.distributed import collectives, devices
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.model.lm import I3LM

KINDS = ("no checkpoint", "saved behind", "waited for")


class Intervals:
    """Steps of a model, and a saver of its checkpoints."""

    def __init__(self, settings: Settings, shape: Shape, folder: Path):
        """Build the model and its data in `folder`."""
        model, job = settings.model, Job.detect({})
        device = devices.device(job)
        (folder / "data").mkdir()
        data = Data.write(folder / "data", model.vocab, model.chunk_length, 2 * shape.lanes, 64)
        self.batches = batches(data.lane_windows(shape.lanes, shape.window), 4, device)
        self.steps = in_engine(I3LM(model, BOS).to(device), shape, device)
        self.lanes = range(shape.lanes)
        self.saver = AsyncSaver(folder / "checkpoints", job, CheckpointSettings(keep=1), b"{}")
        self.settings = settings.to_dict()

    def save(self) -> None:
        """Begin a checkpoint, as the trainer does."""
        step = self.saver.step + 1
        state = RunState(
            step=step, windows=0, tokens_seen=0, settings=self.settings, data="", engine={}
        )
        self.saver.begin(state, self.steps.loop.snapshot, (self.lanes, self.steps.state))

    def take(self, count: int) -> None:
        """Take `count` steps and wait for the device."""
        for index in range(count):
            self.steps([self.batches[index % len(self.batches)]], lr=1e-4, pad_id=PAD)
        if self.steps.gate.is_cuda:
            torch.cuda.synchronize()

    def interval(self, kind: str, count: int) -> tuple[float, float]:
        """Seconds of an interval, and the seconds before its first step."""
        started = time.perf_counter()
        if kind != KINDS[0]:
            self.save()
        if kind == KINDS[2]:
            self.saver.wait()
        stalled = time.perf_counter() - started
        self.take(count)
        self.saver.wait()
        return time.perf_counter() - started, stalled


def measure(intervals: Intervals, count: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Measure every kind of interval in turn, after a warm-up."""
    intervals.take(3)
    intervals.interval(KINDS[1], 1)
    turns = [kind for _ in range(rounds) for kind in KINDS]
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for kind in track(turns, "intervals"):
        found[kind].append(intervals.interval(kind, count))
    return found


def show(found: dict[str, list[tuple[float, float]]], title: str) -> None:
    """Print a table of medians."""
    table = Table(title=title)
    for column in ("interval", "seconds", "training waited", "cost"):
        table.add_column(column, justify="left" if column == "interval" else "right")
    plain = statistics.median(seconds for seconds, _ in found[KINDS[0]])
    for kind, times in found.items():
        seconds, stalled = (statistics.median(column) for column in zip(*times, strict=True))
        cost = "" if kind == KINDS[0] else f"{100 * (seconds / plain - 1):+.1f}%"
        table.add_row(kind, f"{seconds:.2f}", f"{100 * stalled / plain:.2f}%", cost)
    Console().print(table)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings (default: the card)")
    for name, default, text in (
        ("--interval", 100, "steps of an interval"),
        ("--rounds", 3, "intervals of each kind"),
    ):
        parser.add_argument(
            name, type=int, metavar="N", default=default, help=f"{text} (default: {default})"
        )
    options = parser.parse_args(arguments)
    if min(options.interval, options.rounds) < 1:
        raise UserError("--interval and --rounds must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = parse_arguments(arguments)
    settings = Settings.load(options.config, ["model.vocab_size=4096"] if options.config else [])
    shape = Shape(4, 4, settings.train.window_chunks)
    with tempfile.TemporaryDirectory() as folder:
        intervals = Intervals(settings, shape, Path(folder))
        found = measure(intervals, options.interval, options.rounds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    show(found, f"{options.interval} steps of {shape}, {device}")
    collectives.leave_group()


if __name__ == "__main__":
    with one_line_errors():
        main()
