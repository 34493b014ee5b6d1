"""RUN/metrics.prom: a run's newest figures in Prometheus' text format, for a node exporter.

Each figure of a log is a gauge `i3dist_NAME{run="..."}`; those of validations and diagnoses are
`i3dist_validation_NAME` and `i3dist_diagnostics_NAME`. The format is that of
https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
"""

import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from i3dist.cli.paths import as_unicode
from i3dist.files import PARTIAL, regular
from i3dist.tracking.metrics_log import METRICS, STARTS, read_lines

FILE = "metrics.prom"
RUNNING = "i3dist_running"
HELP = {
    RUNNING: "1 while the run trains, 0 once it has ended, stopped or failed.",
    "i3dist_time_seconds": "When these figures were written, in seconds since 1970.",
    "i3dist_starts": "How often the run was started.",
    "i3dist_checkpoint_time_seconds": "When the newest checkpoint was written.",
}


class PrometheusFile:
    """Keeps the file of one run; only rank 0 makes one. What fails here never ends a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gauges: dict[str, float] = {}

    def update(self, log: str, step: int, figures: Mapping[str, Any]) -> None:
        """Write the numbers among the newest figures of a log, such as metrics.jsonl."""
        prefix = "i3dist" if log == METRICS else f"i3dist_{Path(log).stem}"
        self._gauges |= {
            f"{prefix}_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}": float(value)
            for name, value in {"step": step, **figures}.items()
            if isinstance(value, int | float)
        }
        with suppress(OSError):
            write(self._folder, {RUNNING: 1.0, **self._gauges, **self._seen()})

    def _seen(self) -> dict[str, float]:
        """What other files of the run say."""
        seen = {"i3dist_time_seconds": time.time()}
        seen["i3dist_starts"] = float(len(read_lines(self._folder / STARTS)))
        with suppress(OSError):
            latest = (self._folder / "checkpoints" / "latest").stat()
            seen["i3dist_checkpoint_time_seconds"] = latest.st_mtime
        return seen


def write(folder: Path, gauges: Mapping[str, float]) -> None:
    """Replace the file as a whole; it need not survive a power cut, so nothing is synced."""
    run = as_unicode(folder.resolve()).replace("\\", r"\\").replace('"', r"\"")
    label = run.replace("\n", r"\n")
    lines = []
    for name, value in gauges.items():
        if name in HELP:
            lines.append(f"# HELP {name} {HELP[name]}\n")
        lines.append(f'# TYPE {name} gauge\n{name}{{run="{label}"}} {_number(value)}\n')
    partial = folder / f".{FILE}{PARTIAL}"
    partial.write_text("".join(lines), "utf-8")
    partial.replace(folder / FILE)


def mark_stopped(folder: Path) -> None:
    """Say in the file, if there is one, that the run does not train any more.

    One byte is replaced in place, because the run may have ended for a full disk.
    """
    with suppress(OSError), regular(folder / FILE).open("r+b", buffering=0) as file:
        text = file.read()  # a name may have any ends of lines
        running = re.search(rb"^%b\{.*\} (1)\.0$" % RUNNING.encode(), text, re.MULTILINE)
        if running is not None:
            os.pwrite(file.fileno(), b"0", running.start(1))


def _number(value: float) -> str:
    """As the format writes numbers that are not finite."""
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"
