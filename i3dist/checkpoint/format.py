"""Checkpoints: staged aside, hashed, published by a rename, verified when read.

    RUN/checkpoints/step-00000100/
        manifest.json                             size and SHA-256 of every other file; written last
        state.json                                step, tokens seen, settings, data fingerprint
        tokenizer.json                            the data's, so that it can be used without the run
        optimizer-00000.safetensors ...           a file per rank: fragments of weights and AdamW
        lanes-00000.safetensors ...               a file per rank: state by lane number

Nothing in them depends on the number of ranks, and nothing is a pickle. Which of them a run
continues from, and which it keeps, is the business of `store`.
"""

import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from i3dist.checkpoint import store
from i3dist.checkpoint.fragment import Fragment
from i3dist.checkpoint.run_state import RunState
from i3dist.config import CheckpointSettings
from i3dist.distributed import collectives
from i3dist.distributed.collectives import Group
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.files import sync, utf8_path, write_whole
from i3dist.model.state import LaneState, RwkvState
from i3dist.optim.optimizers import OPTIMIZERS

MANIFEST = "manifest.json"
STATE = "state.json"
TOKENIZER = "tokenizer.json"  # not in checkpoints of earlier versions
CPU = torch.device("cpu")
LANE_TENSORS = ("latents", *RwkvState._fields)
# What tensors are called: the part of a parameter from an element on, and a lane's row.
PART = r"({})/(0|[1-9][0-9]{{0,17}})/(.+)"  # {}: "weight" or a state of any optimizer
ROW = re.compile(rf"(0|[1-9][0-9]{{0,17}})/({'|'.join(LANE_TENSORS)})")
REMEDY = "restore it, or remove its folder to continue from the checkpoint before it"
# Of one folder: a path would have another folder's files read.
FileName = Annotated[str, Field(pattern=r"\A[a-z0-9][a-z0-9.-]*\z")]


