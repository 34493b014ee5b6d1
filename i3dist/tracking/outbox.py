"""What a tracking store has not been sent yet: the run's logs, and how far each was sent.

    RUN/metrics.jsonl ...     the logs, see `LOGS`; nothing else is written per entry
    RUN/tracking.sent.json    the store's id of the run, and how many bytes of each log it has
    RUN/tracking.jsonl        entries of a run that an earlier version of i3dist began

A line is in its log before anyone tries to send it, so neither an outage nor the end of the process
loses one. A line is sent twice only if the process ends between sending it and writing that down. A
run that the store has lost is sent again from the start.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from i3dist.files import regular, write_whole
from i3dist.tracking.metrics_log import DIAGNOSTICS, METRICS, VALIDATION, parse_line

# Logs of a run, and the group of their figures in MLflow, which opens the first in the alphabet.
LOGS = {
    METRICS: "train",
    DIAGNOSTICS: "train_diagnostics",
    VALIDATION: "valid",
}
EARLIER = "tracking.jsonl"
READ_BYTES = 1 << 18
# Group "train_speed".
SPEED = {
    *("tokens_per_second", "step_time", "data_wait", "mfu", "slowest_rank", "slowest_compute"),
    *("fastest_compute", "gpu_clock", "gpu_temperature"),
}
# What others imply; the logs have all.
LEFT_OUT = {"step", "time", "elapsed", "perplexity", "active_latents", "tokens", "by_chunk"}

Entry = dict[str, Any]  # step, time_ms, values by name


class Outbox:
    """The unsent lines of one run. The logs may grow while another thread takes."""

    def __init__(self, folder: Path) -> None:
        self._logs = [folder / name for name in (EARLIER, *LOGS)]
        self._mark = folder / "tracking.sent.json"
        self._sent: dict[str, int] = {}  # bytes, by the log's name

    def clear(self) -> None:
        """Forget what an earlier run of the folder had sent."""
        self._logs[0].unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)

    def begin(self, run_id: str) -> None:
        """Go on where the run `run_id` stopped, or at the first line if it is a new one."""
        self._sent = {}
        with suppress(OSError, ValueError, TypeError, KeyError):
            mark = json.loads(regular(self._mark).read_bytes())
            if mark["run_id"] == run_id:
                sent = mark["bytes"]  # of earlier versions a number
                sent = {EARLIER: sent} if isinstance(sent, int) else sent
                # A log that is shorter now is another file.
                self._sent = {
                    log.name: sent[log.name]
                    for log in self._logs
                    if log.name in sent and 0 <= sent[log.name] <= _size(log)
                }

    def unsent(self) -> tuple[list[Entry], dict[str, int]]:
        """The next entries, and where in each log they end; no entries if all were sent."""
        ends = dict(self._sent)
        for log in self._logs:
            with suppress(FileNotFoundError), regular(log).open("rb") as file:
                while lines := _whole_lines(file, ends.get(log.name, 0)):
                    ends[log.name] = ends.get(log.name, 0) + len(lines)
                    if entries := list(_entries(log.name, lines)):
                        return entries, ends
        return [], ends

    def sent(self, run_id: str, ends: dict[str, int]) -> None:
        """Write down that the run has all entries up to `ends`."""
        if ends != self._sent:
            write_whole(self._mark, json.dumps({"run_id": run_id, "bytes": ends}).encode())
            self._sent = ends

    @property
    def is_empty(self) -> bool:
        """Whether all was sent."""
        return all(_size(log) <= self._sent.get(log.name, 0) for log in self._logs)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _whole_lines(file: BinaryIO, start: int) -> bytes:
    """Lines of a file from a byte on: about `READ_BYTES` of them, or one that is longer."""
    file.seek(start)
    data = file.read(READ_BYTES)
    if b"\n" not in data:
        data += file.readline()
    return data[: data.rfind(b"\n") + 1]


def _entries(name: str, lines: bytes) -> Iterator[Entry]:
    """The entries of a log's lines. Torn lines are skipped."""
    for line in filter(None, map(parse_line, lines.splitlines())):
        if name == EARLIER:
            yield line
        elif isinstance(seconds := line.get("time"), float | int):
            values = mlflow_values(LOGS[name], line)
            yield {"step": line["step"], "time_ms": round(seconds * 1000), "values": values}
        # Earlier versions logged no time; `EARLIER` has their lines.


def mlflow_values(group: str, line: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow gets of a line, by name: ``group/name``, and the gain of history by chunk.

    What is not a finite number is left out: MLflow's stores differ on what they make of it.
    """
    found = {
        f"{'train_speed' if name in SPEED else group}/{name}": value
        for name, value in line.items()
        if name not in LEFT_OUT
    }
    for chunk in line.get("by_chunk") or ():
        loss, without = chunk.get("loss"), chunk.get("loss_without_history")
        if chunk["index"] > 0 and loss is not None and without is not None:
            found[f"valid_history_gain/chunk_{chunk['index']:02d}"] = without - loss
    return {name: float(value) for name, value in found.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    with suppress(OverflowError):  # of an integer beyond all floats
        return isinstance(value, int | float) and math.isfinite(value)
    return False
