"""The run's ledger, RUN/ledger.jsonl: one line for every optimizer step, by which a run is checked.

    {"step": 7, "samples": "5f...", "lanes": "c1...", "loss": 5.1, "gradient_norm": 0.3,
     "skipped": null}

`samples` is a hash of the (shard, chunk) that each lane read, `lanes` of what each lane then
carries on. Both are by lane, so they do not depend on the number of ranks. Steps after the
checkpoint that a run continues from are cut off and written again. `ledger_writer` writes it.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from i3dist.checkpoint import store
from i3dist.data.schedule import LaneSchedule
from i3dist.errors import UserError

LEDGER = "ledger.jsonl"


class Entry(BaseModel):
    """One line of a ledger; figures that were not finite are None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    samples: str
    lanes: str
    loss: float | None
    gradient_norm: float | None
    skipped: str | None


def read(run: Path) -> list[Entry]:
    """Every line of a run's ledger.

    Raises:
        UserError: there is none, or a line is torn or no entry.
    """
    path = run / LEDGER
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name a run's folder") from None
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        entry = parse(line)
        if entry is None:
            what = "is no entry" if line.endswith("\n") else "is torn"
            after = f"after step {entries[-1].step}" if entries else "at its start"
            raise UserError(f"{path} is broken {after}: line {number} {what}")
        entries.append(entry)
    return entries


def parse(line: str | bytes) -> Entry | None:
    """The entry in a line, or None where it holds none."""
    try:
        return Entry.model_validate_json(line)
    except ValidationError:
        return None


def first_break(entries: Sequence[Entry]) -> str | None:
    """Where steps do not follow on each other from 1, or None."""
    if not entries:
        return "it holds no step"
    for wanted, entry in enumerate(entries, start=1):
        if entry.step < wanted:
            return f"step {entry.step} comes again after step {wanted - 1}"
        if entry.step > wanted:
            return f"step {wanted} is missing, step {entry.step} stands in its place"
    return None


def unsaved(entries: Sequence[Entry], run: Path) -> str | None:
    """Whether the run's checkpoint is of a step that the ledger does not reach, or None."""
    for path in store.candidates(run / "checkpoints")[:1]:
        step = store.step_of(path) or 0
        if step > entries[-1].step:
            return f"it ends at step {entries[-1].step}, but the checkpoint is of step {step}"
    return None


def first_misread(
    entries: Sequence[Entry], schedule: LaneSchedule, accumulation: int
) -> str | None:
    """The first step whose samples are not those that the schedule gives it, or None."""
    for entry in entries:
        if entry.samples != samples_hash(schedule, entry.step * accumulation, accumulation):
            return f"step {entry.step} read other samples than the schedule gives it"
    return None


def first_difference(
    one: Sequence[Entry], other: Sequence[Entry], tolerance: float | None = None
) -> str | None:
    """The first step in which two unbroken ledgers differ, and in what, or None.

    Args:
        one: a ledger.
        other: another.
        tolerance: None compares every bit; else losses and norms may differ by this share of the
            larger, and the lanes' state, which then differs too, is left out.
    """
    for step, (a, b) in enumerate(zip_longest(one, other), start=1):
        if a is None or b is None:
            return f"step {step} is only in the {'second' if a is None else 'first'}"
        for field in _differing(a, b, tolerance):
            values = f"{getattr(a, field)} and {getattr(b, field)}"
            return f"step {step} differs in {field}: {values}"
    return None


def _differing(a: Entry, b: Entry, tolerance: float | None) -> Iterator[str]:
    for field in Entry.model_fields:
        one, other = getattr(a, field), getattr(b, field)
        if tolerance is not None and field == "lanes":
            continue
        figures = isinstance(one, float) and isinstance(other, float)
        if tolerance is not None and figures and math.isclose(one, other, rel_tol=tolerance):
            continue
        if one != other:
            yield field


def samples_hash(schedule: LaneSchedule, windows: int, accumulation: int) -> str:
    """Hash of the (shard, chunk) that every lane reads in a step, lane by lane.

    Args:
        schedule: what the windows are of.
        windows: how many have been read after the step.
        accumulation: how many of them, the last ones, in the step.
    """
    step = range(windows - accumulation, windows)
    places = [schedule.chunks(index, lane) for index in step for lane in range(schedule.lanes)]
    return digest(json.dumps(places, separators=(",", ":")))


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
