"""RWKV-4 blocks (Peng et al., 2023, arXiv:2305.13048). Notation: N rows, T tokens, D width.

Initial decay, bonus and mix curves are those of the paper's reference implementation. Token shift
and WKV state restart wherever `restart` is true.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.model.block import LayerState, LowerBlock, Place
from i3dist.model.layers import Channels, LayerNorm, Linear
from i3dist.ops.shift_mix import Mixed, MixInputs, norm_shift_mix
from i3dist.ops.wkv import WkvInputs, empty_state, wkv


def norm_and_mix(
    norm: LayerNorm,
    mixes: Sequence[Tensor],
    x: Tensor,
    restart: Tensor,
    shift: Tensor,
    branch: Tensor | None = None,
) -> Mixed:
    """The inputs of a branch: normalised x, mixed with the previous position's.

    Args:
        norm: of the branch.
        mixes: [D] each, the share of the present position in each channel of an input.
        x: [N, T, D], the residual stream.
        restart: [N, T] bool, where nothing stands before a position.
        shift: [N, D], normalised, what stands before position 0.
        branch: [N, T, D], the output of an earlier branch that is still to be added to x, or None.

    Returns:
        One input [N, T, D] for each of `mixes`, the shift of what follows [N, D], and the residual
        stream with the earlier branch added.
    """
    shares = torch.stack([norm.channels.pad(mix) for mix in mixes])
    weight, bias, channels, eps = norm.padded()
    return norm_shift_mix(MixInputs(x, weight, bias, shares, restart, shift, channels, eps, branch))


def _mix_curve(width: int, power: float, offset: float = 0.0) -> nn.Parameter:
    """Share of the present position in each channel's input: [D], rising from `offset`."""
    return nn.Parameter((torch.arange(width) / width).pow(power) + offset)


class TimeMix(nn.Module):
    """Receptance-gated WKV of mixed inputs. 4 D^2 parameters.

    The kernel takes decay and bonus in fp32. Each is the sum of an fp32 buffer, its initial curve,
    and a learned offset that starts at zero: an engine that casts parameters to bf16 rounds only
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
        self, inputs: Sequence[Tensor], restart: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Three inputs [N, T, D], state [N, 3, D] fp32 -> output [N, T, D] and final state."""
        for_key, for_value, for_receptance = inputs
        k, v, r = self.key(for_key), self.value(for_value), self.receptance(for_receptance)
        pad = self.width.pad
        # An fp32 buffer plus a bf16 parameter is fp32.
        decay = -torch.exp(pad(self.decay_base) + pad(self.decay_offset))
        bonus = pad(self.bonus_base) + pad(self.bonus_offset)
        y, state = wkv(WkvInputs(decay, bonus, k, v, restart, state, r))
        return self.output(y), state


class ChannelMix(nn.Module):
    """Gated feed-forward with squared ReLU (So et al., 2021) of mixed inputs. 9 D^2 parameters at
    4x."""

    def __init__(self, width: Channels, mult: int, layer: int, layers: int):
        super().__init__()
        power = 1.0 - layer / layers
        self.mix_key = _mix_curve(width.stored, power)
        self.mix_receptance = _mix_curve(width.stored, power)
        self.key = Linear(width, width.times(mult))
        self.value = Linear(width.times(mult), width)
        self.receptance = Linear(width, width)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Two inputs [N, T, D] -> [N, T, D]."""
        for_key, for_receptance = inputs
        hidden = F.relu(self.key(for_key)).square()
        return torch.sigmoid(self.receptance(for_receptance)) * self.value(hidden)


class RwkvBlock(LowerBlock):
    """Pre-norm time-mix and channel-mix, each with a residual connection.

    The state is that of WKV [N, 3, D] fp32 (numerator, denominator, running maximum), and the
    normalised inputs of the last position's time-mix and channel-mix, [N, D] each.
    """

    state_parts = ("wkv", "time_shift", "channel_shift")
    kept_values = 22

    def __init__(self, place: Place):
        super().__init__(place)
        settings, width, layer, layers = place
        self.norm_time = LayerNorm(width)
        self.norm_channel = LayerNorm(width)
        self.time_mix = TimeMix(width, layer, layers)
        self.channel_mix = ChannelMix(width, settings.ff_mult, layer, layers)

    @classmethod
    def empty_state(cls, rows: int, width: int, like: Tensor) -> LayerState:
        """See `LowerBlock.empty_state`: [rows, 3, width] fp32, and [rows, width] twice."""
        shifts = (like.new_zeros(rows, width) for _ in range(2))
        return empty_state(rows, width, like.device), *shifts

    def forward(self, x: Tensor, restart: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """See `LowerBlock.forward`: x [N, T, D] -> the same, and the state after it."""
        wkv_state, time_shift, channel_shift = state
        time, channel = self.time_mix, self.channel_mix
        mixes: tuple[Tensor, ...] = time.mix_key, time.mix_value, time.mix_receptance
        inputs, time_shift, x = norm_and_mix(self.norm_time, mixes, x, restart, time_shift)
        mixed, wkv_state = time(inputs, restart, wkv_state)
        mixes = channel.mix_key, channel.mix_receptance
        inputs, channel_shift, x = norm_and_mix(
            self.norm_channel, mixes, x, restart, channel_shift, mixed
        )
        state = wkv_state.detach(), time_shift.detach(), channel_shift.detach()
        return x + channel(inputs), state
