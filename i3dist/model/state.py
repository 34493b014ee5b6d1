"""What a lane carries from window to window. Letters: B rows, M latents, D width.

State is functional: it goes into the model and comes out; nothing is changed in place, so that
activation recomputation cannot append twice. Every tensor is row-first, so that a lane is a row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i3dist.config import ModelSettings
from i3dist.ops.wkv import empty_state


class RwkvState(NamedTuple):
    """Recurrent state of the RWKV blocks; R is their number, or 0 where nothing is carried."""

    wkv: Tensor  # [B, R, 3, D] fp32: numerator, denominator, running maximum
    time_shift: Tensor  # [B, R, D] input of the last position's time-mix
    channel_shift: Tensor  # [B, R, D] input of the last position's channel-mix

    @classmethod
    def empty(
        cls, rows: int, layers: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> "RwkvState":
        """The state before a document's first token, one in memory for all layers."""
        wkv = empty_state(rows, width, device).unsqueeze(1).expand(-1, layers, -1, -1)
        shifts = (torch.zeros(rows, 1, width, device=device, dtype=dtype) for _ in range(2))
        return cls(wkv, *(shift.expand(-1, layers, -1) for shift in shifts))

    def map(self, change: Callable[[Tensor], Tensor]) -> "RwkvState":
        """Every tensor changed alike."""
        return RwkvState(*(change(part) for part in self))


class LaneState(NamedTuple):
    """The memory of B lanes: the newest compressed chunks, oldest first, and carried RWKV state.

    Which of the latents are visible is not stored: it follows from the data (`Batch.depth`).
    """

    latents: Tensor  # [B, history_chunks, M, D]
    rwkv: RwkvState

    @classmethod
    def empty(
        cls, rows: int, model: ModelSettings, device: torch.device, dtype: torch.dtype
    ) -> "LaneState":
        """The state of lanes that have read nothing yet."""
        latents = torch.zeros(
            rows, model.history_chunks, model.latents, model.d_model, device=device, dtype=dtype
        )
        carried = model.rwkv_layers if model.state_carry else 0
        return cls(latents, RwkvState.empty(rows, carried, model.d_model, device, dtype))

    def rows(self, start: int, stop: int) -> "LaneState":
        """Lanes [start, stop)."""
        return self.map(lambda x: x[start:stop])

    def map(self, change: Callable[[Tensor], Tensor]) -> "LaneState":
        """Every tensor changed alike."""
        return LaneState(change(self.latents), self.rwkv.map(change))

    def detach(self) -> "LaneState":
        """The same values without their past: gradient ends at the window's start."""
        return self.map(Tensor.detach)

    def finite(self) -> "LaneState":
        """The same, but as nothing had been read where something is not finite.

        Latents are emptied chunk by chunk, so that the others keep their age; RWKV state by lane.
        """
        chunks = self.latents.isfinite().all(-1).all(-1)  # [B, history_chunks]
        latents = self.latents.where(chunks[..., None, None], 0)
        rows, layers = self.rwkv.time_shift.shape[:2]
        width, kept = self.latents.shape[-1], self.rwkv.time_shift
        empty = RwkvState.empty(rows, layers, width, kept.device, kept.dtype)
        whole = torch.stack([part.flatten(1).isfinite().all(1) for part in self.rwkv]).all(0)
        parts = (
            part.where(whole.view(-1, *[1] * (part.dim() - 1)), other)
            for part, other in zip(self.rwkv, empty, strict=True)
        )
        return LaneState(latents, RwkvState(*parts))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for saving; each has lanes as its first dimension."""
        return {"latents": self.latents, **self.rwkv._asdict()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "LaneState":
        """The inverse of `tensors`."""
        return cls(tensors["latents"], RwkvState(*(tensors[name] for name in RwkvState._fields)))

    @classmethod
    def concatenate(cls, parts: Sequence["LaneState"]) -> "LaneState":
        """Lanes of several micro-batches, side by side."""
        names = parts[0].tensors()
        return cls.from_tensors(
            {name: torch.cat([p.tensors()[name] for p in parts]) for name in names}
        )
