"""RWKV-4 blocks (Peng et al., 2023, arXiv:2305.13048). Letters: N rows, T tokens, D width.

Initial decay, bonus and mix curves are those of the reference implementation that accompanies the
paper. Token shift and WKV state restart wherever `restart` is true.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.model.layers import Channels, LayerNorm, Linear
from i3dist.ops.wkv import wkv


def token_shift(x: Tensor, restart: Tensor, before: Tensor) -> Tensor:
    """The previous position's x; zero where the position restarts.

    Args:
        x: [N, T, D].
        restart: [N, T] bool.
        before: [N, D], what stood before position 0.
    """
    shifted = torch.cat([before.unsqueeze(1), x[:, :-1]], dim=1)
    return shifted.masked_fill(restart.unsqueeze(-1), 0.0)


def _mix_curve(width: int, power: float, offset: float = 0.0) -> nn.Parameter:
    """Share of the present position in each channel's input: [D], rising from `offset`."""
    return nn.Parameter((torch.arange(width) / width).pow(power) + offset)


class TimeMix(nn.Module):
    """Token-shifted, receptance-gated WKV. 4 D^2 parameters.

    The decay and bonus reach the kernel in fp32. Each is an fp32 buffer (its initial curve) plus a
    learned offset that starts at zero: an engine that casts parameters to bf16 then rounds only
    the small offset (docs/decisions.md has the measurement).
    """

    decay_base: Tensor
    bonus_base: Tensor

    def __init__(self, width: Channels, layer: int, layers: int):
        super().__init__()
        self.width = width
        ratio = layer / max(1, layers - 1)
        power = 1.0 - layer / layers
        channel = torch.arange(width.stored) / max(1, width.stored - 1)
        zigzag = ((torch.arange(width.stored) + 1) % 3 - 1) * 0.5
        self.register_buffer("decay_base", -5.0 + 8.0 * channel.pow(0.7 + 1.3 * ratio))
        self.register_buffer("bonus_base", math.log(0.3) + zigzag)
        self.decay_offset = nn.Parameter(torch.zeros(width.stored))
        self.bonus_offset = nn.Parameter(torch.zeros(width.stored))
        self.mix_key = _mix_curve(width.stored, power)
        self.mix_value = _mix_curve(width.stored, power, 0.3 * ratio)
        self.mix_receptance = _mix_curve(width.stored, 0.5 * power)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.receptance = Linear(width, width)
        self.output = Linear(width, width)

    def forward(
        self, x: Tensor, restart: Tensor, shift: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [N, T, D], shift [N, D], state [N, 3, D] fp32 -> output [N, T, D] and final state."""
        before = token_shift(x, restart, shift)
        pad = self.width.pad
        k = self.key(torch.lerp(before, x, pad(self.mix_key)))
        v = self.value(torch.lerp(before, x, pad(self.mix_value)))
        r = self.receptance(torch.lerp(before, x, pad(self.mix_receptance)))
        # An fp32 buffer plus a bf16 parameter is fp32.
        decay = -torch.exp(pad(self.decay_base) + pad(self.decay_offset))
        bonus = pad(self.bonus_base) + pad(self.bonus_offset)
        y, state = wkv(decay, bonus, k, v, restart, state)
        return self.output(torch.sigmoid(r) * y), state


class ChannelMix(nn.Module):
    """Token-shifted feed-forward with squared ReLU (So et al., 2021). 9 D^2 parameters at 4x."""

    def __init__(self, width: Channels, mult: int, layer: int, layers: int):
        super().__init__()
        self.width = width
        power = 1.0 - layer / layers
        self.mix_key = _mix_curve(width.stored, power)
        self.mix_receptance = _mix_curve(width.stored, power)
        self.key = Linear(width, width.times(mult))
        self.value = Linear(width.times(mult), width)
        self.receptance = Linear(width, width)

    def forward(self, x: Tensor, restart: Tensor, shift: Tensor) -> Tensor:
        """x [N, T, D], shift [N, D] -> [N, T, D]."""
        before, pad = token_shift(x, restart, shift), self.width.pad
        hidden = F.relu(self.key(torch.lerp(before, x, pad(self.mix_key)))).square()
        gate = torch.sigmoid(self.receptance(torch.lerp(before, x, pad(self.mix_receptance))))
        return gate * self.value(hidden)


class RwkvBlock(nn.Module):
    """Pre-norm time-mix and channel-mix, each with a residual connection."""

    def __init__(self, width: Channels, mult: int, layer: int, layers: int):
        super().__init__()
        self.norm_time = LayerNorm(width)
        self.norm_channel = LayerNorm(width)
        self.time_mix = TimeMix(width, layer, layers)
        self.channel_mix = ChannelMix(width, mult, layer, layers)

    def forward(
        self, x: Tensor, restart: Tensor, state: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x [N, T, D]; state (wkv [N, 3, D] fp32, time shift [N, D], channel shift [N, D])."""
        wkv_state, time_shift, channel_shift = state
        time_in = self.norm_time(x)
        mixed, wkv_state = self.time_mix(time_in, restart, time_shift, wkv_state)
        x = x + mixed
        channel_in = self.norm_channel(x)
        x = x + self.channel_mix(channel_in, restart, channel_shift)
        return x, (wkv_state, time_in[:, -1], channel_in[:, -1])
