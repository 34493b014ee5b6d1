"""The run's ledger, RUN/ledger.jsonl: one line per optimizer step, to check and compare runs.

    {"step": 7, "samples": "5f...", "lanes": "c1...", "loss": 5.1, "gradient_norm": 0.3,
     "skipped": null}

`samples` is a hash of the (shard, chunk) that each lane read, and `lanes` is a hash of the state
that each lane then carries on. Both are by lane, so they do not depend on the number of ranks. A
continued run cuts off the steps after its checkpoint and writes them again. `ledger_writer` writes
the file.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from i3dist.checkpoint import store
from i3dist.data.schedule import LaneSchedule
from i3dist.errors import UserError
from i3dist.files import regular

LEDGER = "ledger.jsonl"


class Entry(BaseModel):
    """One line of a ledger; a figure that was not finite is None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    samples: str
    lanes: str
    loss: float | None
    gradient_norm: float | None
    skipped: str | None


def read(run: Path) -> list[Entry]:
    """All entries of a run's ledger.

    Raises:
        UserError: it cannot be read, or a line is torn or not an entry.
    """
    path = run / LEDGER
    try:
        lines = regular(path).read_text("utf-8", "replace").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name a run's folder") from None
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        entry = parse(line)
        if entry is None:
            what = "is not an entry" if line.endswith("\n") else "is torn"
            after = f"after step {entries[-1].step}" if entries else "at its start"
            raise UserError(f"{path} is broken {after}: line {number} {what}")
        entries.append(entry)
    return entries


def parse(line: str | bytes) -> Entry | None:
    """The entry in a line, or None if there is none."""
    with suppress(ValidationError):
        return Entry.model_validate_json(line)
    return None


def first_break(entries: Sequence[Entry]) -> str | None:
    """The first place where steps do not count up from 1, or None."""
    if not entries:
        return "it holds no step"
    for wanted, entry in enumerate(entries, start=1):
        if entry.step < wanted:
            return f"step {entry.step} comes again after step {wanted - 1}"
        if entry.step > wanted:
            return f"step {wanted} is missing, step {entry.step} stands in its place"
    return None


def unsaved(entries: Sequence[Entry], run: Path) -> str | None:
    """What is wrong if the run's newest checkpoint is of a later step than the ledger, or None."""
    for path in store.candidates(run / store.CHECKPOINTS)[:1]:
        step = store.step_of(path) or 0
        if step > entries[-1].step:
            return f"it ends at step {entries[-1].step}, but the checkpoint is of step {step}"
    return None


def first_misread(
    entries: Sequence[Entry], schedule: LaneSchedule, accumulation: int
) -> str | None:
    """The first step that read other samples than the schedule gives it, or None."""
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
        tolerance: relative tolerance for losses and norms; the lanes' state is then not compared,
            as it differs too. None compares every bit.
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
        schedule: of the lanes.
        windows: how many windows have been read after the step.
        accumulation: how many windows the step reads, the last of these.
    """
    step = range(windows - accumulation, windows)
    places = [schedule.chunks(index, lane) for index in step for lane in range(schedule.lanes)]
    return digest(json.dumps(places, separators=(",", ":")))


def digest(text: str) -> str:
    """A short hash of `text`."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
