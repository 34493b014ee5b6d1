"""Checkpoints: staged aside, hashed, published by a rename, verified when read.

    RUN/checkpoints/latest                        name of the newest checkpoint
    RUN/checkpoints/step-00000100/
        manifest.json                             size and SHA-256 of every other file; written last
        state.json                                step, tokens seen, settings, data fingerprint
        optimizer-00000.safetensors ...           a file per rank: fragments of weights and AdamW
        lanes-00000.safetensors ...               a file per rank: state by lane number

Nothing in them depends on the number of ranks, and nothing is a pickle.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from i3dist import dist
from i3dist.config import Settings
from i3dist.engine import ADAM_STATES, Fragment
from i3dist.errors import UserError
from i3dist.files import sync, write_whole
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.tokenizer import Tokenizer

LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"


class RunState(BaseModel):
    """Where a run stands, as saved in a checkpoint's state.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Optimizer steps taken."""
    windows: int
    """Windows of the job that have been read; the next one has this index."""
    tokens_seen: int
    """Tokens that were an input, padding and idle lanes left out."""
    settings: dict[str, Any]
    """The run's resolved settings."""
    data: str
    """Fingerprint of the data, both splits."""
    engine: dict[str, Any]
    """What of the engine's file decides numbers."""


class FileDigest(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class CheckpointManifest(BaseModel):
    """manifest.json: every other file of the checkpoint, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, FileDigest]


def save(
    folder: Path,
    job: dist.Job,
    state: RunState,
    fragments: Iterable[Fragment],
    lanes: tuple[range, LaneState],
    keep: int,
) -> Path:
    """Write one checkpoint; every rank calls this and returns when it is published.

    Args:
        folder: RUN/checkpoints.
        job: this rank's place.
        state: what to continue from.
        fragments: this rank's share of weights and optimizer state.
        lanes: the lane numbers this rank owns, and their state row by row.
        keep: number of newest checkpoints that stay.
    """
    name = f"step-{state.step:08d}"
    staging = folder / f".{name}.partial"
    if job.rank == 0:
        for leftover in folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        staging.mkdir(parents=True)
    dist.barrier()
    written = _write_share(staging, job.rank, fragments, lanes)
    digests = _union({path.name: _digest(path) for path in written})
    if job.rank == 0:
        write_whole(staging / STATE, state.model_dump_json(indent=1).encode())
        digests[STATE] = _digest(staging / STATE)
        listed = CheckpointManifest(files=dict(sorted(digests.items())))
        write_whole(staging / MANIFEST, listed.model_dump_json(indent=1).encode())
        _publish(folder, staging, name, keep)
    dist.barrier()
    return folder / name


def _write_share(
    staging: Path, rank: int, fragments: Iterable[Fragment], lanes: tuple[range, LaneState]
) -> list[Path]:
    """Write this rank's two files."""
    optimizer = {
        f"{key}/{fragment.start}/{fragment.name}": tensor.cpu().contiguous()
        for fragment in fragments
        for key, tensor in fragment.tensors.items()
    }
    numbers, state = lanes
    rows = {
        f"{lane}/{name}": tensor[row].cpu().contiguous()
        for name, tensor in state.tensors().items()
        for row, lane in enumerate(numbers)
    }
    paths = [staging / f"{kind}-{rank:05d}.safetensors" for kind in ("optimizer", "lanes")]
    for path, tensors in zip(paths, (optimizer, rows), strict=True):
        try:
            save_file(tensors, path)
            sync(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write checkpoint {path}: {error}") from None
    return paths


def _publish(folder: Path, staging: Path, name: str, keep: int) -> None:
    """Rename the finished checkpoint into place, point `latest` at it, drop the oldest."""
    target = folder / name
    if target.exists():  # a run that was continued from before this step
        shutil.rmtree(target)
    os.replace(staging, target)
    write_whole(folder / LATEST, name.encode())
    sync(folder)
    older: list[Path] = []
    newer: list[Path] = []
    for path in sorted(folder.glob("step-*")):
        (older if path.name <= name else newer).append(path)
    # Newer ones belong to a future that was given up when the run continued from before it.
    for path in older[:-keep] + newer:
        shutil.rmtree(path)


def find_latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where the run has none.

    Raises:
        UserError: `latest` names a checkpoint that is not there.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not (folder / name / MANIFEST).is_file():
        raise UserError(
            f"{pointer} names {name!r}, which is no complete checkpoint; "
            "write the name of a whole one into it, or start over with --fresh"
        )
    return folder / name


def read_state(checkpoint: Path) -> RunState:
    """Read and validate state.json."""
    try:
        return RunState.model_validate_json((checkpoint / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint / STATE} cannot be read: {reason}") from None


def verify(checkpoint: Path, job: dist.Job) -> None:
    """Compare every file with the manifest's SHA-256; the ranks share the work and agree.

    Raises:
        UserError: on every rank, naming the first bad file.
    """
    try:
        listed = CheckpointManifest.model_validate_json((checkpoint / MANIFEST).read_bytes()).files
    except (OSError, ValidationError):
        raise UserError(f"{checkpoint / MANIFEST} cannot be read") from None
    present = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    bad = dict.fromkeys(present - set(listed), "not in its manifest")
    for name in sorted(listed)[job.rank :: job.world_size]:
        path = checkpoint / name
        if not path.is_file() or _digest(path) != listed[name]:
            bad[name] = "missing or altered"
    for name, reason in sorted(_union(bad).items()):
        raise UserError(
            f"checkpoint file {checkpoint / name} is {reason}; "
            f"point {checkpoint.parent / LATEST} at another checkpoint, or start with --fresh"
        )


class OptimizerReader(Mapping[str, dict[str, Tensor]]):
    """Whole weights and optimizer state of a checkpoint by parameter name, read when asked for."""

    def __init__(self, checkpoint: Path):
        self._places: dict[str, list[tuple[int, str, Any]]] = {}
        for path in sorted(checkpoint.glob("optimizer-*.safetensors")):
            file = safe_open(path, framework="pt").__enter__()  # maps the file while we live
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                kind, start, name = key.split("/", 2)
                if kind == "weight":
                    self._places.setdefault(name, []).append((int(start), name, file))

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        places = sorted(self._places[name], key=lambda place: place[0])
        return {
            kind: torch.cat([f.get_tensor(f"{kind}/{start}/{n}") for start, n, f in places])
            for kind in ("weight", *ADAM_STATES)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_lanes(checkpoint: Path, lanes: range, device: torch.device) -> LaneState:
    """State of the given lanes, whichever rank wrote it."""
    rows: dict[int, dict[str, Tensor]] = {}
    for path in sorted(checkpoint.glob("lanes-*.safetensors")):
        with safe_open(path, framework="pt", device=str(device)) as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                lane, name = key.split("/", 1)
                if int(lane) in lanes:
                    rows.setdefault(int(lane), {})[name] = file.get_tensor(key)
    names = rows[lanes[0]]
    return LaneState.from_tensors(
        {name: torch.stack([rows[lane][name] for lane in lanes]) for name in names}
    )


def export_weights(run: Path, model: I3LM, step: int) -> Path:
    """Write RUN/model.safetensors: the weights as the forward pass uses them after `step`."""
    path = run / "model.safetensors"
    staging = run / ".model.safetensors.partial"
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, staging, metadata={"step": str(step)})
    sync(staging)
    os.replace(staging, path)
    return path


def load_run(run: Path, device: torch.device) -> tuple[I3LM, Settings, Tokenizer]:
    """A finished run's model in evaluation mode, its settings and tokenizer; no DeepSpeed.

    On the CPU the model computes in fp32, elsewhere in the type of its weights.

    Raises:
        UserError: RUN is no finished run, or its files do not belong together.
    """
    path = run / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: a run writes it when it ends; "
            "continue the run with launch/train.py, or name another --checkpoint"
        )
    settings = Settings.load(run / "settings.yaml")
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    if settings.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} entries but model.vocab_size in "
            f"{run / 'settings.yaml'} is {settings.model.vocab_size}; restore the run's own files"
        )
    try:
        weights = load_file(path, device=str(device))
        model = I3LM(settings.model, tokenizer.bos_id)
        model.load_state_dict(weights)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit {run / 'settings.yaml'}: {reason}") from None
    dtype = torch.float32 if device.type == "cpu" else weights["head.weight"].dtype
    for parameter in model.parameters():  # buffers stay fp32, as in training
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval().requires_grad_(False), settings, tokenizer


def _digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(size=path.stat().st_size, sha256=digest)


def _union(mine: dict[str, Any]) -> dict[str, Any]:
    """Every rank's entries, on every rank."""
    return {key: value for part in dist.gather_objects(mine) for key, value in part.items()}
