"""Measures the time that checkpoints cost training, and how fast they are written.

    python benchmarks/saving.py [--config FILE] [--interval N] [--rounds N] [--folder DIR]
    python benchmarks/saving.py --gb GB [--rounds N] [--folder DIR]

It takes intervals of optimizer steps through the engine, as training does. Three kinds of interval
take turns: without a checkpoint; with one that is begun before the first step and written during
the steps; and with one that training waits for. An interval ends when its steps and its checkpoint
are done. The cost of a checkpoint is the time beyond that of an interval without one.

Then, without steps, these take turns: saving a checkpoint; hashing its largest file by `sha256sum`
and by OpenSSL, which Python uses; and copying that file to the same disk by `dd conv=fsync`. The
file has just been written, so it is read from the page cache if memory is large enough.

With --gb only the latter is measured, and no model is built: the state is random, in matrices as
wide as the default model's. Training waits while it is copied within the host's memory.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import disk
import torch
from i3_steps import Shape, in_engine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from synthetic import BOS, PAD, Data, batches

from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.checkpoint.format import Fragment, RunState
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import CheckpointSettings, Settings
from i3dist.distributed import collectives, devices
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState

KINDS = ("no checkpoint", "saved behind", "waited for")


class Checkpoints:
    """Saves checkpoints of a state, as the trainer does."""

    def __init__(
        self, folder: Path, settings: Settings, snapshot: Callable[[], Iterator[Fragment]]
    ):
        """`snapshot` is that of an engine; checkpoints are written to `folder`."""
        self.saver = AsyncSaver(folder, Job.detect({}), CheckpointSettings(keep=1), b"{}")
        self._settings, self._snapshot = settings.to_dict(), snapshot

    def begin(self, lanes: LaneState) -> None:
        """Begin a checkpoint with a state of lanes."""
        state = RunState(
            step=self.saver.step + 1,
            windows=0,
            tokens_seen=0,
            settings=self._settings,
            data="",
            engine={},
        )
        self.saver.begin(state, self._snapshot, (range(len(lanes.latents)), lanes))


class Intervals:
    """Steps of a model, and a saver of its checkpoints."""

    def __init__(self, settings: Settings, shape: Shape, folder: Path):
        """Build the model and its data in `folder`."""
        model, device = settings.model, devices.device(Job.detect({}))
        (folder / "data").mkdir()
        data = Data.write(folder / "data", model.vocab, model.chunk_length, 2 * shape.lanes, 64)
        self.batches = batches(data.lane_windows(shape.lanes, shape.window), 4, device)
        self.steps = in_engine(I3LM(model, BOS).to(device), shape, device)
        snapshot = self.steps.loop.snapshot
        self.checkpoints = Checkpoints(folder / "checkpoints", settings, snapshot)
        self.saver = self.checkpoints.saver

    def save(self) -> None:
        """Begin a checkpoint."""
        self.checkpoints.begin(self.steps.state)

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
        ("--rounds", 3, "intervals of each kind, and turns of writing"),
    ):
        parser.add_argument(
            name, type=int, metavar="N", default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument("--gb", type=float, help="write only, a state of so many 10^9 bytes")
    parser.add_argument(
        "--folder",
        type=typed_path,
        metavar="DIR",
        help="a folder of the disk to write to (default: the system's for temporary files)",
    )
    options = parser.parse_args(arguments)
    if min(options.interval, options.rounds) < 1:
        raise UserError("--interval and --rounds must be 1 or more")
    if options.gb is not None and not 0 < options.gb <= 1e4:
        raise UserError("--gb must be above 0, and 10000 at most")
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"--folder {options.folder} is no folder: name one of the disk to measure")
    return options


def write_only(options: argparse.Namespace, folder: Path) -> None:
    """Measure and print how fast a state without a model is written."""
    settings = Settings()
    lanes = LaneState.empty(4, settings.model, torch.device("cpu"), torch.bfloat16)
    state = disk.state_of_size(1e9 * options.gb, settings.model.d_model)
    checkpoints = Checkpoints(folder / "checkpoints", settings, state.snapshot)
    begin = partial(checkpoints.begin, lanes)
    disk.show(disk.measure(begin, checkpoints.saver, folder, options.rounds), "writing, CPU")


def with_steps(options: argparse.Namespace, folder: Path) -> None:
    """Measure and print what checkpoints cost steps, then how fast they are written."""
    settings = Settings.load(options.config, ["model.vocab_size=4096"] if options.config else [])
    shape = Shape(4, 4, settings.train.window_chunks)
    intervals = Intervals(settings, shape, folder)
    found = measure(intervals, options.interval, options.rounds)
    written = disk.measure(intervals.save, intervals.saver, folder, options.rounds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    show(found, f"{options.interval} steps of {shape}, {device}")
    disk.show(written, f"writing, {device}")
    collectives.leave_group()


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        (with_steps if options.gb is None else write_only)(options, Path(folder))


if __name__ == "__main__":
    with one_line_errors():
        main()
