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

from i3dist.model.layers import ALIGNMENT, Linear
from i3dist.model.lm import I3LM, decayed


class Slot(NamedTuple):
    """One parameter's place in a flat tensor.

    Padding that a matrix is computed with stands in the flat tensor as well, so that blocks use a
    view of it as it is. Heads are the exception: their channels are padded where they are used, and
    so are those whose padding is put to use.
    """

    start: int  # first element
    size: int  # elements that it takes, so that every slot begins aligned
    shape: torch.Size  # of the parameter
    layout: torch.Size  # the shape that the parameter is the first corner of

    def stored(self, part: Tensor) -> Tensor:
        """The parameter in its own shape, as a view of its part of the flat tensor."""
        return self._whole(part)[tuple(slice(length) for length in self.shape)]

    def computed(self, part: Tensor) -> Tensor:
        """The parameter as blocks take it, a view."""
        return part if len(self.shape) == 1 else self._whole(part)

    def _whole(self, part: Tensor) -> Tensor:
        # Sliced only where needed: in backward a slice is a copy.
        numel = self.layout.numel()
        return (part if numel == len(part) else part[:numel]).view(self.layout)

    def mask(self, device: torch.device) -> Tensor:
        """Which elements of the slot are the parameter's, in its order: [size] bool."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=device)
        self.stored(mask).fill_(True)
        return mask


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
        if model.width.alignment != ALIGNMENT:
            raise ValueError(f"a packed model is aligned to {ALIGNMENT}")
        # In a tuple, so that it is no submodule and its parameters are not counted twice.
        self._model = (model,)
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
            parts = values.split([slot.size for slot in flat.slots])
            for name, slot, part in zip(flat.names, flat.slots, parts, strict=True):
                parameters[name] = slot.computed(part)
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


@torch.no_grad()
def _flatten(model: I3LM, names: list[str], decays: bool) -> Flat:
    """Copy parameters into one flat tensor, each at an aligned place."""
    slots, start = [], 0
    for name in names:
        parameter = model.get_parameter(name)
        owner = model.get_submodule(name.rpartition(".")[0])
        layout = parameter.shape
        if isinstance(owner, Linear):
            sides = (owner.d_out, owner.d_in)
            whole = (c.computed if c.heads == 1 and not c.spare else c.stored for c in sides)
            layout = torch.Size(whole)
        size = -(-layout.numel() // ALIGNMENT) * ALIGNMENT
        slots.append(Slot(start, size, parameter.shape, layout))
        start += size
    flat = model.get_parameter(names[0]).new_zeros(start)
    for name, slot in zip(names, slots, strict=True):
        slot.stored(flat.narrow(0, slot.start, slot.size)).copy_(model.get_parameter(name))
    return Flat(nn.Parameter(flat), names, tuple(slots), decays)
