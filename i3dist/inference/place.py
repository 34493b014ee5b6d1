"""Where the rows of a batch are in their streams. Notation: B rows, G of them, C history chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i3dist.inference.prompt import Prompt


class Place(NamedTuple):
    """Where the rows are in their streams, [B] each. Steps change it in place."""

    position: Tensor  # int64, of the next token in its chunk
    start: Tensor  # int64, first token of the chunk's last document
    opened: Tensor  # bool, whether that document began in this chunk
    depth: Tensor  # int64, chunks before this one that belong to the document it continues
    oldest: Tensor  # int64, slot of the oldest chunk in a ring of C

    @classmethod
    def after(cls, prompts: Sequence[Prompt]) -> "Place":
        """The places after prompts."""
        segments = [row.segments for row in prompts]
        device = segments[0].device
        position = torch.tensor([len(row) for row in segments], device=device)
        start = torch.stack([(row < row[-1]).sum() for row in segments])
        opened = torch.stack([row[-1] > 0 for row in segments])
        depth = torch.tensor([row.depth for row in prompts], device=device)
        return cls(position, start, opened, depth, torch.zeros_like(position))

    def close(self, rows: Tensor, chunks: int) -> None:
        """Move rows [G] to the start of their next chunk; `chunks` is C."""
        self.oldest[rows] = (self.oldest[rows] + 1) % chunks
        self.depth[rows] = torch.where(self.opened[rows], 1, self.depth[rows] + 1)
        for part in (self.position, self.start, self.opened):
            part[rows] = torch.zeros_like(part[rows])
