"""Two layer kinds as a user might add them: one without state, one that carries two tensors."""

import torch
from torch import Tensor, nn

from i3dist.model.block import LayerState, LowerBlock, Place
from i3dist.model.layers import FeedForward, LayerNorm


class Mlp(LowerBlock):
    """A feed-forward layer with a residual connection."""

    def __init__(self, place: Place):
        super().__init__(place)
        self.norm = LayerNorm(place.width)
        self.ff = FeedForward(place.width, place.settings.ff_mult)

    def forward(self, x: Tensor, restart: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        normed, x = self.norm.of_sum(x)
        return x + self.ff(normed), state


class Conv(LowerBlock):
    """A causal convolution of each channel over three tokens, with a residual connection."""

    state_parts = ("one_back", "two_back")

    def __init__(self, place: Place):
        super().__init__(place)
        self.norm = LayerNorm(place.width)
        self.taps = nn.Parameter(torch.zeros(3, place.width.stored))

    def forward(self, x: Tensor, restart: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        seen, x = self.norm.of_sum(x)
        taps, after = self.norm.channels.pad(self.taps), []
        y = taps[0] * seen
        for tap, before in zip(taps[1:], state, strict=True):
            after.append(seen[:, -1].detach())
            seen = torch.cat([before.unsqueeze(1), seen[:, :-1]], dim=1)
            seen = seen.masked_fill(restart.unsqueeze(-1), 0.0)
            y = y + tap * seen
        return x + y, tuple(after)


class Forgetful(Conv):
    """Wrong: it hands on the state that it was given."""

    def forward(self, x: Tensor, restart: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        return super().forward(x, restart, state)[0], state
