"""Weights and optimizer state in ZeRO's partitions, as fragments by parameter name and back.

Fragments do not depend on the number of ranks. DeepSpeed's own accessors see the flat tensors only,
and gather each whole on every rank.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i3dist.checkpoint.format import Fragment
from i3dist.engine.deepspeed_internals import ZeroInternals
from i3dist.engine.flat_parameters import Extent, Flat
from i3dist.optim.flat import fresh_state

# (group, "weight" or a state of the optimizer) -> [elements] fp32, this rank's partition.
Partitions = dict[tuple[int, str], Tensor]


class Place(NamedTuple):
    """Where a parameter, or a part of it, lies in this rank's partition."""

    name: str
    extent: Extent
    group: int  # number of the partition
    first: int  # element of the flat tensor
    at: int  # the same element in the partition
    length: int  # elements

    def of(self, partition: Tensor) -> Tensor:
        """Its part of a partition: [elements] -> [length], a view."""
        return partition.narrow(0, self.at, self.length)

    def mask(self, device: torch.device) -> tuple[int, Tensor]:
        """The parameter's first element here; [length] True for elements that are not padding."""
        skipped = self.first - self.extent.start
        cuts = [skipped, skipped + self.length]
        before, mask = self.extent.mask(device).tensor_split(cuts)[:2]
        return int(before.sum()), mask


class PartitionedState:
    """This rank's partitions."""

    def __init__(
        self,
        flats: Sequence[Flat],
        zero: ZeroInternals,
        optimizer: torch.optim.Optimizer,
        names: tuple[str, ...],
    ):
        """`names` are those of the optimizer's states."""
        self._flats, self._zero, self._optimizer, self._names = flats, zero, optimizer, names
        self._host: Partitions = {}  # what `snapshot` copies to

    def places(self) -> Iterator[Place]:
        """Where the parameters lie that this rank's partitions hold, or hold a part of."""
        for flat in self._flats:
            address = self._zero.address(flat.parameter)
            if address is None:
                continue
            for name, extent in zip(flat.names, flat.extents, strict=True):
                first = max(extent.start, address.start)
                end = min(extent.start + extent.size, address.start + address.length)
                if first < end:
                    at = address.at + first - address.start
                    yield Place(name, extent, address.group, first, at, end - first)

    def snapshot(self) -> Iterator[Fragment]:
        """Copy to the host; see `Engine.snapshot`. The next call copies to the same memory."""
        for key, tensor in self._held().items():
            if key not in self._host:  # pinned: copies to other memory are ten times slower
                self._host[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._host[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return self._fragments(list(self.places()))

    def _fragments(self, places: Iterable[Place]) -> Iterator[Fragment]:
        """Parts of the host's copies, whose elements it moves to leave out padding.

        Indexing by a mask is slower than many disks: only parameters that ranks share need it.
        """
        for place in places:
            views = self._views(place, self._host)
            if place.length == place.extent.size:
                start, parts = 0, {key: place.extent.pack(view) for key, view in views.items()}
            else:
                start, mask = place.mask(torch.device("cpu"))
                parts = {key: view[mask] for key, view in views.items()}
            yield Fragment(place.name, start, parts)

    def copy_weights(self) -> None:
        """Set the fp32 weights to those that the model computes with, as DeepSpeed does."""
        for flat in self._flats:
            if (address := self._zero.address(flat.parameter)) is not None:
                part = self._zero.partitions[address.group].narrow(0, address.at, address.length)
                part.copy_(flat.parameter.narrow(0, address.start, address.length))

    def load(self, state: Mapping[str, dict[str, Tensor]], steps: int) -> None:
        """Restore partitions: [elements] fp32 by parameter and kind, as for `Engine.load`."""
        for partition in self._zero.partitions:
            self._optimizer.state[partition] = fresh_state(partition, self._names, steps)
        held = self._held()
        for place in self.places():
            saved, extent = state[place.name], place.extent
            for key, view in self._views(place, held).items():
                if place.length == extent.size:
                    extent.stored(view).copy_(saved[key].view(extent.shape))
                else:
                    start, mask = place.mask(view.device)
                    view[mask] = saved[key].narrow(0, start, int(mask.sum())).to(view.device)

    def _held(self) -> Partitions:
        """Weights and optimizer state as they are, not copied."""
        held: Partitions = {}
        for group, partition in enumerate(self._zero.partitions):
            held[group, "weight"] = partition.detach()
            state = self._optimizer.state[partition]
            held |= {(group, name): state[name] for name in self._names}
        return held

    def _views(self, place: Place, held: Partitions) -> dict[str, Tensor]:
        """A parameter's weights and optimizer state, with padding."""
        return {key: place.of(held[place.group, key]) for key in ("weight", *self._names)}
