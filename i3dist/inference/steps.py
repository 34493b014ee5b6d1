"""One token of every row through a layer, with the layer's memory in tensors of fixed size.

`LowerStep` and `UpperStep` run a layer's own `forward`, so every layer kind decodes. The kinds in
`STEPS` have a faster step: the same equations, with fewer kernels. These change their memory in
place, so that they can be recorded. On a GPU they are kernels of `i3dist.ops.step_triton`.

Notation: B rows, G rows whose chunk is full, T tokens of a chunk, C history chunks, M keys of an
earlier chunk, H heads, D width.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.inference.place import Place
from i3dist.model.attention import Attention, AttentionBlock
from i3dist.model.block import Block, HistoryBlock, LayerState, LowerBlock, Project
from i3dist.model.dual_attention import DualAttention, DualAttentionBlock
from i3dist.model.layers import ALIGNMENT, LayerNorm, Linear
from i3dist.model.lm import I3LM
from i3dist.model.rwkv import RwkvBlock
from i3dist.ops.attention import NEVER, Branch, KeysValues, attention_bias
from i3dist.ops.layer_norm import add_and_norm_naive
from i3dist.ops.linear import linear
from i3dist.ops.precision import widen
from i3dist.ops.shift_mix import has_kernels
from i3dist.ops.wkv_naive import WkvInputs, wkv_naive

Call = TypeVar("Call", bound=Callable[..., Any])
# With the tuning, products of a single row become reductions, which fuse with what surrounds them.
COMPILE: dict[str, Any] = {
    "dynamic": False,
    "options": {"coordinate_descent_tuning": True, "comprehensive_padding": False},
}


class Sight(NamedTuple):
    """Where each row's token stands, and what it sees."""

    position: Tensor  # [B] int64, in its chunk
    own: Tensor  # [B, T] bool, which tokens of its chunk, itself included
    past: Tensor  # [B, C] bool, which earlier chunks, the oldest first
    order: Tensor  # [B, C] int64, which of `past` each slot of a ring holds


class LowerStep:
    """A layer below the compressor."""

    compiled = False

    def __init__(self, block: LowerBlock, states: Sequence[LayerState]):
        """`states` are those of the rows, [1, ...] each."""
        self.block = block
        self.state: LayerState = tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    def __call__(self, x: Tensor, restart: Tensor) -> Tensor:
        """x [B, D], restart [B] bool -> [B, D]; changes the state."""
        y, self.state = self.block(x.unsqueeze(1), restart.unsqueeze(1), self.state)
        return y.squeeze(1)


class UpperStep:
    """A layer above the compressor, with the keys and values of each row's chunk and history.

    Keys of tokens that were not read yet are 0, and are hidden.
    """

    compiled = False

    def __init__(
        self,
        block: HistoryBlock,
        model: I3LM,
        views: range,
        own: Sequence[KeysValues],
        latents: Tensor,
    ):
        """Begin after the prompts.

        Args:
            block: the layer.
            model: whose layer it is.
            views: the layer's, from `Stack.views`.
            own: of the rows' last chunks, [1, 1, t, D] each.
            latents: of the chunks before, [B, C, M, D], oldest first.
        """
        self.block, self.model, self.views = block, model, views
        self.rows = torch.arange(len(latents), device=latents.device)
        self._place(own, latents)

    def _place(self, own: Sequence[KeysValues], latents: Tensor) -> None:
        length = self.model.settings.chunk_length
        padded = ((F.pad(part, (0, 0, 0, length - part.shape[2])) for part in row) for row in own)
        self.own = KeysValues(*(torch.cat(parts) for parts in zip(*padded, strict=True)))
        self.past = self.block.history(self.project(latents))

    def chunk(self, count: int) -> KeysValues:
        """Of the first `count` tokens of each row's chunk, [B, 1, count, D]."""
        return KeysValues(*(part[:, :, :count] for part in self.own))

    def extend(self, joined: KeysValues, start: int) -> None:
        """Take in the tokens of each row's chunk from place `start` on, of [B, 1, t, D]."""
        for part, new in zip(self.own, joined, strict=True):
            part[:, :, start : new.shape[2]] = new[:, :, start:]

    def project(self, latents: Tensor) -> Project:
        """What multiplies the keys that the layer sees of latents [..., M, D]."""

        def project(weight: Tensor, view: int = 0) -> Tensor:
            keys = self.model.compressor.project(latents, weight, self.views[view])
            return keys + self.model.slots.project(weight)

        return project

    def remember(self, rows: Tensor, latents: Tensor, slot: Tensor) -> None:
        """Take in the chunk that was closed in some rows.

        Args:
            rows: [G] int64; may name a row twice, with the same latents.
            latents: [B, C, M, D], chunks as a ring; the new ones stand where the oldest were.
            slot: [G] int64, where that is.
        """
        latents = in_order(latents[rows], slot + 1)
        for part, new in zip(self.past, self.block.history(self.project(latents)), strict=True):
            part[rows] = new

    def __call__(self, x: Tensor, sight: Sight) -> Tensor:
        """x [B, D] -> the same; adds the tokens to the chunk's keys and values."""
        before = torch.arange(sight.own.shape[1], device=x.device) < sight.position.unsqueeze(-1)
        itself = torch.ones_like(before[:, :1])
        own = torch.cat([sight.own & before, itself], dim=1).unsqueeze(1)
        gate = torch.ones((), device=x.device)
        keys = self.model.keys_per_chunk
        visible = attention_bias(own, sight.past.unsqueeze(1), gate, keys)
        y, joined = self.block(x[:, None, None], self.past, self.own, visible)
        for part, new in zip(self.own, joined, strict=True):
            part[self.rows, 0, sight.position] = new[:, 0, -1]
        return y[:, 0, 0]


