"""What a lane carries from window to window. Notation: B rows, M latents, D width, R layers.

State is functional: it goes into the model and comes out, and nothing is changed in place, so
recomputing activations cannot append twice. A lane is a row of every tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i3dist.config import ModelSettings
from i3dist.model.block import LayerState
from i3dist.model.layer_kinds import Layer, Stack, lower_kind


def empty_states(layers: Sequence[Layer], rows: int, width: int, like: Tensor) -> list[LayerState]:
    """The state of each layer before a document's first token; layers of a kind share memory.

    Args:
        layers: those below the compressor.
        rows: number of rows N.
        width: D, stored or computed.
        like: gives device and dtype; its shape does not matter.

    Returns:
        For each layer its tensors [N, ..., D] (`LowerBlock.empty_state`).
    """
    kinds = {layer.kind: lower_kind(layer).empty_state(rows, width, like) for layer in layers}
    return [kinds[layer.kind] for layer in layers]


def state_names(layer: Layer) -> list[str]:
    """What the parts of a layer's state are called in lane states and checkpoints."""
    # RWKV's have no prefix: they are older than layer kinds.
    prefix = "" if layer.kind == "rwkv" else f"{layer.kind}."
    return [prefix + part for part in lower_kind(layer).state_parts]


def stack_states(layers: Sequence[Layer], states: Sequence[LayerState]) -> dict[str, Tensor]:
    """The states of layers by name: [B, ...] each -> [B, R, ...] with R layers of a kind."""
    parts: dict[str, list[Tensor]] = {}
    for layer, state in zip(layers, states, strict=True):
        for name, part in zip(state_names(layer), state, strict=True):
            parts.setdefault(name, []).append(part)
    return {name: torch.stack(tensors, dim=1) for name, tensors in parts.items()}


def unstack_states(layers: Sequence[Layer], stacked: Mapping[str, Tensor]) -> list[LayerState]:
    """The inverse of `stack_states`: [B, R, ...] by name -> [B, ...] by layer."""
    return [tuple(stacked[name][:, layer.nth] for name in state_names(layer)) for layer in layers]


class LaneState(NamedTuple):
    """The memory of B lanes: the newest compressed chunks, and the carried state of layers.

    Which of the latents are visible is not stored: it follows from the data (`Batch.depth`).
    """

    latents: Tensor  # [B, history_chunks, M, D], oldest first
    layers: dict[str, Tensor]  # from `stack_states`, with R = 0 where state is not carried

    @classmethod
    def empty(
        cls, rows: int, model: ModelSettings, device: torch.device, dtype: torch.dtype
    ) -> "LaneState":
        """The state of lanes that have read nothing yet."""
        like, width = torch.empty(0, device=device, dtype=dtype), model.d_model
        latents = like.new_zeros(rows, model.history_chunks, model.latents, width)
        lower = Stack.of(model).lower
        layers = {}
        for layer, state in zip(lower, empty_states(lower, rows, width, like), strict=True):
            for name, part in zip(state_names(layer), state, strict=True):
                count = layer.total if model.state_carry else 0
                layers[name] = part.unsqueeze(1).expand(-1, count, *part.shape[1:])
        return cls(latents, layers)

    def rows(self, start: int, stop: int) -> "LaneState":
        """Lanes [start, stop)."""
        return self.map(lambda x: x[start:stop])

    def map(self, change: Callable[[Tensor], Tensor]) -> "LaneState":
        """The state with `change` applied to every tensor, [B, ...] each."""
        return LaneState(change(self.latents), {n: change(x) for n, x in self.layers.items()})

    def finite(self, empty: "LaneState") -> "LaneState":
        """The same with what is not finite replaced by `empty`, the state of as many new lanes.

        Latents are emptied chunk by chunk, so that the others keep their age; the state of layers
        lane by lane.
        """
        chunks = self.latents.isfinite().all(-1).all(-1)  # [B, history_chunks]
        latents = self.latents.where(chunks[..., None, None], empty.latents)
        whole = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
        for part in self.layers.values():
            whole = whole & part.flatten(1).isfinite().all(1)
        layers = {
            name: part.where(whole.view(-1, *[1] * (part.dim() - 1)), empty.layers[name])
            for name, part in self.layers.items()
        }
        return LaneState(latents, layers)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for saving: [B, ...] each."""
        return {"latents": self.latents, **self.layers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "LaneState":
        """The inverse of `tensors`: [B, ...] each."""
        layers = dict(tensors)
        return cls(layers.pop("latents"), layers)

    @classmethod
    def concatenate(cls, parts: Sequence["LaneState"]) -> "LaneState":
        """Lanes of several micro-batches, side by side."""
        names = parts[0].tensors()
        return cls.from_tensors(
            {name: torch.cat([p.tensors()[name] for p in parts]) for name in names}
        )
