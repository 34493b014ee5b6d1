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
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from i3dist.checkpoint.fragment import Fragment
from i3dist.checkpoint.run_state import RunState
from i3dist.errors import UserError
from i3dist.model.state import LaneState

MANIFEST = "manifest.json"
STATE = "state.json"
TOKENIZER = "tokenizer.json"  # missing in checkpoints of earlier versions
# Names of tensors: a part of a parameter (kind, first element, parameter), where {} stands for
# "weight" and the states of optimizers, and of a lane's state, where it stands for the names in
# `LaneState`.
PART = r"({})/(0|[1-9][0-9]{{0,17}})/(.+)"
ROW = r"(0|[1-9][0-9]{{0,17}})/({})"
# A name in the checkpoint's own folder; a path could lead to files elsewhere.
FileName = Annotated[str, Field(pattern=r"\A[a-z0-9][a-z0-9.-]*\z")]


class FileDigest(BaseModel):
    """Size and hash of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Read a file and hash it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(size=path.stat().st_size, sha256=digest)


class CheckpointManifest(BaseModel):
    """manifest.json: every other file of the checkpoint, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[FileName, FileDigest]


def tensors_of_rank(
    rank: int, fragments: Iterable[Fragment], lanes: tuple[range, LaneState]
) -> dict[str, dict[str, Tensor]]:
    """The tensors that a rank writes: file name -> tensor name -> tensor."""
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
    data = (checkpoint / MANIFEST).read_bytes()
    return CheckpointManifest.model_validate_json(data).files


def read_state(checkpoint: Path) -> RunState:
    """Read and validate state.json.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return RunState.model_validate_json((checkpoint / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint / STATE} cannot be read: {reason}") from None
