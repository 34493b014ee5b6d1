"""A model's parameters as slices of a few flat tensors.

Whatever handles parameters one by one (hooks, buckets, reductions, norms) costs time per tensor;
the model has hundreds, most of them small. Packed, each block has two: the matrices that weight
decay applies to, and all the rest.
"""

import re
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from i3dist.model.lm import I3LM, decayed

# Slices begin at multiples of this many elements: 16 bytes of bf16, what vector loads need.
SLICE_ALIGNMENT = 8


class Piece(NamedTuple):
    """One parameter's place in its flat tensor."""

    name: str
    shape: torch.Size
    start: int  # first element
    numel: int


class Flat(NamedTuple):
    """One flat tensor and what it is made of."""

    parameter: nn.Parameter  # 1-D
    pieces: list[Piece]
    decays: bool  # whether weight decay applies


class PackedModel(nn.Module):
    """Calls the model with slices of its own, flat parameters in place of the model's."""

    def __init__(self, model: I3LM):
        super().__init__()
        # In a tuple, so that it is no submodule and its parameters are not counted twice.
        self._model = (model,)
        matrices = set(decayed(model))
        groups: dict[tuple[str, bool], dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter in model.named_parameters():
            groups[_block(name), name in matrices][name] = parameter
        self.flats = [_flatten(parameters, key[1]) for key, parameters in groups.items()]
        for (block, decays), flat in zip(groups, self.flats, strict=True):
            kind = "matrices" if decays else "vectors"
            self.register_parameter(f"{block}_{kind}".replace(".", "_"), flat.parameter)

    def forward(self, *arguments: Any) -> Any:
        """The model's forward; gradients flow to the flat parameters."""
        slices = {name: view for flat in self.flats for name, view in _slices(flat).items()}
        return functional_call(self._model[0], slices, arguments, tie_weights=False)

    @torch.no_grad()
    def share(self) -> None:
        """Let the model's own parameters be the same memory as the flat ones.

        To be called once the flat parameters have their final place, device and type.
        """
        parameters = dict(self._model[0].named_parameters())
        for flat in self.flats:
            for name, view in _slices(flat).items():
                parameters[name].data = view


def _block(name: str) -> str:
    """The block that a parameter belongs to: "rwkv.3", "head", ..."""
    match = re.match(r"\w+\.\d+|\w+", name)
    assert match is not None
    return match.group()


def _flatten(parameters: dict[str, nn.Parameter], decays: bool) -> Flat:
    """Copy parameters into one flat tensor, each at an aligned place."""
    pieces, start = [], 0
    for name, parameter in parameters.items():
        pieces.append(Piece(name, parameter.shape, start, parameter.numel()))
        start += -(-parameter.numel() // SLICE_ALIGNMENT) * SLICE_ALIGNMENT
    flat = torch.zeros(start)
    for piece, parameter in zip(pieces, parameters.values(), strict=True):
        flat.narrow(0, piece.start, piece.numel).copy_(parameter.detach().flatten())
    return Flat(nn.Parameter(flat), pieces, decays)


def _slices(flat: Flat) -> dict[str, Tensor]:
    """Parameter name -> its part of the flat tensor, in its own shape."""
    ends = [piece.start for piece in flat.pieces[1:]] + [flat.parameter.numel()]
    sizes = [end - piece.start for piece, end in zip(flat.pieces, ends, strict=True)]
    # Split as a whole, so that backward joins all gradients in one pass.
    parts = flat.parameter.split(sizes)
    return {
        piece.name: part[: piece.numel].view(piece.shape)
        for piece, part in zip(flat.pieces, parts, strict=True)
    }