class RwkvWeights(NamedTuple):
    """What a step reads beside the block. F is the hidden width of the channel-mix."""

    projections: Tensor  # [3, D, D], of keys, values and receptances
    time_mixes: Tensor  # [3, D]
    channel: Tensor  # [F + D, D], of the channel-mix's keys and receptances
    channel_mixes: Tensor  # [2, D]
    decay: Tensor  # [D] fp32
    bonus: Tensor  # [D] fp32


class RwkvStep(LowerStep):
    """RWKV-4 with the constants computed, and three products as one."""

    block: RwkvBlock

    def __init__(self, block: LowerBlock, states: Sequence[LayerState]):
        super().__init__(block, states)
        time, channel = self.block.time_mix, self.block.channel_mix
        pad = time.width.pad
        projections = _joined(time.key, time.value, time.receptance)
        self.weights = RwkvWeights(
            projections.unflatten(0, (3, -1)),
            pad(torch.stack([time.mix_key, time.mix_value, time.mix_receptance])),
            _joined(channel.key, channel.receptance),
            pad(torch.stack([channel.mix_key, channel.mix_receptance])),
            -torch.exp(pad(time.decay_base) + pad(time.decay_offset)),
            pad(time.bonus_base) + pad(time.bonus_offset),
        )

    def __call__(self, x: Tensor, restart: Tensor) -> Tensor:
        """See `LowerStep`."""
        if has_kernels(x):
            kernels = step_kernels("step_triton")
            return cast("Tensor", kernels.join(self.by_kernels(kernels.Residual(x), restart)))
        step = compile_if(self.compiled, rwkv_step)
        return step(self.block, self.weights, x, restart, *self.state)

    def by_kernels(self, stream: Any, restart: Tensor) -> Any:
        """The same by Triton kernels, of a `step_triton.Residual`."""
        kernels, weights = step_kernels("step_triton"), self.weights
        time, channel = self.block.time_mix, self.block.channel_mix
        wkv, time_shift, channel_shift = self.state
        shift, curves = (time_shift, restart, weights.time_mixes), (weights.decay, weights.bonus)
        norm, output = self.block.norm_time.padded(), time.output.weight
        stream = kernels.time_mix(stream, norm, shift, weights.projections, curves, wkv, output)
        shift = channel_shift, restart, weights.channel_mixes
        norm = self.block.norm_channel.padded()
        return kernels.channel_mix(stream, norm, shift, weights.channel, channel.value.weight)


def _joined(*parts: Linear, spare: int = 0) -> Tensor:
    """The weights of products below each other, which the products then share, and `spare` rows."""
    weights = [part.weight for part in parts]
    sizes = [len(weight) for weight in weights]
    joined = torch.cat([*weights, weights[0].new_zeros(spare, weights[0].shape[1])])
    for part, weight in zip(parts, joined[: sum(sizes)].split(sizes), strict=True):
        part.weight.data = weight  # no second copy in memory
    return joined


