"""Reading the tensors of a checkpoint, whichever ranks wrote them."""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from i3dist.checkpoint.format import PART, ROW
from i3dist.errors import UserError
from i3dist.files import utf8_path
from i3dist.model.state import LaneState
from i3dist.optim.optimizers import OPTIMIZERS

REMEDY = "restore it; or remove its folder, and a run continues from the checkpoint before it"


class OptimizerReader(Mapping[str, dict[str, Tensor]]):
    """Weights and optimizer state of a checkpoint, whole, by parameter name; read on access."""

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        # (kind, parameter) -> first element and file of each part, in order.
        self._parts: dict[tuple[str, str], list[tuple[int, Path, Any]]] = {}
        states = {state for kind in OPTIMIZERS.values() for state in kind.states}
        form = re.compile(PART.format("|".join(sorted({"weight", *states}))))
        for path in sorted(checkpoint.glob("optimizer-*.safetensors")):
            file = _open(path).__enter__()  # maps the file as long as the reader lives
            for kind, start, name in _names(path, file, form):
                self._parts.setdefault((kind, name), []).append((int(start), path, file))
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[0])
        self._kinds = ("weight", *sorted({kind for kind, _ in self._parts} - {"weight"}))

    def check(self, sizes: Mapping[str, int]) -> None:
        """Check that parameters of these sizes (in elements) are complete; reads no tensor.

        Raises:
            UserError: one is missing, or a part of one is.
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
    """The state of the given lanes, with the device, shapes and types of `like`.

    Raises:
        UserError: some of it is missing, or has another shape or type.
    """
    rows: dict[tuple[int, str], Tensor] = {}
    form = re.compile(ROW.format("|".join(map(re.escape, like.tensors()))))
    for path in sorted(checkpoint.glob("lanes-*.safetensors")):
        with _open(path, like.latents.device) as file:
            for lane, name in _names(path, file, form):
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
        {name: torch.stack([rows[lane, name] for lane in lanes]) for name in like.tensors()}
    )


def _names(path: Path, file: Any, form: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    """The names of a file's tensors, parsed; raises `UserError` if one does not match."""
    for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
        match = form.fullmatch(key)
        if match is None:
            raise UserError(f"{path}: a checkpoint has no tensor named {key!r}; {REMEDY}")
        yield match.groups()


def _open(path: Path, device: torch.device | str = "cpu") -> Any:
    """Map a safetensors file. Anything else (a pickle, for example) is refused and not run."""
    try:
        with utf8_path(path) as name:
            return safe_open(name, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}; {REMEDY}") from None
