"""A model's parameters as slices of two flat tensors: those with weight decay, and those without.

Hooks, buckets, reductions and norms cost time per tensor, and the model has hundreds of parameters,
most of them small.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from i3dist.engine import cuda_graph
from i3dist.model.layers import ALIGNMENT, Linear
from i3dist.model.lm import I3LM, by_decay

PACKED_AT_ONCE = 2**18  # elements, which stay in the processor's cache


class Extent(NamedTuple):
    """One parameter's place in a flat tensor.

    A matrix is stored with its padding, so that blocks compute with a view of the flat tensor. The
    channels of heads, and those whose padding has a use of its own, are padded where they are used.
    """

    start: int  # first element
    size: int  # number of elements; a multiple of the alignment, so every extent begins aligned
    shape: torch.Size  # of the parameter
    layout: torch.Size  # of the padded parameter; the parameter is its first corner

    def stored(self, part: Tensor) -> Tensor:
        """The parameter in its own `shape`, as a view of its part [size] of the flat tensor."""
        return self._whole(part)[tuple(slice(length) for length in self.shape)]

    def computed(self, part: Tensor) -> Tensor:
        """What blocks compute with, a view of the part [size]: the padded matrix, or the part."""
        return part if len(self.shape) == 1 else self._whole(part)

    def pack(self, part: Tensor) -> Tensor:
        """Move the parameter to the front of its part of the flat tensor, over padding.

        Returns:
            [elements], a view.
        """
        stored = self.stored(part)
        if stored.is_contiguous():
            return stored.view(-1)
        packed = part[: stored.numel()]
        rows = max(1, PACKED_AT_ONCE // stored[0].numel())
        places = packed.view(stored.shape).split(rows)
        for source, target in zip(stored.split(rows), places, strict=True):
            target.copy_(source.clone())  # they overlap
        return packed

    def _whole(self, part: Tensor) -> Tensor:
        # Sliced only where needed: in backward a slice is a copy.
        numel = self.layout.numel()
        return (part if numel == len(part) else part[:numel]).view(self.layout)

    def mask(self, device: torch.device) -> Tensor:
        """[size] bool: True for the parameter's elements, False for padding."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=device)
        self.stored(mask).fill_(True)
        return mask


class Flat(NamedTuple):
    """One flat tensor and the parameters in it."""

    parameter: nn.Parameter  # 1-D
    names: list[str]
    extents: list[Extent]


class FlatModel(nn.Module):
    """Calls the model with slices of two flat parameters in place of the model's own."""

    def __init__(self, model: I3LM):
        super().__init__()
        if model.width.alignment != ALIGNMENT:
            raise ValueError(f"a flat model is aligned to {ALIGNMENT}")
        # In a tuple, so that it is no submodule and its parameters are not counted twice.
        self._model = (model,)
        self._call: Callable[..., Any] = self._unpack_and_call
        self.flats = [_flatten(model, names) for names in by_decay(model)]
        self.decayed, self.undecayed = (flat.parameter for flat in self.flats)

    def forward(self, *arguments: Any) -> Any:
        """The model's forward; gradients flow to the flat parameters."""
        return self._call(self.decayed, self.undecayed, *arguments)

    def capture(self, *arguments: Any) -> None:
        """Record forward and backward of a call like this one as CUDA graphs (`cuda_graph`)."""
        parameters = [flat.parameter for flat in self.flats]
        self._call = cuda_graph.capture(self._unpack_and_call, parameters, arguments)

    def _unpack_and_call(self, decayed: Tensor, undecayed: Tensor, *arguments: Any) -> Any:
        parameters = self.unpack(decayed, undecayed)
        return functional_call(self._model[0], parameters, arguments, tie_weights=False)

    def unpack(self, decayed: Tensor, undecayed: Tensor) -> dict[str, Tensor]:
        """What blocks compute with in place of each parameter: views of two flat tensors."""
        parameters: dict[str, Tensor] = {}
        for flat, values in zip(self.flats, (decayed, undecayed), strict=True):
            parts = values.split([extent.size for extent in flat.extents])
            for name, extent, part in zip(flat.names, flat.extents, parts, strict=True):
                parameters[name] = extent.computed(part)
        return parameters

    @torch.no_grad()
    def share(self) -> None:
        """Make the model's own parameters views of the flat ones.

        Call it once the flat parameters have their final memory, device and type.
        """
        for flat in self.flats:
            for name, extent in zip(flat.names, flat.extents, strict=True):
                part = flat.parameter.narrow(0, extent.start, extent.size)
                self._model[0].get_parameter(name).data = extent.stored(part)


@torch.no_grad()
def _flatten(model: I3LM, names: list[str]) -> Flat:
    """Copy parameters into one flat tensor, each to an aligned place."""
    extents, start = [], 0
    for name in names:
        parameter = model.get_parameter(name)
        owner = model.get_submodule(name.rpartition(".")[0])
        layout = parameter.shape
        if isinstance(owner, Linear):
            sides = (owner.d_out, owner.d_in)
            whole = (c.computed if c.heads == 1 and not c.spare else c.stored for c in sides)
            layout = torch.Size(whole)
        size = -(-layout.numel() // ALIGNMENT) * ALIGNMENT
        extents.append(Extent(start, size, parameter.shape, layout))
        start += size
    flat = model.get_parameter(names[0]).new_zeros(start)
    for name, extent in zip(names, extents, strict=True):
        extent.stored(flat.narrow(0, extent.start, extent.size)).copy_(model.get_parameter(name))
    return Flat(nn.Parameter(flat), names, extents)
