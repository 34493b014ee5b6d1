"""Append-only JSON lines: a run's metrics.jsonl, validation.jsonl and others."""

import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from i3dist.errors import UserError
from i3dist.files import regular, regular_or_new

# Names of a run's logs.
METRICS, VALIDATION, DIAGNOSTICS = "metrics.jsonl", "validation.jsonl", "diagnostics.jsonl"
SAMPLES = "samples.jsonl"  # texts of each validation
STARTS = "starts.jsonl"  # a line for every time that the run was started
EVENTS = "events.jsonl"  # when it began to train, waited for data for long, and how it ended


class MetricsLog:
    """One file of metrics, one JSON object a line. Only rank 0 makes one.

    A line is a single write to a file opened for appending. So a killed process can tear only its
    own last line, and the next append starts on a fresh one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write ``{"step": step, **metrics, "time": seconds since 1970}``.

        JSON has neither NaN nor infinity: at any depth they become null, which says "measured, but
        not a number".

        Raises:
            UserError: the file cannot be written (disk full, no permission).
        """
        self.extend([{"step": step, **metrics, "time": int(time.time() * 1000) / 1000}])

    def extend(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write several lines at once.

        Raises:
            UserError: the file cannot be written.
        """
        texts = [json.dumps(_finite_or_null(line), allow_nan=False) for line in lines]
        try:
            _append(self.path, "\n".join(texts).encode())
        except OSError as error:
            reason = f"cannot write {self.path}: {error.strerror}"
            raise UserError(f"{reason}; fix that, then run the same command again") from None


def _append(path: Path, lines: bytes) -> None:
    """Append lines by a single write; after a torn line they start on a fresh one."""
    with regular_or_new(path).open("a+b", buffering=0) as file:
        size = file.tell()
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        whole = (b"\n" if torn else b"") + lines + b"\n"
        if file.write(whole) != len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a `MetricsLog` sorted by step; empty if there is no file.

    Torn lines are skipped. If a continued run wrote a step again, its last line counts.
    """
    return in_order(read_lines(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a `MetricsLog` as they were written, but torn ones; empty if there is no file."""
    text = regular(path).read_bytes() if path.exists() else b""
    return [line for line in map(parse_line, text.splitlines()) if line]


def in_order(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each step, sorted by step."""
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line of a log, or None if it is torn or has no step."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _finite_or_null(line: Mapping[str, Any]) -> Any:
    # Python writes NaN, Infinity and -Infinity, which JSON has not; its reader hands them over.
    return json.loads(json.dumps(line), parse_constant=lambda _: None)