class FileDigest(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class CheckpointManifest(BaseModel):
    """manifest.json: every other file of the checkpoint, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[FileName, FileDigest]


def save(
    folder: Path,
    job: Job,
    state: RunState,
    fragments: Iterable[Fragment],
    lanes: tuple[range, LaneState],
    retention: CheckpointSettings,
    group: Group | None = None,
    tokenizer: bytes | None = None,
) -> Path:
    """Write one checkpoint; every rank calls this and returns when it is published.

    Args:
        folder: RUN/checkpoints.
        job: this rank's place.
        state: what to continue from.
        fragments: this rank's share of weights and optimizer state, on the host.
        lanes: the lane numbers this rank owns, and their state row by row, on the host.
        retention: which checkpoints stay.
        group: what the ranks meet in; None is the group that training uses.
        tokenizer: content of the data's tokenizer.json.

    Raises:
        UserError: on every rank, where any could not write; what was there before is untouched.
    """
    target = store.place(folder, state.step)
    staging = store.staging(target)
    first = job.rank == 0
    try:
        collectives.together(lambda: store.stage(staging) if first else None, group)
        share = _share(job.rank, fragments, lanes)
        digests = _union(collectives.together(lambda: _write_share(staging, share), group))
        described = {STATE: state.model_dump_json(indent=1).encode(), TOKENIZER: tokenizer}
        collectives.together(
            lambda: _finish(staging, target, described, digests) if first else None, group
        )
    except UserError as error:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"checkpoint {target} was not saved: {error}; earlier ones are whole: see to it, then "
            "type the same command again to continue from the newest"
        ) from None
    collectives.together(lambda: _prune(folder, state, retention) if first else None, group)
    return target


def _prune(folder: Path, state: RunState, retention: CheckpointSettings) -> None:
    """Remove what need not stay; what a run that skips bad steps may go back to stays."""
    needed = partial(state.guard.may_roll_back_to, now=state.step)
    store.prune(folder, state.step, retention, needed)


def _share(
    rank: int, fragments: Iterable[Fragment], lanes: tuple[range, LaneState]
) -> dict[str, dict[str, Tensor]]:
    """This rank's part of a checkpoint: file name -> tensors."""
    optimizer = {
        f"{key}/{fragment.start}/{fragment.name}": tensor.contiguous()
        for fragment in fragments
        for key, tensor in fragment.tensors.items()
    }
    numbers, state = lanes
    rows = {
        f"{lane}/{name}": tensor[row].contiguous()
        for name, tensor in state.tensors().items()
        for row, lane in enumerate(numbers)
    }
    return {
        f"optimizer-{rank:05d}.safetensors": optimizer,
        f"lanes-{rank:05d}.safetensors": rows,
    }


def _write_share(staging: Path, share: dict[str, dict[str, Tensor]]) -> dict[str, FileDigest]:
    """Write and sync a rank's files; returns what they must be."""
    for name, tensors in share.items():
        write_tensors(staging / name, tensors)
    return {name: _digest(staging / name) for name in share}


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write and sync a safetensors file; raises `OSError` where it cannot be written."""
    try:
        save_file(tensors, path, metadata or None)
    except SafetensorError as error:  # it wraps the system's error in words of its own
        raise OSError(errno.EIO, str(error), path.name) from None
    sync(path)


def _finish(
    staging: Path,
    target: Path,
    described: Mapping[str, bytes | None],
    digests: dict[str, FileDigest],
) -> None:
    """Write what describes the checkpoint, by file, the manifest last, and publish it."""
    for name, content in described.items():
        if content is not None:
            write_whole(staging / name, content)
            digests = digests | {name: _digest(staging / name)}
    listed = CheckpointManifest(files=dict(sorted(digests.items())))
    write_whole(staging / MANIFEST, listed.model_dump_json(indent=1).encode())
    store.publish(staging, target)


def is_one(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or not, by what is in it, whatever its name."""
    return any((path / name).is_file() for name in (MANIFEST, STATE))


def read_state(checkpoint: Path) -> RunState:
    """Read and validate state.json."""
    try:
        return RunState.model_validate_json((checkpoint / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint / STATE} cannot be read: {reason}") from None


def glance(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint as far as can be seen without reading all of it, or None."""
    try:
        listed = CheckpointManifest.model_validate_json((checkpoint / MANIFEST).read_bytes()).files
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
        read_state(checkpoint)
    except (OSError, ValidationError):
        return f"{MANIFEST} cannot be read"
    except UserError:
        return f"{STATE} cannot be read"
    for name in sorted(set(sizes) - set(listed) - {MANIFEST}):
        if not name.startswith("."):  # what a file manager or file system leaves behind
            return f"{name} is not in its manifest"
    for name, digest in listed.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != digest.size:
            return f"{name} has {sizes[name]:,} of {digest.size:,} bytes"
    return None


def fault(checkpoint: Path, job: Job) -> str | None:
    """What is wrong with a checkpoint, or None where every file has its SHA-256.

    The ranks share the work; all call this and get the same answer.
    """
    wrong = glance(checkpoint) or _altered(checkpoint, job)
    return next(filter(None, collectives.gather_objects(wrong)), None)


def newest_whole(
    folder: Path, job: Job, wanted: Callable[[int], bool] = lambda _: True
) -> store.Found | None:
    """The newest whole checkpoint of a step that is `wanted`; None where there is none at all.

    Reads all of it. Every rank calls this, and all get the same one.

    Raises:
        UserError: on every rank, where there are some and none is whole.
    """
    steps = [store.step_of(path) for path in store.candidates(folder)]
    there = [
        step for step in collectives.gather_objects(steps)[0] if step is not None and wanted(step)
    ]
    return store.newest_whole(
        [store.place(folder, step) for step in there], lambda path: fault(path, job)
    )


def _altered(checkpoint: Path, job: Job) -> str | None:
    """The first of this rank's share of the files that is not what it must be."""
    listed = CheckpointManifest.model_validate_json((checkpoint / MANIFEST).read_bytes()).files
    for name in sorted(listed)[job.rank :: job.world_size]:
        try:
            if _digest(checkpoint / name) != listed[name]:
                return f"{name} is altered"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


class OptimizerReader(Mapping[str, dict[str, Tensor]]):
    """Whole weights and optimizer state of a checkpoint by parameter name, read when asked for."""

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        # (kind, parameter) -> first element and file of each part, in order.
        self._parts: dict[tuple[str, str], list[tuple[int, Path, Any]]] = {}
        states = {state for kind in OPTIMIZERS.values() for state in kind.states}
        form = re.compile(PART.format("|".join(sorted({"weight", *states}))))
        for path in sorted(checkpoint.glob("optimizer-*.safetensors")):
            file = _open(path).__enter__()  # maps the file while we live
            for kind, start, name in _names(path, file, form):
                self._parts.setdefault((kind, name), []).append((int(start), path, file))
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[0])
        self._kinds = ("weight", *sorted({kind for kind, _ in self._parts} - {"weight"}))

    def check(self, sizes: Mapping[str, int]) -> None:
        """See that parameters of so many elements are here, whole; no tensor is read.

        Raises:
            UserError: one is not.
        """
        for kind, (name, size) in product(self._kinds, sizes.items()):
            end = 0
            for start, path, file in self._parts.get((kind, name), []):
                key = f"{kind}/{start}/{name}"
                shape = file.get_slice(key).get_shape()
                if start != end or len(shape) != 1:
                    raise UserError(
                        f"{path}: {key} of shape {shape} where the part from {end:,} should be; "
                        f"{REMEDY}"
                    )
                end += shape[0]
            if end != size:
                raise UserError(
                    f"{self._checkpoint} has {end:,} of {size:,} elements of {kind} {name}; "
                    f"{REMEDY}"
                )

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return {kind: self.one(kind, name) for kind in self._kinds}

    def one(self, kind: str, name: str) -> Tensor:
        """A parameter's "weight" or optimizer state: [elements] fp32."""
        parts = self._parts[kind, name]
        return torch.cat([file.get_tensor(f"{kind}/{start}/{name}") for start, _, file in parts])

    def __iter__(self) -> Iterator[str]:
        return (name for kind, name in self._parts if kind == "weight")

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_lanes(checkpoint: Path, lanes: range, like: LaneState) -> LaneState:
    """State of the given lanes, whichever rank wrote it, on the device and of the shape of `like`.

    Raises:
        UserError: some of it is missing, or has another shape.
    """
    rows: dict[tuple[int, str], Tensor] = {}
    for path in sorted(checkpoint.glob("lanes-*.safetensors")):
        with _open(path, like.latents.device) as file:
            for lane, name in _names(path, file, ROW):
                if int(lane) in lanes:
                    rows[int(lane), name] = file.get_tensor(f"{lane}/{name}")
    for number, (name, wanted) in product(lanes, like.tensors().items()):
        row = rows.get((number, name))
        if row is None:
            raise UserError(f"{checkpoint} has no {name} of lane {number}; {REMEDY}")
        if (row.shape, row.dtype) != (wanted.shape[1:], wanted.dtype):
            raise UserError(
                f"{checkpoint}: {name} of lane {number} is {list(row.shape)} of {row.dtype} where "
                f"{list(wanted.shape[1:])} of {wanted.dtype} should be; {REMEDY}"
            )
    return LaneState.from_tensors(
        {name: torch.stack([rows[lane, name] for lane in lanes]) for name in LANE_TENSORS}
    )


def _names(path: Path, file: Any, form: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    """The names of a file's tensors, taken apart; a `UserError` where one is not of the form."""
    for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
        match = form.fullmatch(key)
        if match is None:
            raise UserError(f"{path}: a checkpoint has no tensor named {key!r}; {REMEDY}")
        yield match.groups()


def _open(path: Path, device: torch.device = CPU) -> Any:
    """Map a file of tensors. What is anything else, a pickle say, is refused and not run."""
    try:
        with utf8_path(path) as name:
            return safe_open(name, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None


def _digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(size=path.stat().st_size, sha256=digest)


def _union(parts: Iterable[dict[str, FileDigest]]) -> dict[str, FileDigest]:
    return {name: digest for part in parts for name, digest in part.items()}
