"""The folder of a run's checkpoints: which there are, which to take, which to keep.

    RUN/checkpoints/latest                    name of the newest checkpoint
    RUN/checkpoints/step-00000100/            a checkpoint; what has such a name is complete
    RUN/checkpoints/.step-00000200.partial/   one that is being written or removed

`format` shows what is in a checkpoint.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from i3dist.config import CheckpointSettings
from i3dist.errors import UserError
from i3dist.files import PARTIAL, regular, remove, sync, write_whole

CHECKPOINTS, SETTINGS, LOCK = "checkpoints", "settings.yaml", ".lock"  # names in the run's folder
LATEST = "latest"


def place(folder: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def staging(target: Path) -> Path:
    """The path at which a checkpoint is written, before it is published."""
    return target.with_name(f".{target.name}{PARTIAL}")


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by its name; None for anything else."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def steps(folder: Path) -> list[int]:
    """Steps of all checkpoints in the folder, newest first."""
    found = (step_of(path) for path in folder.glob("step-*"))
    return sorted((step for step in found if step is not None), reverse=True)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that a run may continue from: what `latest` names, then earlier ones.

    If `latest` is missing or names nothing, all checkpoints, newest first.

    Raises:
        UserError: the folder is a link to nothing (to a disk that is not mounted, for example).
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{folder} is a link to {folder.readlink()}, which is not there: bring it back, or "
            "start over with --fresh"
        )
    try:
        named = step_of(folder / regular(folder / LATEST).read_text("utf-8", "replace").strip())
    except OSError:
        named = None
    there = steps(folder)
    if named is not None:
        there = [named, *(step for step in there if step < named)]
    return [place(folder, step) for step in there]


def first_whole(
    candidates: Iterable[Path], fault: Callable[[Path], str | None]
) -> tuple[Path | None, list[str]]:
    """The first candidate without a `fault`, and what is wrong with those before it.

    None if there are no candidates.

    Raises:
        UserError: there are candidates, and each has a fault.
    """
    refused: list[str] = []
    for path in candidates:
        wrong = fault(path)
        if wrong is None:
            return path, refused
        refused.append(f"checkpoint {path} is refused: {wrong}")
    if refused:
        raise UserError(
            f"{'; '.join(refused)}; no whole one is left: restore one, or start over with --fresh"
        )
    return None, []


def stage(staging: Path) -> None:
    """Create an empty folder to write a checkpoint in."""
    remove(staging)
    staging.mkdir(parents=True)
    sync(staging.parent.parent)  # RUN/checkpoints may be new


def publish(staging: Path, target: Path) -> None:
    """Rename a finished, synced checkpoint into place, and point `latest` at it.

    Whatever a name leads to is on disk before the name, so a power cut leaves the old or the new.
    """
    # It may exist from a future that was given up: the run continued from an earlier step.
    if os.path.lexists(target):
        _remove(target)
    os.replace(staging, target)
    sync(target.parent)
    write_whole(target.parent / LATEST, target.name.encode())


def prune(
    folder: Path, newest: int, retention: CheckpointSettings, needed: Callable[[int], bool]
) -> None:
    """Remove all checkpoints but those that `kept` names."""
    there = steps(folder)
    for step in set(there) - kept(there, newest, retention, needed):
        _remove(place(folder, step))


def kept(
    there: Iterable[int],
    newest: int,
    retention: CheckpointSettings,
    needed: Callable[[int], bool] = lambda _: True,
) -> set[int]:
    """Steps whose checkpoints are kept after the one of step `newest` has been written.

    These are the newest `retention.keep`, the newest `retention.keep` of those that are `needed`,
    and the multiples of `retention.keep_every`. Later steps than `newest` are from a future that
    was given up: the run continued from before them.
    """
    past = sorted(step for step in there if step <= newest)
    every = retention.keep_every
    stay = {step for step in past if every and step % every == 0}
    return stay.union(past[-retention.keep :], list(filter(needed, past))[-retention.keep :])


def _remove(path: Path) -> None:
    """Rename a checkpoint, then remove it, so that half of one never has a checkpoint's name.

    Of a link only the link is removed: its target may be somebody else's.
    """
    aside = path.with_name(f".{path.name}.old{PARTIAL}")
    remove(aside)
    os.replace(path, aside)
    remove(aside)
