"""Append-only JSON lines: a run's metrics.jsonl, validation.jsonl and diagnostics.jsonl."""

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from i3dist.errors import UserError


class MetricsLog:
    """One file of metrics, one JSON object a line. Only rank 0 makes one.

    A line is a single write to a file opened for appending, so a killed process can tear nothing
    but its own last line, and the next append then starts on a fresh one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write ``{"step": step, **metrics}``.

        JSON has neither NaN nor infinity: those become null, at any depth, so that the key says
        "was measured, is not a number".

        Raises:
            UserError: the file cannot be written (disk full, no permission).
        """
        self.extend([{"step": step, **metrics}])

    def extend(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write several lines at once.

        Raises:
            UserError: the file cannot be written.
        """
        texts = [json.dumps(_finite_or_null(line), allow_nan=False) for line in lines]
        try:
            append_line(self.path, "\n".join(texts).encode())
        except OSError as error:
            reason = f"cannot write {self.path}: {error.strerror}"
            raise UserError(f"{reason}; see to it, then type the same command again") from None


def append_line(path: Path, line: bytes) -> None:
    """Append a line, or several, by a single write; after a torn one they start on a fresh line.

    Raises:
        OSError: the file cannot be written, or not in full.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        whole = (b"\n" if torn else b"") + line + b"\n"
        if os.write(file, whole) != len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a `MetricsLog` sorted by step; empty where there is no file.

    Torn lines are skipped. Where a continued run wrote a step again, its last line counts.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    by_step = {line["step"]: line for line in map(_parse, text.splitlines()) if line}
    return [by_step[step] for step in sorted(by_step)]


def flatten_chunks(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``by_chunk`` of a validation by one flat entry per chunk index and loss.

    ``{"by_chunk": [{"index": 3, "loss": x, "loss_without_history": y}]}`` becomes
    ``{"chunk_03/loss": x, "chunk_03/loss_without_history": y}``; other entries stay as they are.
    """
    flat = {name: value for name, value in metrics.items() if name != "by_chunk"}
    for chunk in metrics.get("by_chunk", ()):
        for name in ("loss", "loss_without_history", "loss_other_history"):
            if name in chunk:
                flat[f"chunk_{chunk['index']:02d}/{name}"] = chunk[name]
    return flat


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return value


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None
