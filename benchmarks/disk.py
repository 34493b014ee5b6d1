"""For benchmarks/saving.py: writing a checkpoint beside `dd conv=fsync` and `sha256sum`."""

import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from results import Figure, figure_table
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from i3dist.checkpoint import store
from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.checkpoint.format import FileDigest
from i3dist.engine.deepspeed_internals import Address
from i3dist.engine.flat_parameters import Extent, Flat
from i3dist.engine.optimizer_state import PartitionedState
from i3dist.errors import UserError
from i3dist.model.layers import Channels
from i3dist.optim import adamw
from i3dist.optim.flat import fresh_state

MATRICES = 64  # of a state without a model
LEAST = 0.8  # of the slower of dd and sha256sum
SAVING, SHA256SUM, OPENSSL, DD = "checkpoint", "sha256sum", "OpenSSL", "dd conv=fsync"


def state_of_size(size: float, width: int) -> PartitionedState:
    """Weights and AdamW's moments in `size` bytes: random, in padded matrices `width` wide."""
    columns = Channels(width).computed
    rows = max(1, round(size / (3 * 4 * width * MATRICES)))
    length, shape, layout = rows * columns, torch.Size([rows, width]), torch.Size([rows, columns])
    extents = [Extent(index * length, length, shape, layout) for index in range(MATRICES)]
    weight = nn.Parameter(torch.randn(MATRICES * length), requires_grad=False)
    state = fresh_state(weight, adamw.STATES, steps=1)
    for name in adamw.STATES:
        state[name].normal_()
    # What ZeRO holds on a single rank.
    address = Address(group=0, start=0, length=len(weight), at=0)
    zero: Any = SimpleNamespace(partitions=[weight], address=lambda _: address)
    optimizer: Any = SimpleNamespace(state={weight: state})
    names = [f"{index}.weight" for index in range(MATRICES)]
    return PartitionedState([Flat(weight, names, extents)], zero, optimizer, adamw.STATES)


class Turn(NamedTuple):
    """How long one thing took."""

    seconds: float
    size: int  # bytes
    waited: float = 0.0  # seconds before, in which training waits


def measure(
    save: Callable[[], None], saver: AsyncSaver, folder: Path, rounds: int
) -> dict[str, list[Turn]]:
    """Copy a checkpoint's largest file and save the next checkpoint in turn, after a first save.

    Hashing comes before both. So both write about as long after another file was removed, whose
    memory and blocks are quick to use again, for a while.

    Args:
        save: begins a checkpoint of `saver`.
        saver: writes to a folder inside of `folder`.
        folder: on the disk that is measured.
        rounds: how many turns of each count.

    Raises:
        UserError: dd or sha256sum is missing, or fails.
    """
    found: dict[str, list[Turn]] = {SAVING: [], SHA256SUM: [], OPENSSL: [], DD: []}

    def hash_file() -> None:
        file = _largest(saver)
        found[SHA256SUM].append(_timed(file, partial(_run, "sha256sum", file)))
        found[OPENSSL].append(_timed(file, partial(FileDigest.of, file)))

    _save(save, saver)
    for _ in track(range(rounds), "writing"):
        hash_file()
        found[DD].append(_copy(_largest(saver), folder / "copy"))
        hash_file()
        found[SAVING].append(_save(save, saver))
    return found


def _save(save: Callable[[], None], saver: AsyncSaver) -> Turn:
    started = time.perf_counter()
    save()
    begun = time.perf_counter()
    saver.wait()
    seconds = time.perf_counter() - begun
    return Turn(seconds, sum(path.stat().st_size for path in _files(saver)), begun - started)


def _files(saver: AsyncSaver) -> list[Path]:
    return list(store.place(saver.folder, saver.step).iterdir())


def _largest(saver: AsyncSaver) -> Path:
    return max(_files(saver), key=lambda path: path.stat().st_size)


def _copy(file: Path, copy: Path) -> Turn:
    command = ["dd", f"if={file}", f"of={copy}", "bs=4M", "conv=fsync", "status=none"]
    turn = _timed(file, partial(_run, *command))
    copy.unlink()
    return turn


def _timed(file: Path, work: Callable[[], object]) -> Turn:
    started = time.perf_counter()
    work()
    return Turn(time.perf_counter() - started, file.stat().st_size)


def _run(*command: str | Path) -> None:
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{command[0]} is needed to compare with: {error}") from None


def show(found: dict[str, list[Turn]], title: str) -> None:
    """Print a table of medians, and writing's share of the slower of the other two."""
    table = Table(title=title)
    for column in ("", "GB", "seconds", "from", "to", "MB/s", "waited"):
        table.add_column(column, justify="right" if column else "left")
    for name, turns in found.items():
        times = [turn.seconds for turn in turns]
        size, seconds = turns[0].size, statistics.median(times)
        waited = statistics.median(turn.waited for turn in turns)
        table.add_row(
            name,
            f"{size / 1e9:.2f}",
            *(f"{value:.2f}" for value in (seconds, min(times), max(times))),
            f"{speed(turns) / 1e6:,.0f}",
            f"{waited:.2f}" if name == SAVING else "",
        )
    console = Console()
    console.print(table)
    saving, slower = speed(found[SAVING]), min(speed(found[SHA256SUM]), speed(found[DD]))
    figures = [
        Figure("writing / slower of dd and sha256sum", saving / slower, ".0%", least=LEAST),
        Figure("writing / dd", saving / speed(found[DD]), ".0%"),
    ]
    console.print(figure_table(figures))


def speed(turns: list[Turn]) -> float:
    """Bytes per second, by the median time."""
    return turns[0].size / statistics.median(turn.seconds for turn in turns)
