"""The folder of a run's checkpoints: which there are, which is the newest whole one, which stay.

    RUN/checkpoints/latest                    name of the newest checkpoint
    RUN/checkpoints/step-00000100/            a checkpoint, complete since it has this name
    RUN/checkpoints/.step-00000200.partial/   one that is being written, or removed

What is inside a checkpoint is told by `checkpoint`.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from i3dist.config import CheckpointSettings
from i3dist.errors import UserError
from i3dist.files import PARTIAL, remove, sync, write_whole

CHECKPOINTS = "checkpoints"  # the folder's name in the run's
LATEST = "latest"


class Found(NamedTuple):
    """A whole checkpoint, and what is wrong with those that would have been better."""

    path: Path
    refused: tuple[str, ...]

    def line(self) -> str:
        """What was refused and what is taken instead, in one line."""
        return f"warning: {'; '.join(self.refused)}; {self.path.name} is taken instead"


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def staging(target: Path) -> Path:
    """Where a checkpoint is written, or removed."""
    return target.with_name(f".{target.name}{PARTIAL}")


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by its name; None for anything else."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there are, newest first."""
    found = (step_of(path) for path in folder.glob("step-*"))
    return sorted((step for step in found if step is not None), reverse=True)


def candidates(folder: Path) -> list[Path]:
    """What a run may continue from, best first: what `latest` names, then what came before it.

    Where `latest` is not there or says nothing, whatever there is.

    Raises:
        UserError: the folder is a link to nothing: a disk that is not there, say.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{folder} is a link to {folder.readlink()}, which is not there: bring it back, or "
            "start over with --fresh"
        )
    try:
        named = step_of(folder / (folder / LATEST).read_text("utf-8", "replace").strip())
    except OSError:
        named = None
    there = steps(folder)
    if named is not None:
        there = [named, *(step for step in there if step < named)]
    return [place(folder, step) for step in there]


def newest_whole(candidates: Sequence[Path], fault: Callable[[Path], str | None]) -> Found | None:
    """The first whole candidate; None where there are no candidates at all.

    Raises:
        UserError: there are some, and `fault` finds something in each.
    """
    refused: list[str] = []
    for path in candidates:
        wrong = fault(path)
        if wrong is None:
            return Found(path, tuple(refused))
        refused.append(f"checkpoint {path} is refused: {wrong}")
    if refused:
        raise UserError(
            f"{'; '.join(refused)}; no whole one is left: restore one, or start over with --fresh"
        )
    return None


def stage(staging: Path) -> None:
    """Make an empty folder to write a checkpoint in."""
    remove(staging)
    staging.mkdir(parents=True)
    sync(staging.parent.parent)  # the first checkpoint's folder of checkpoints is new


def publish(staging: Path, target: Path) -> None:
    """Rename a finished checkpoint, all of it synced, into place and point `latest` at it.

    Each rename comes after what it names is on disk, so that a power cut leaves the old or the new.
    """
    # Of a future that was given up when the run continued from before it.
    if os.path.lexists(target):
        _remove(target)
    os.replace(staging, target)
    sync(target.parent)
    write_whole(target.parent / LATEST, target.name.encode())


def prune(
    folder: Path, newest: int, retention: CheckpointSettings, needed: Callable[[int], bool]
) -> None:
    """Remove the checkpoints that need not stay."""
    there = steps(folder)
    for step in set(there) - kept(there, newest, retention, needed):
        _remove(place(folder, step))


def kept(
    there: Iterable[int],
    newest: int,
    retention: CheckpointSettings,
    needed: Callable[[int], bool] = lambda _: True,
) -> set[int]:
    """Steps whose checkpoints stay when the one of step `newest` has been written.

    The newest `retention.keep` of all, and as many of those that are `needed`, so that others do
    not push them out. Later ones belong to a future that was given up when the run continued from
    before them.
    """
    past = sorted(step for step in there if step <= newest)
    every = retention.keep_every
    stay = {step for step in past if every and step % every == 0}
    return stay.union(past[-retention.keep :], list(filter(needed, past))[-retention.keep :])


def _remove(path: Path) -> None:
    """Take a checkpoint's name from it first, so that half of one is never taken for a whole.

    Of a link only the link is removed: what it leads to may be somebody else's.
    """
    aside = path.with_name(f".{path.name}.old{PARTIAL}")
    remove(aside)
    os.replace(path, aside)
    remove(aside)