class AttentionStep(UpperStep):
    """Attention with all keys in one buffer: history as a ring, whose oldest chunk is replaced by
    the newest, then the chunk's tokens.

    Keys and values are [B, H, C * M + T, D/H].
    """

    block: AttentionBlock
    latents: Tensor | None = None
    """A ring of sub-latents in place of history's keys and values."""

    def _place(self, own: Sequence[KeysValues], latents: Tensor) -> None:
        self.fixed: dict[int, tuple[Tensor, Tensor]] = {}  # of each view, see `project`
        self.attention = self.block.attention
        heads, inner = self.attention.heads, self.attention.inner.computed
        chunks = latents.shape[1]
        self.history = self._make_room(latents)
        size = (heads, self.history + self.model.settings.chunk_length, inner // heads)
        self.keys, self.values = (latents.new_zeros(len(own), *size) for _ in range(2))
        for number, row in enumerate(own):
            for buffer, part in zip((self.keys, self.values), row, strict=True):
                tokens = part[0, 0].unflatten(-1, (heads, -1)).transpose(0, 1)
                buffer[number, :, self.history : self.history + tokens.shape[1]] = tokens
        slots = torch.arange(chunks, device=latents.device).expand(len(own), -1)
        self._write(self.rows, slots, latents)

    def _make_room(self, latents: Tensor) -> int:
        """Make room for history, of latents [B, C, M, D]; how many of its keys are in `keys`."""
        return latents.shape[1] * self.model.keys_per_chunk

    def chunk(self, count: int) -> KeysValues:
        """See `UpperStep.chunk`."""
        parts = (part[:, :, self.history :][:, :, :count] for part in (self.keys, self.values))
        return KeysValues(*(part.transpose(1, 2).flatten(2).unsqueeze(1) for part in parts))

    def extend(self, joined: KeysValues, start: int) -> None:
        """See `UpperStep.extend`."""
        for buffer, part in zip((self.keys, self.values), joined, strict=True):
            new = part[:, 0, start:].unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
            buffer[:, :, self.history + start :][:, :, : new.shape[2]] = new

    def project(self, latents: Tensor) -> Project:
        """See `UpperStep.project`. Products without latents are computed once: attention multiplies
        each of its views by one weight, which stays the same."""
        keys = self.model.compressor.split(latents)

        def project(weight: Tensor, view: int = 0) -> Tensor:
            if view not in self.fixed:
                self.fixed[view] = self._through(weight, view)
            through, offset = self.fixed[view]
            return linear(keys, through) + offset

        return project

    def _through(self, weight: Tensor, view: int) -> tuple[Tensor, Tensor]:
        """What multiplies sub-latents in place of a weight, [out, D] -> [out, d], and what it makes
        of slots, [M, out]."""
        through = self.model.compressor.through(weight, self.views[view])
        return through, self.model.slots.project(weight)

    def remember(self, rows: Tensor, latents: Tensor, slot: Tensor) -> None:
        """See `UpperStep.remember`."""
        self._write(rows, slot.unsqueeze(1), latents[rows, slot].unsqueeze(1))

    def _write(self, rows: Tensor, slots: Tensor, latents: Tensor) -> None:
        """Put chunks with latents [G, N, M, D] into slots [G, N] of rows [G]."""
        attention = self.attention
        first = attention.inner.per_head
        past = attention.past_keys_values(self.project(latents))
        keys, values = (part.unflatten(-1, (attention.heads, -1)) for part in past)
        marks = slots.unsqueeze(-1) == torch.arange(attention.chunks, device=slots.device)
        keys[..., first : first + attention.chunks] += marks[:, :, None, None].to(keys.dtype)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            ring = buffer[:, :, : self.history].unflatten(2, (attention.chunks, -1))
            ring[rows.unsqueeze(1), :, slots] = new.transpose(2, 3)  # [G, N, H, M, D/H]

    def __call__(self, x: Tensor, sight: Sight) -> Tensor:
        """See `UpperStep`."""
        attend = compile_if(self.compiled, attend_step)
        read = attend(self.block, x, self.keys, self.values, sight, self.rows)
        return compile_if(self.compiled, finish_step)(self.block, x, read)

    def by_kernels(self, stream: Any, place: Place) -> Any:
        """The same by Triton kernels, of a `step_triton.Residual`, at the places of the tokens
        after these."""
        weight, heads = self.joined
        kernels, block = step_kernels("step_triton"), self.block
        stream, y = kernels.normed_product(stream, block.norm_attention.padded(), weight)
        attend = step_kernels("attend_triton").attend
        read = attend(y, self.keys, self.values, place, heads, self.sub_latents)
        stream = kernels.add_product(stream, read, block.attention.output.weight)
        up, down = block.ff.up.weight, block.ff.down.weight
        stream, hidden = kernels.normed_product(stream, block.norm_ff.padded(), up, gelu=True)
        return kernels.add_product(stream, hidden, down, "down")

    @functools.cached_property
    def joined(self) -> tuple[Tensor, Any]:
        """The weights that multiply a token, [Y, D], and what `attend` must know."""
        attention, reserve, share = self.attention, None, None
        parts = [attention.query, attention.key_value]
        if isinstance(attention, DualAttention):
            parts.append(attention.reserve)
            reserve, share = attention.reserve_bias, attention.joined
        heads = step_kernels("attend_triton").Heads(
            attention.heads, attention.inner.per_head, attention.chunks,
            self.model.settings.chunk_length, attention.scale, attention.age_bias, reserve, share,
        )  # fmt: skip
        outputs = sum(len(part.weight) for part in parts)
        # Matrix units want rows of results that begin at 32 bytes.
        return _joined(*parts, spare=-outputs % ALIGNMENT), heads

    @property
    def sub_latents(self) -> Any:
        """History as `attend` reads it in place of keys; None is keys."""
        return None


class LatentStep(AttentionStep):
    """The same for many rows, by Triton kernels that read history as sub-latents.

    These are the same for all heads, and a closed chunk makes no keys. Keys and values are the
    chunk's own, [B, H, T, D/H]; sub-latents are [B, C, M, d].
    """

    def _make_room(self, latents: Tensor) -> int:
        sub_latents = self.model.compressor.split(latents)
        self.latents = torch.zeros_like(sub_latents)
        return 0

    def _write(self, rows: Tensor, slots: Tensor, latents: Tensor) -> None:
        assert self.latents is not None
        self.latents[rows.unsqueeze(1), slots] = self.model.compressor.split(latents)

    def remember(self, rows: Tensor, latents: Tensor, slot: Tensor) -> None:
        """See `UpperStep.remember`: who closes the chunk writes its sub-latents, for all layers."""

    @functools.cached_property
    def sub_latents(self) -> Any:
        """See `AttentionStep.sub_latents`."""
        parts = self.attention.past_keys_values(self._fused)
        keys, values = (part.unflatten(-1, (self.attention.heads, -1)) for part in parts)
        # [R + M, H, D] each
        history = step_kernels("attend_triton").History
        return history(
            self.latents, keys.permute(1, 2, 0).contiguous(), values.transpose(0, 1).contiguous()
        )

    def _fused(self, weight: Tensor, view: int = 0) -> Tensor:
        """What makes keys and values of sub-latents' channels, and of slots: [d + M, out]."""
        through, offset = self._through(weight, view)
        return torch.cat([through.T, offset])


STEPS: dict[type[Block], Any] = {
    RwkvBlock: RwkvStep,
    AttentionBlock: AttentionStep,
    DualAttentionBlock: AttentionStep,
}


def upper_step(
    block: HistoryBlock, model: I3LM, latents: Tensor, by_kernels: bool
) -> type[UpperStep]:
    """Which step a layer above the compressor takes.

    Args:
        block: the layer.
        model: whose layer it is.
        latents: of all rows, [B, C, M, D].
        by_kernels: whether all layers are called by kernels.
    """
    step: type[UpperStep] = STEPS.get(type(block), UpperStep)
    if step is not AttentionStep or not by_kernels:
        return step
    assert isinstance(block, AttentionBlock)
    channels = model.compressor.split(latents[:, :0]).shape[-1]
    fits = step_kernels("attend_triton").reads_latents
    rows, heads = len(latents), block.attention.heads
    return LatentStep if fits(rows, heads, channels, latents.element_size()) else step


def in_order(latents: Tensor, oldest: Tensor) -> Tensor:
    """Chunks [B, C, M, D] of a ring, the oldest first; `oldest` [B] int64 are their slots."""
    rows, chunks = (torch.arange(size, device=oldest.device) for size in latents.shape[:2])
    return latents[rows.unsqueeze(1), (oldest.unsqueeze(1) + chunks) % len(chunks)]


@functools.cache
def step_kernels(name: str) -> ModuleType:
    """A module of Triton kernels, loaded on first use: Triton comes with PyTorch for CUDA only."""
    return importlib.import_module(f"i3dist.ops.{name}")


def compile_if(wanted: bool, call: Call) -> Call:
    """The function, compiled where that is wanted."""
    return cast("Call", _compiled(call)) if wanted else call


@functools.cache
def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, **COMPILE)


