"""What a run's folder says of the run: read once, also while the run goes on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.files import regular
from i3dist.report.settings import settings_of
from i3dist.tracking.metrics_log import (
    DIAGNOSTICS,
    METRICS,
    SAMPLES,
    STARTS,
    VALIDATION,
    in_order,
    read_lines,
    read_metrics,
)
from i3dist.tracking.series import Lines, column
from i3dist.training.ledger import LEDGER, Entry, parse

# What a report lacks where a run has no such file (or it is empty).
HOLDS = {
    METRICS: "training curves",
    VALIDATION: "held-out losses and gains of history",
    DIAGNOSTICS: "attention to history",
    LEDGER: "skipped steps",
    SAMPLES: "samples of text",
    STARTS: "commit, device and data",
}


@dataclass(frozen=True)
class Start:
    """A time at which the run was started."""

    step: int
    """The checkpoint's step; where starts were not recorded, that of the last line before."""
    time: float | None
    """Seconds since 1970."""
    facts: Mapping[str, str]
    """What was recorded: device, ranks, commit, data, versions."""


@dataclass(frozen=True)
class Run:
    """One run. Logs are sorted by step; what has no file is empty."""

    folder: Path
    settings: Settings
    metrics: Lines
    validation: Lines
    diagnostics: Lines
    samples: Lines
    ledger: Sequence[Entry]
    starts: Sequence[Start]
    seconds: float | None
    """In training, over all starts; None if the logs do not say."""
    missing: Sequence[str]
    """Names of the logs that are not there, or empty."""

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run's folder; lines that are torn are left out.

        Raises:
            UserError: it is not a run's, or cannot be read.
        """
        settings = settings_of(folder)
        try:
            written = read_lines(folder / METRICS)
            logs = {name: read_metrics(folder / name) for name in (VALIDATION, DIAGNOSTICS)}
            samples = read_metrics(folder / SAMPLES)
            recorded = [_start(line) for line in read_lines(folder / STARTS)]
            ledger = _ledger(folder / LEDGER)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
        metrics = in_order(written)
        found = {METRICS: metrics, SAMPLES: samples, LEDGER: ledger, STARTS: recorded, **logs}
        return cls(
            folder=folder,
            settings=settings,
            metrics=metrics,
            validation=logs[VALIDATION],
            diagnostics=logs[DIAGNOSTICS],
            samples=samples,
            ledger=ledger,
            starts=recorded or list(_starts_in(written)),
            seconds=_seconds(written),
            missing=[name for name in HOLDS if not found[name]],
        )

    @property
    def step(self) -> int:
        """The last step of any log."""
        logs = (self.metrics, self.validation, self.diagnostics)
        steps = [lines[-1]["step"] for lines in logs if lines]
        return max(steps + [entry.step for entry in self.ledger[-1:]], default=0)

    @property
    def finished(self) -> bool:
        """Whether the last step is logged."""
        return self.step == self.settings.train.steps

    @property
    def facts(self) -> Mapping[str, str]:
        """What the last start recorded."""
        return self.starts[-1].facts if self.starts else {}

    def tokens(self, steps: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens that the run had seen after each of these steps: [N] -> [N] fp64.

        Interpolated between the lines of metrics, as other logs count steps only; after the last
        line, and without any, steps have as many tokens as their lanes hold.
        """
        seen = column(self.metrics, "tokens_seen")
        known = np.isfinite(seen)
        at = np.concatenate([[0.0], column(self.metrics, "step")[known]])
        tokens = np.concatenate([[0.0], seen[known]])
        wanted = np.asarray(steps, float)
        beyond = np.maximum(wanted - at[-1], 0) * self._tokens_per_step
        return np.interp(wanted, at, tokens) + beyond

    @cached_property
    def parameters(self) -> int | None:
        """Number of parameters; None if the model has layers that are not known here."""
        if "parameters" in self.facts:
            return int(self.facts["parameters"])
        from i3dist.training.summary import count_parameters  # with torch, which takes seconds

        try:
            return sum(count_parameters(self.settings).values())
        except UserError:
            return None

    @cached_property
    def _tokens_per_step(self) -> int:
        train, length = self.settings.train, self.settings.model.chunk_length
        lanes = 0 if train.lanes == "auto" else train.lanes
        return lanes * train.accumulation * train.window_chunks * length


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with each run's value.

    Of one run: those that differ from their defaults, with the default behind it.
    """
    trees = [run.settings for run in runs]
    flat = [tree.flat() for tree in (trees if len(runs) > 1 else [*trees, Settings()])]
    values = {name: [tree[name] for tree in flat] for name in flat[0]}
    return {name: row for name, row in values.items() if any(x != row[0] for x in row)}


def names(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: as many last parts of its path as tell it from the others.

    Raises:
        UserError: a run is named twice.
    """
    paths = [run.folder.resolve() for run in runs]
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        short = ["/".join(path.parts[-count:]) for path in paths]
        if len({*short}) == len(short):
            return short
    raise UserError(f"{runs[0].folder} and others: a run is named twice; name each once")


def _start(line: Mapping[str, Any]) -> Start:
    facts = {name: str(value) for name, value in line.items() if name not in ("step", "time")}
    return Start(line["step"], line.get("time"), facts)


def _starts_in(written: Lines) -> Iterator[Start]:
    """The starts that metrics show, in the order in which they were written."""
    before = None
    for line in written:
        if before is None or _is_restart(before, line):
            yield Start(0 if before is None else before["step"], line.get("time"), {})
        before = line


def _is_restart(before: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """Whether another process wrote this line of metrics: time or steps run back."""
    elapsed, later = before.get("elapsed"), line.get("elapsed")
    back = elapsed is not None and later is not None and later < elapsed
    return back or line["step"] <= before["step"]


def _seconds(written: Lines) -> float | None:
    """Seconds of all processes: a process's last line has all of its own."""
    last = [
        line
        for line, then in zip(written, [*written[1:], None], strict=False)
        if not then or _is_restart(line, then)
    ]
    elapsed = column(last, "elapsed")
    return float(np.nansum(elapsed)) if np.isfinite(elapsed).any() else None


def _ledger(path: Path) -> list[Entry]:
    """The entries of a ledger that are whole."""
    lines = regular(path).read_bytes().splitlines() if path.exists() else []
    return [entry for entry in map(parse, lines) if entry]
