"""Writing a checkpoint: into a temporary folder, hashed, then published by a rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
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
from i3dist.files import write_whole
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
            f"checkpoint {target} was not saved: {error}; earlier ones are whole: fix that, then "
            "run the same command again to continue from the newest"
        ) from None
    # A run that skips bad steps may yet roll back to some of them.
    needed = partial(state.guard.may_roll_back_to, now=state.step)
    on_rank_0(lambda: store.prune(folder, state.step, retention, needed), group)
    return target


def write_files(folder: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, FileDigest]:
    """Write and sync files of tensors in a folder; returns their digests by file name.

    Args:
        folder: it exists.
        files: file name -> tensor name -> tensor of any shape and dtype, contiguous, on the host.

    Raises:
        OSError: one cannot be written.
    """
    return {name: write_tensors(folder / name, tensors) for name, tensors in files.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> FileDigest:
    """Write and sync a safetensors file, and hash the same memory in a thread meanwhile.

    Bytes and mode are those of `safetensors.torch.save_file`, whose files would have to be read
    again to be hashed.

    Args:
        path: the file; one that exists is replaced.
        tensors: of any shape and dtype, contiguous, on the host.
        metadata: further strings in the header.

    Raises:
        OSError: it cannot be written.
    """
    content = _content(tensors, metadata)
    with ThreadPoolExecutor(1, "hash") as thread:
        digest = thread.submit(_sha256, content)
        try:
            with open(path, "wb", opener=partial(os.open, mode=0o600)) as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # that of a write does not name the file
            raise OSError(error.errno, error.strerror, path.name) from None
    return FileDigest(size=sum(map(len, content)), sha256=digest.result())


def _content(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """A safetensors file's parts in order; those of tensors are their memory, not copied.

    The library orders the tensors and names their types in the header of a file of empty ones;
    shapes and offsets are filled in here (https://github.com/huggingface/safetensors#format).
    """
    empty = {name: tensor.new_empty(0) for name, tensor in tensors.items()}
    header = json.loads(safetensors.torch.save(empty, metadata or None)[8:])
    parts: list[bytes | memoryview] = []
    end = 0
    for name in filter(tensors.__contains__, header):
        tensor = tensors[name]
        parts.append(tensor.detach().view(-1).view(torch.uint8).numpy().data)
        start, end = end, end + len(parts[-1])
        header[name] |= {"shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def _sha256(content: Iterable[bytes | memoryview]) -> str:
    """Hash what `content` joins to, as hexadecimal digits."""
    hashed = hashlib.sha256()
    for part in content:
        hashed.update(part)
    return hashed.hexdigest()


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