def rwkv_step(
    block: RwkvBlock,
    weights: RwkvWeights,
    x: Tensor,
    restart: Tensor,
    wkv: Tensor,
    time_shift: Tensor,
    channel_shift: Tensor,
) -> Tensor:
    """`RwkvBlock.forward` of one token, x [B, D], which changes the state in place."""
    restart = restart.unsqueeze(1)
    inputs, x = _mix(block.norm_time, weights.time_mixes, x, restart, time_shift)
    pairs = zip(inputs, weights.projections, strict=True)
    k, v, r = (F.linear(part, weight).unsqueeze(1) for part, weight in pairs)
    y, state = wkv_naive(WkvInputs(weights.decay, weights.bonus, k, v, restart, wkv, r))
    wkv.copy_(state)
    read = block.time_mix.output(y.squeeze(1))
    inputs, x = _mix(block.norm_channel, weights.channel_mixes, x, restart, channel_shift, read)
    return x + block.channel_mix(inputs)


def _mix(
    norm: LayerNorm,
    mixes: Tensor,
    x: Tensor,
    restart: Tensor,
    shift: Tensor,
    branch: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """`norm_and_mix` of one token, x [B, D]: the inputs, and x + branch. Changes the shift."""
    normed, x = add_and_norm_naive(x, norm.padded(), branch)
    before = shift.masked_fill(restart, 0.0)
    inputs = [torch.lerp(before, normed, mix) for mix in mixes]
    shift.copy_(normed)
    return inputs, x


def attend_step(
    block: AttentionBlock, x: Tensor, keys: Tensor, values: Tensor, sight: Sight, rows: Tensor
) -> Tensor:
    """What attention reads for one token, x [B, D] -> [B, D]; adds to keys and values in place."""
    attention = block.attention
    history = keys.shape[2] - sight.own.shape[1]
    normed, _ = add_and_norm_naive(x, block.norm_attention.padded())
    now = attention.keys_values(normed)
    for buffer, new in ((keys, now.keys), (values, now.values)):
        buffer[rows, :, history + sight.position] = new.unflatten(-1, (attention.heads, -1))
    query = _turned(attention, normed, sight.order)
    logits = widen(query.unsqueeze(2) @ keys.transpose(-1, -2)).squeeze(2) * attention.scale
    past = sight.past.gather(1, sight.order)
    past = past.unsqueeze(-1).expand(-1, -1, history // past.shape[1]).flatten(1)  # of each key
    visible = torch.cat([past, sight.own], dim=1).unsqueeze(1)
    logits = logits.masked_fill(~visible, NEVER)  # [B, H, C * M + T]
    if isinstance(attention, DualAttention):
        return _read_apart(attention, normed, logits, values, history)
    return _weigh(logits, values)


def finish_step(block: AttentionBlock, x: Tensor, read: Tensor) -> Tensor:
    """What follows attention in `AttentionBlock.forward`, [B, D] each -> [B, D]."""
    normed, x = add_and_norm_naive(x, block.norm_ff.padded(), block.attention.output(read))
    return x + block.ff(normed)


def _turned(attention: Attention, normed: Tensor, order: Tensor) -> Tensor:
    """Queries [B, H, D/H] of tokens [B, D], with the logits of ages by slot."""
    first, chunks = attention.inner.per_head, attention.chunks
    query = attention.queries(normed[:, None, None])[:, 0, 0].unflatten(-1, (attention.heads, -1))
    ages = query[..., first : first + chunks]
    ages = ages.gather(-1, order.unsqueeze(1).expand_as(ages))
    return torch.cat([query[..., :first], ages, query[..., first + chunks :]], dim=-1)


def _weigh(logits: Tensor, values: Tensor) -> Tensor:
    """The softmax of logits [B, H, S] over values [B, H, S, D/H]: [B, D]."""
    shares = logits.softmax(-1).to(values.dtype)
    return (shares.unsqueeze(2) @ values).flatten(1)


def _read_apart(
    attention: DualAttention, normed: Tensor, logits: Tensor, values: Tensor, history: int
) -> Tensor:
    """What `DualAttention` reads: [B, D]."""
    branches = []
    for keys in (slice(history, None), slice(history)):
        mixed, total = (
            _weigh(logits[..., keys], values[:, :, keys]),
            logits[..., keys].logsumexp(-1),
        )
        branches.append(Branch(mixed[:, None, None], total[:, None, None]))
    return attention.join(normed[:, None, None], *branches)[:, 0, 0]
