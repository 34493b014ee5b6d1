"""How a run fares now, by its folder alone: read from any host, without touching the job."""

import fcntl
import os
import shutil
import socket
import statistics
import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from i3dist.checkpoint import store
from i3dist.errors import UserError
from i3dist.files import regular
from i3dist.report.settings import settings_of
from i3dist.tracking.metrics_log import (
    EVENTS,
    METRICS,
    STARTS,
    VALIDATION,
    in_order,
    read_lines,
)
from i3dist.tracking.notify import DATA_WAIT, DATA_WAIT_SECONDS
from i3dist.tracking.series import Lines, column
from i3dist.training.ledger import LEDGER

State = Literal["starting", "training", "ended", "waiting", "failed", "silent"]

RECENT = 50  # lines of metrics that trend and usual speed are taken from
FEW = 8  # lines without which there is no trend
# Seconds without a sign of life after which a run is silent: while it starts (a model is compiled),
# and while it trains, unless its lines come more slowly.
START_LIMIT, LIMIT, GAPS = 1800.0, 300.0, 5
LOW = 10**8  # bytes of a disk
SLOW, WAITS, STRAGGLES = 0.8, 0.1, 1.1  # of speed, of waiting for data, of ranks


@dataclass(frozen=True)
class Checkpoint:
    """A run's newest checkpoint."""

    step: int
    age: float
    """Seconds."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Status:
    """How a run fares. None: not known, or not yet."""

    folder: Path
    state: State
    why: str
    """What the state is concluded from."""
    steps: int
    """Of the whole run."""
    metrics: Lines
    """The last lines of metrics.jsonl, at most `RECENT`."""
    trend: float | None
    """Change of the training loss, nats in 1,000 steps; 0 if it may be chance; None: not known."""
    eta: float | None
    """Seconds until the last step."""
    checkpoint: Checkpoint | None
    starts: int
    """How often the run was started."""
    stops: Mapping[str, int]
    """How often it stopped to be started again ("requeue") and failed ("failure")."""
    free: int
    """Bytes left on the run's disk."""
    checkpoint_every: int = 0
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last line of metrics.jsonl."""

    @property
    def step(self) -> int:
        """Steps taken, as far as they were reported or saved."""
        saved = self.checkpoint.step if self.checkpoint else 0
        return max(int(self.last.get("step", 0)), saved)

    @property
    def usual_speed(self) -> float | None:
        """Median of recent tokens/s."""
        speeds = column(self.metrics, "tokens_per_second")
        speeds = speeds[np.isfinite(speeds)]
        return float(np.median(speeds)) if len(speeds) else None

    @property
    def straggling(self) -> float | None:
        """How many times as long the slowest rank computes as the fastest."""
        if self.last.get("slowest_rank") is None:
            return None
        slowest, fastest = (self.last.get(f"{name}_compute") for name in ("slowest", "fastest"))
        return slowest / fastest if slowest and fastest else None

    def warnings(self) -> Iterator[str]:
        """What a person should look at."""
        if self.last and self.last.get("loss") is None:
            yield "the last loss is not a number"
        if self.trend is not None and self.trend > 0:
            yield "the loss rises"
        skipped = column(self.metrics, "skipped_steps")
        if len(skipped) and skipped[-1] > skipped[0]:
            yield f"{skipped[-1] - skipped[0]:.0f} steps were skipped as bad not long ago"
        usual, speed = self.usual_speed, self.last.get("tokens_per_second")
        if usual and speed is not None and speed < SLOW * usual:
            yield f"speed is {speed / usual:.0%} of what it was"
        if (self.last.get("data_wait") or 0) > WAITS:
            yield f"rank 0 waits for data in {self.last['data_wait']:.0%} of the time"
        if (self.straggling or 0) > STRAGGLES:
            yield f"rank {self.last.get('slowest_rank')} holds up the others"
        kept = self.checkpoint.step if self.checkpoint else 0
        if self.checkpoint_every and self.step - kept > 2 * self.checkpoint_every:
            yield f"the newest checkpoint is {self.step - kept:,} steps old"
        if self.checkpoint and self.free < 2 * self.checkpoint.size:
            yield "the disk has no room for two more checkpoints"
        elif self.free < LOW:
            yield "the disk is almost full"


def read_status(folder: Path) -> Status:
    """Read a run's folder.

    Raises:
        UserError: it is not a run's, or cannot be read.
    """
    settings = settings_of(folder)
    try:
        starts, events = read_lines(folder / STARTS), read_lines(folder / EVENTS)
        metrics = in_order(read_lines(folder / METRICS))[-RECENT:]
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    steps = settings.train.steps
    state, why = _state(folder, steps, starts, events, metrics)
    return Status(
        folder=folder,
        state=state,
        why=why,
        steps=steps,
        metrics=metrics,
        trend=_trend(metrics),
        eta=_eta(metrics, starts, steps),
        checkpoint=_newest(folder),
        starts=len(starts),
        stops=Counter(str(event.get("event")) for event in events),
        free=free,
        checkpoint_every=settings.checkpoint.every,
        last=metrics[-1] if metrics else {},
    )


def _state(
    folder: Path, steps: int, starts: Lines, events: Lines, metrics: Lines
) -> tuple[State, str]:
    """What the run does, and what says so."""
    begun = starts[-1].get("time", 0.0) if starts else 0.0
    newest = [event for event in events[-1:] if event.get("time", 0.0) >= begun]
    event = newest[0] if newest else {}  # of the present start
    said, reason = event.get("event"), str(event.get("reason") or "")
    here = event.get("host") == socket.gethostname()
    holder = lock_holder(folder)
    if said == "failure":
        return "failed", reason
    if not holder and metrics and metrics[-1]["step"] >= steps:
        return "ended", "all steps are taken"
    if said == "end" and not reason:  # though metrics.jsonl lacks the last step
        return "ended", "it said so"
    if said in ("requeue", "end"):
        return "waiting", reason or "it was asked to stop"
    if holder == 0 and here:
        return "failed", "its process is gone and did not say why: see the job's log"
    silence = max(0.0, time.time() - _last_sign(folder))
    wrote = f"wrote {silence:.0f} s ago"
    if holder and here and _is_stopped(holder):
        return "silent", f"process {holder} is suspended until SIGCONT; it {wrote}"
    trains = said in ("start", DATA_WAIT)
    if silence > (max(LIMIT, GAPS * _gap(metrics)) if trains else START_LIMIT):
        hangs = "it hangs" if holder else "it hangs, or is gone"
        return "silent", f"{hangs}: nothing was written for {silence:,.0f} s"
    if said == DATA_WAIT and silence < 2 * DATA_WAIT_SECONDS and _is_newer(event, metrics):
        wrote += f": {reason}"
    return ("training" if trains else "starting"), wrote


def _is_newer(event: Mapping[str, Any], metrics: Lines) -> bool:
    """Whether nothing was reported since."""
    return not metrics or bool(metrics[-1].get("time", 0.0) < event["time"])


def _is_stopped(process: int) -> bool:
    """Whether a process of this host is stopped by a signal."""
    with suppress(OSError):
        status = Path(f"/proc/{process}/stat").read_bytes()  # its name, in (), may hold anything
        return status.rpartition(b") ")[2].startswith(b"T")
    return False


def lock_holder(folder: Path) -> int | None:
    """The process that holds the run's folder; None if the file system cannot tell.

    It is 0 if there is none, and -1 if it belongs to a container whose processes are not seen here.
    Asks and takes nothing. From another host, 0 may only mean that the file system keeps locks to
    each host.
    """
    try:
        handle = os.open(regular(folder / store.LOCK), os.O_RDONLY)
    except OSError:
        return None
    try:
        # struct flock of 64-bit Linux: type, whence, start, length, process.
        wish = struct.pack("@hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(handle, fcntl.F_GETLK, wish)
        kind, _, _, _, process = struct.unpack("@hhqqi0q", answer)
        return 0 if kind == fcntl.F_UNLCK else int(process) or -1
    except OSError:
        return None
    finally:
        os.close(handle)


def _last_sign(folder: Path) -> float:
    """When the run last wrote one of its files."""
    times = [0.0]
    latest = f"{store.CHECKPOINTS}/{store.LATEST}"
    for name in (METRICS, VALIDATION, STARTS, EVENTS, LEDGER, latest):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def _gap(metrics: Lines) -> float:
    """Seconds between two lines of metrics, usually."""
    times = [line["time"] for line in metrics if "time" in line]
    gaps = [after - before for before, after in pairwise(times)]
    return statistics.median(gaps) if gaps else 0.0


def _trend(metrics: Lines) -> float | None:
    """Slope of a line through the recent losses, or 0 if it is less than two standard errors."""
    steps, losses = column(metrics, "step"), column(metrics, "mean_loss")
    known = np.isfinite(losses)
    if known.sum() < FEW:
        return None
    x, y = steps[known] - steps[known].mean(), losses[known] - losses[known].mean()
    slope = float(x @ y / (x @ x))
    error = float(np.sqrt(((y - slope * x) ** 2).sum() / (len(x) - 2) / (x @ x)))
    return 1000 * slope if abs(slope) > 2 * error else 0.0


def _eta(metrics: Lines, starts: Lines, steps: int) -> float | None:
    """At the pace of the recent lines of the present start."""
    begun = starts[-1].get("time", 0.0) if starts else 0.0
    lines = [line for line in metrics if line.get("time", 0.0) >= begun]
    if len(lines) < 2:
        return None
    first, last = lines[0], lines[-1]
    pace = (last["time"] - first["time"]) / max(1, last["step"] - first["step"])
    return float(pace * (steps - last["step"]))


def _newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint; None if there is none, or while it is being replaced."""
    checkpoints = folder / store.CHECKPOINTS
    for step in store.steps(checkpoints)[:1]:
        with suppress(OSError):
            path = store.place(checkpoints, step)
            sizes = [file.stat().st_size for file in path.iterdir()]
            return Checkpoint(step, max(0.0, time.time() - path.stat().st_mtime), sum(sizes))
    return None
