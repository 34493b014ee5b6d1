"""A model's parameters as slices of two flat tensors: those that weight decay applies to, and the
rest.

Whatever handles parameters one by one (hooks, buckets, reductions, norms) costs time per tensor;
the model has hundreds, most of them small.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from i3dist.model.layers import ALIGNMENT, Channels, Linear
from i3dist.model.lm import COMPILE, I3LM, decayed


class Slot(NamedTuple):
    """One parameter's place in a flat tensor, and the form that it is computed in."""

    start: int  # first element
    numel: int
    shape: torch.Size
    sides: tuple[Channels, Channels] | None  # of a projection: channels out and in

    @property
    def size(self) -> int:
        """Elements that it takes, so that every slot begins aligned; those beyond stay zero."""
        return -(-self.numel // ALIGNMENT) * ALIGNMENT

    def stored(self, part: Tensor) -> Tensor:
        """The parameter in its own shape, as a view of its part of the flat tensor."""
        return part[: self.numel].view(self.shape)

    def computed(self, part: Tensor) -> Tensor:
        """The parameter in the shape that blocks compute with."""
        if len(self.shape) == 1:
            return part  # the slot's zeros are the padding
        if self.sides is None:
            return self.stored(part)
        d_out, d_in = self.sides
        return d_out.pad(d_in.pad(self.stored(part)), dim=0)


class Flat(NamedTuple):
    """One flat tensor and what it is made of."""

    parameter: nn.Parameter  # 1-D
    names: list[str]
    slots: tuple[Slot, ...]
    decays: bool  # whether weight decay applies


class PackedModel(nn.Module):
    """Calls the model with slices of its own, flat parameters in place of the model's."""

    def __init__(self, model: I3LM):
        super().__init__()
        # In a tuple, so that it is no submodule and its parameters are not counted twice.
        self._model = (model,)
        self._unpack = torch.compile(unpack, **COMPILE) if model.compiled else unpack
        self._call: Callable[..., Any] = self._unpack_and_call
        matrices = set(decayed(model))
        names = [name for name, _ in model.named_parameters()]
        self.flats = [
            _flatten(model, [name for name in names if (name in matrices) == decays], decays)
            for decays in (True, False)
        ]
        self.decayed, self.undecayed = (flat.parameter for flat in self.flats)

    def forward(self, *arguments: Any) -> Any:
        """The model's forward; gradients flow to the flat parameters."""
        return self._call(self.decayed, self.undecayed, *arguments)

    def capture(self, *arguments: Any) -> None:
        """Record forward and backward of a call like this one as CUDA graphs, to be replayed.

        From then on arguments must keep their shapes, and a call overwrites what the last returned.
        """
        samples = tree_map(torch.clone, arguments)
        # Leaves of their own, in the same memory: what hooks the parameters' own autograd nodes is
        # bound to another stream.
        leaves = [flat.parameter.detach().requires_grad_() for flat in self.flats]
        losses, _ = self._unpack_and_call(*leaves, *samples)  # compiles before recording
        torch.autograd.grad(losses.sum(), leaves)
        del losses
        leaves = [flat.parameter.detach().requires_grad_() for flat in self.flats]
        self._call = torch.cuda.make_graphed_callables(self._unpack_and_call, (*leaves, *samples))

    def _unpack_and_call(self, decayed: Tensor, undecayed: Tensor, *arguments: Any) -> Any:
        parameters: dict[str, Tensor] = {}
        for flat, values in zip(self.flats, (decayed, undecayed), strict=True):
            parameters |= zip(flat.names, self._unpack(values, flat.slots), strict=True)
        return functional_call(self._model[0], parameters, arguments, tie_weights=False)

    @torch.no_grad()
    def share(self) -> None:
        """Let the model's own parameters be the same memory as the flat ones.

        To be called once the flat parameters have their final place, device and type.
        """
        for flat in self.flats:
            for name, slot in zip(flat.names, flat.slots, strict=True):
                part = flat.parameter.narrow(0, slot.start, slot.size)
                self._model[0].get_parameter(name).data = slot.stored(part)


def unpack(flat: Tensor, slots: tuple[Slot, ...]) -> list[Tensor]:
    """A flat tensor's parameters, each in the shape that blocks compute with.

    Together, so that backward joins all their gradients in one pass.
    """
    parts = flat.split([slot.size for slot in slots])
    return [slot.computed(part) for slot, part in zip(slots, parts, strict=True)]


@torch.no_grad()
def _flatten(model: I3LM, names: list[str], decays: bool) -> Flat:
    """Copy parameters into one flat tensor, each at an aligned place."""
    slots, start = [], 0
    for name in names:
        parameter = model.get_parameter(name)
        owner = model.get_submodule(name.rpartition(".")[0])
        sides = (owner.d_out, owner.d_in) if isinstance(owner, Linear) else None
        slots.append(Slot(start, parameter.numel(), parameter.shape, sides))
        start += slots[-1].size
    flat = model.get_parameter(names[0]).new_zeros(start)
    for name, slot in zip(names, slots, strict=True):
        flat.narrow(0, slot.start, slot.numel).copy_(model.get_parameter(name).flatten())
    return Flat(nn.Parameter(flat), names, tuple(slots), decays)
