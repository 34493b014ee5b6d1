"""Whether a checkpoint is whole: its files are those of its manifest, byte by byte."""

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from i3dist.checkpoint import store
from i3dist.checkpoint.format import MANIFEST, STATE, FileDigest, read_manifest, read_state
from i3dist.distributed import collectives
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.job import Job
from i3dist.errors import UserError


def quick_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its file names and sizes, or None; reads no tensors."""
    try:
        listed = read_manifest(checkpoint)
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
        read_state(checkpoint)
    except (OSError, ValidationError):
        return f"{MANIFEST} cannot be read"
    except UserError:
        return f"{STATE} cannot be read"
    for name in sorted(set(sizes) - set(listed) - {MANIFEST}):
        if not name.startswith("."):  # file managers and file systems leave such files behind
            return f"{name} is not in its manifest"
    for name, digest in listed.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != digest.size:
            return f"{name} has {sizes[name]:,} of {digest.size:,} bytes"
    return None


def fault(checkpoint: Path, job: Job) -> str | None:
    """What is wrong with a checkpoint, or None if every file has its SHA-256.

    Every rank calls this, hashes its share of the files, and gets the same answer.
    """
    return first_fault(fault_of_share(checkpoint, job))


def fault_of_share(checkpoint: Path, job: Job) -> str | None:
    """What this rank finds wrong with its share of the files; other ranks are not asked."""
    return quick_fault(checkpoint) or _first_altered(checkpoint, job)


def first_fault(mine: str | None) -> str | None:
    """The first that any rank has found, on every rank; every rank calls this."""
    return next(filter(None, collectives.gather_objects(mine)), None)


def newest_whole(
    folder: Path, job: Job, wanted: Callable[[int], bool] = lambda _: True
) -> Path | None:
    """The newest whole checkpoint whose step is `wanted`; None if there is no such checkpoint.

    Reads all of it, and prints a warning if it refuses newer ones. Every rank calls this and gets
    the same one.

    Raises:
        UserError: on every rank, if there are such checkpoints and none is whole.
    """
    steps = [store.step_of(path) for path in store.candidates(folder)]
    there = [
        step for step in collectives.gather_objects(steps)[0] if step is not None and wanted(step)
    ]
    path, refused = store.first_whole(
        [store.place(folder, step) for step in there], lambda path: fault(path, job)
    )
    if path is not None and refused:
        print_rank_0(f"warning: {'; '.join(refused)}; {path.name} is taken instead")
    return path


def _first_altered(checkpoint: Path, job: Job) -> str | None:
    """The first of this rank's share of the files that differs from the manifest."""
    listed = read_manifest(checkpoint)
    for name in sorted(listed)[job.rank :: job.world_size]:
        try:
            if FileDigest.of(checkpoint / name) != listed[name]:
                return f"{name} is altered"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
