"""Writing a checkpoint: into a temporary folder, hashed, then published by a rename."""

import errno
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from i3dist.checkpoint import store
from i3dist.checkpoint.format import (
    MANIFEST,
    STATE,
    TOKENIZER,
    CheckpointManifest,
    FileDigest,
    Fragment,
    RunState,
    tensors_of_rank,
)
from i3dist.config import CheckpointSettings
from i3dist.distributed.collectives import Group, on_all_ranks, on_rank_0
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.files import sync, write_whole
from i3dist.model.state import LaneState


def save(
    folder: Path,
    job: Job,
    state: RunState,
    fragments: Iterable[Fragment],
    lanes: tuple[range, LaneState],
    retention: CheckpointSettings,
    tokenizer: bytes,
    group: Group | None = None,
) -> Path:
    """Write one checkpoint; every rank calls this and returns when it is published.

    Args:
        folder: RUN/checkpoints.
        job: this rank's place.
        state: where the run stands.
        fragments: this rank's share of weights and optimizer state, on the host.
        lanes: the lane numbers this rank owns, and their state row by row, on the host.
        retention: which checkpoints to keep.
        tokenizer: content of the data's tokenizer.json.
        group: the group for exchanges between ranks; None is the one that training uses.

    Raises:
        UserError: on every rank, if any could not write; earlier checkpoints are untouched.
    """
    target = store.place(folder, state.step)
    staging = store.staging(target)
    described = {STATE: state.model_dump_json(indent=1).encode(), TOKENIZER: tokenizer}
    try:
        on_rank_0(lambda: store.stage(staging), group)
        tensors = tensors_of_rank(job.rank, fragments, lanes)
        written = on_all_ranks(lambda: write_files(staging, tensors), group)
        digests = {name: digest for files in written for name, digest in files.items()}
        on_rank_0(lambda: _finish(staging, target, described, digests), group)
    except UserError as error:
        if job.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"checkpoint {target} was not saved: {error}; earlier ones are whole: see to it, then "
            "type the same command again to continue from the newest"
        ) from None
    # A run that skips bad steps may yet roll back to some of them.
    needed = partial(state.guard.may_roll_back_to, now=state.step)
    on_rank_0(lambda: store.prune(folder, state.step, retention, needed), group)
    return target


def write_files(folder: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, FileDigest]:
    """Write and sync files of tensors, given by name; returns their digests."""
    for name, tensors in files.items():
        write_tensors(folder / name, tensors)
    return {name: FileDigest.of(folder / name) for name in files}


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write and sync a safetensors file; raises `OSError` if it cannot be written."""
    try:
        save_file(tensors, path, metadata or None)
    except SafetensorError as error:  # it wraps the system's error in its own words
        raise OSError(errno.EIO, str(error), path.name) from None
    sync(path)


def _finish(
    staging: Path, target: Path, described: dict[str, bytes], digests: dict[str, FileDigest]
) -> None:
    """Write the files `described`, then the manifest, and publish the checkpoint."""
    for name, content in described.items():
        write_whole(staging / name, content)
        digests = digests | {name: FileDigest.of(staging / name)}
    listed = CheckpointManifest(files=dict(sorted(digests.items())))
    write_whole(staging / MANIFEST, listed.model_dump_json(indent=1).encode())
    store.publish(staging, target)
