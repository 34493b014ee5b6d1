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
from i3dist.engine.flat_parameters import Flat, Slot
from i3dist.optim.flat import fresh_state

# (group, "weight" or a state of the optimizer) -> [elements] fp32, this rank's partition.
Partitions = dict[tuple[int, str], Tensor]


class Place(NamedTuple):
    """Where a parameter, or a part of it, lies in this rank's partition."""

    name: str
    slot: Slot
    group: int  # number of the partition
    first: int  # element of the flat tensor
    at: int  # the same element in the partition
    length: int  # elements

    def of(self, partition: Tensor) -> Tensor:
        """Its part of a partition, as a view."""
        return partition.narrow(0, self.at, self.length)


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
            for name, slot in zip(flat.names, flat.slots, strict=True):
                first = max(slot.start, address.start)
                end = min(slot.start + slot.size, address.start + address.length)
                if first < end:
                    at = address.at + first - address.start
                    yield Place(name, slot, address.group, first, at, end - first)

    def snapshot(self) -> Iterator[Fragment]:
        """Copy to the host; see `Engine.snapshot`. The next call copies to the same memory."""
        for key, tensor in self._held().items():
            if key not in self._host:  # pinned: copies to other memory are ten times slower
                self._host[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._host[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        places = list(self.places())
        return (
            Fragment(name, start, {key: part[mask] for key, part in parts.items()})
            for name, start, mask, parts in self._shares(places, self._host)
        )

    def load(self, state: Mapping[str, dict[str, Tensor]], steps: int) -> None:
        """Restore partitions; the arguments are those of `Engine.load`."""
        for partition in self._zero.partitions:
            self._optimizer.state[partition] = fresh_state(partition, self._names, steps)
        for name, start, mask, parts in self._shares(self.places(), self._held()):
            whole, length = state[name], int(mask.sum())
            for key, part in parts.items():
                part[mask] = whole[key].narrow(0, start, length).to(part.device)

    def _held(self) -> Partitions:
        """Weights and optimizer state as they are, not copied."""
        held: Partitions = {}
        for group, partition in enumerate(self._zero.partitions):
            held[group, "weight"] = partition.detach()
            state = self._optimizer.state[partition]
            held |= {(group, name): state[name] for name in self._names}
        return held

    def _shares(
        self, places: Iterable[Place], held: Partitions
    ) -> Iterator[tuple[str, int, Tensor, dict[str, Tensor]]]:
        """For each parameter in the partitions: its name, the index of its first element here, a
        mask of the elements that are not padding, and views of `held` that the mask is for.
        """
        for place in places:
            views = {key: place.of(held[place.group, key]) for key in ("weight", *self._names)}
            mask = place.slot.mask(views["weight"].device)
            skipped = place.first - place.slot.start
            before, mask = mask.tensor_split([skipped, skipped + place.length])[:2]
            yield place.name, int(before.sum()), mask, views
