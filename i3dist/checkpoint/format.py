"""What is in a checkpoint: its files, and the names of its tensors.

    RUN/checkpoints/step-00000100/
        manifest.json                     size and SHA-256 of every other file; written last
        state.json                        step, tokens seen, settings, data fingerprint, guard
        tokenizer.json                    the data's tokenizer, to use a checkpoint without its run
        optimizer-00000.safetensors ...   one file per rank: parts of weights and AdamW's moments
            weight/0/head.weight          [N] fp32: the flat parameter from element 0 on
            exp_avg/0/head.weight         as long
            exp_avg_sq/0/head.weight      as long
        lanes-00000.safetensors ...       one file per rank: the state of each of its lanes
            3/latents                     lane 3: [history_chunks, M, D] in the model's dtype
            3/wkv, 3/time_shift, 3/channel_shift    RWKV state, empty unless it is carried

Nothing in them depends on the number of ranks, and nothing is a pickle. `writer` writes a
checkpoint, `verify` checks that it is whole, `reader` reads its tensors, and `store` is the folder
of a run's checkpoints.
"""

import hashlib
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from i3dist.errors import UserError
from i3dist.files import regular
from i3dist.model.state import LaneState

MANIFEST = "manifest.json"
STATE = "state.json"
HASHED_AT_ONCE = 2**28  # bytes
TOKENIZER = "tokenizer.json"  # missing in checkpoints of earlier versions
# Names of tensors: a part of a parameter (kind, first element, parameter), where {} stands for
# "weight" and the states of optimizers, and of a lane's state, where it stands for the names in
# `LaneState`.
PART = r"({})/(0|[1-9][0-9]{{0,17}})/(.+)"
ROW = r"(0|[1-9][0-9]{{0,17}})/({})"
# A name in the checkpoint's own folder; a path could lead to files elsewhere.
FileName = Annotated[str, Field(pattern=r"\A[a-z0-9][a-z0-9.-]*\z")]


class Stored(BaseModel):
    """What a JSON file of a run holds; other keys than these are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GuardState(Stored):
    """What the guard's later decisions depend on. Immutable: each step makes a new one."""

    skipped: int = 0
    """Steps that updated nothing, or whose updates were lost by rolling back."""
    bad: int = 0
    """Consecutive steps, up to the last, whose loss or gradient was not finite."""
    spikes: int = 0
    """Consecutive steps, up to the last, that were skipped for a large gradient norm."""
    idle: Annotated[int, Field(exclude_if=operator.not_)] = 0
    """Consecutive steps, up to the last, that updated nothing for either reason; missing in
    checkpoints of earlier versions."""
    norms: tuple[float, ...] = ()
    """The newest gradient norms of steps that were taken; only kept with guard.spike_factor."""
    rolled_back_to: tuple[int, ...] = ()
    """Steps of the checkpoints that the run was rolled back to."""
    rolled_back_at: Annotated[tuple[int, ...], Field(exclude_if=operator.not_)] = ()
    """The last step before each rollback; missing in checkpoints of earlier versions."""

    def may_roll_back_to(self, step: int, now: int) -> bool:
        """Whether the run may roll back to the checkpoint of `step` after step `now`.

        It must be older than the last consecutive steps that updated nothing, because one saved
        among them has the current weights. It must not have been used for a rollback, nor be from
        a future that an earlier rollback gave up.
        """
        given_up = zip(reversed(self.rolled_back_to), reversed(self.rolled_back_at), strict=False)
        return (
            step <= now - max(self.idle, self.bad)
            and step not in self.rolled_back_to
            and not any(to <= step <= at for to, at in given_up)
        )


class RunState(Stored):
    """Where a run stands: the content of state.json."""

    step: int
    """Optimizer steps taken."""
    windows: int
    """Windows that the job has read; the next one has this index."""
    tokens_seen: int
    """Input tokens so far, without padding and idle lanes."""
    settings: dict[str, Any]
    """The run's resolved settings."""
    data: str
    """Fingerprint of the data, both splits."""
    engine: dict[str, Any]
    """The part of the engine's settings that affects numbers."""
    guard: GuardState = GuardState()
    """Which steps were skipped, and what later decisions depend on."""

    @property
    def taken(self) -> int:
        """Steps that updated the weights."""
        return self.step - self.guard.skipped


class Fragment(NamedTuple):
    """The part of one parameter whose optimizer state a rank holds."""

    name: str
    start: int  # first element in the flattened parameter
    tensors: dict[str, Tensor]  # "weight" and the optimizer's states: fp32, 1-D, equal lengths


class FileDigest(Stored):
    """Size and hash of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Read a file and hash it."""
        # In large parts: before each the thread waits for all others that want the interpreter.
        length = path.stat().st_size
        digest, part = hashlib.sha256(), memoryview(bytearray(min(length, HASHED_AT_ONCE)))
        with regular(path).open("rb", buffering=0) as file:
            while size := file.readinto(part):
                digest.update(part[:size])
        return cls(size=length, sha256=digest.hexdigest())


class CheckpointManifest(Stored):
    """manifest.json: every other file of the checkpoint, by name."""

    files: dict[FileName, FileDigest]


def tensors_of_rank(
    rank: int, fragments: Iterable[Fragment], lanes: tuple[range, LaneState]
) -> dict[str, dict[str, Tensor]]:
    """The tensors that a rank writes: file name -> tensor name -> tensor.

    Args:
        rank: the rank.
        fragments: its share of weights and optimizer state, [elements] fp32.
        lanes: the lane numbers that it owns, and their state, a row each.
    """
    optimizer = {
        f"{kind}/{fragment.start}/{fragment.name}": tensor.contiguous()
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
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


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or not, judged by its files and not by its name."""
    return any((path / name).is_file() for name in (MANIFEST, STATE))


def read_manifest(checkpoint: Path) -> dict[str, FileDigest]:
    """The files that a checkpoint must have; raises `OSError` or `ValidationError`."""
    data = regular(checkpoint / MANIFEST).read_bytes()
    return CheckpointManifest.model_validate_json(data).files


def read_state(checkpoint: Path) -> RunState:
    """Read and validate state.json.

    Raises:
        UserError: it cannot be read, or is no state of a run.
    """
    try:
        return RunState.model_validate_json(regular(checkpoint / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint / STATE} cannot be read: {reason}") from None
