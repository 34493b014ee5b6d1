"""The i3 language model for transformers: RWKV layers below, attention with history above.

A row is a stream of documents, each opened by the token <BOS>, and is read in chunks of T tokens.
When a chunk is full a compressor turns the output of its RWKV layers into M latents. The attention
layers see the tokens of their chunk and the latents of the C chunks before it. Documents never see
each other.

Notation: B rows (sequences), n new tokens of a row, T tokens of a chunk, S of them read so far,
D width, H heads, d = D / H, M latents, R keys of a latent, C chunks of history, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_i3 import I3Config

EMPTY = torch.finfo(
    torch.float32
).min  # running maximum of no exponent; finite, as inf - inf is NaN
NEVER = -1e9  # logit of a key that is not seen; finite, so that a softmax of such keys is not NaN
NOT_KEPT = -1e4  # router score of a token of another document: its sigmoid is 0


def wide(x: Tensor) -> Tensor:
    """x, of any shape, in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Piece(NamedTuple):
    """New tokens of each row that lie in one chunk, in columns. The columns behind a row's tokens
    hold anything."""

    counts: Tensor  # [B], tokens of each row
    rows: Tensor  # [N], the row of each of all these tokens,
    columns: Tensor  # [N], its column,
    slots: Tensor  # [N], and where it stands in its chunk, below T
    restart: Tensor  # [B, n] bool, before which tokens recurrent state is emptied
    size: int  # S, the largest number of tokens of a row's chunk, these included

    def put(self, kept: Tensor, x: Tensor) -> Tensor:
        """Add what x [B, n, ...] holds of the tokens to that of the chunk's earlier ones:
        [B, S, ...]."""
        missing = (0, 0) * (x.dim() - 2) + (0, self.size - kept.shape[1])
        kept = F.pad(kept.to(x.dtype), missing)
        return kept.index_put((self.rows, self.slots), x[self.rows, self.columns])

    def after(self, states: Tensor) -> Tensor:
        """The last of states [B, 1 + n, ...], which begin with the one before: [B, ...]."""
        return states[torch.arange(len(states), device=states.device), self.counts]


class Seen(NamedTuple):
    """What the tokens of a piece attend to."""

    own: Tensor  # [B, 1, n, S] bool, which tokens of the chunk
    history: Tensor  # [B, 1, n, c] bool, which earlier chunks, the oldest first


def wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, restart: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-4 (Peng et al., 2023, arXiv:2305.13048), in parallel over time.

        y_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t})
        a_t = e^w a_{t-1} + e^{k_t} v_t         b_t = e^w b_{t-1} + e^{k_t}

    a and b are stored divided by e^m, where m is the largest exponent in them, a constant to
    differentiation. Each step below joins what stands before a token to stretches twice as long.

    Args:
        k: [B, n, D], in the dtype of computation.
        v: [B, n, D].
        w: [D], log of the decay of a step, negative.
        u: [D], bonus of the present token.
        restart: [B, n] bool, before which tokens a = b = 0.
        state: [B, 3, D], a, b and m before the first token.

    Returns:
        y [B, n, D], and the states before the first and after each token [B, 1 + n, 3, D].
    """
    unit = (k - k.detach()).exp()  # 1, with the gradient of e^k
    alone = torch.stack([unit * v, unit, k.detach()], dim=2)
    a, b, m = torch.cat([state.unsqueeze(1), alone], dim=1).unbind(2)
    document = F.pad(restart, (1, 0)).cumsum(1)
    span = 1
    while span < a.shape[1]:
        together = document[:, span:] == document[:, :-span]
        before = m[:, :-span].masked_fill(~together.unsqueeze(-1), EMPTY)
        aged = before + span * w
        rounded = (before - aged + span * w).detach()  # what aged has lost
        top = torch.maximum(aged, m[:, span:]).detach()
        old, new = (aged - top + rounded).exp(), (m[:, span:] - top).exp()
        a = torch.cat([a[:, :span], old * a[:, :-span] + new * a[:, span:]], dim=1)
        b = torch.cat([b[:, :span], old * b[:, :-span] + new * b[:, span:]], dim=1)
        m = torch.cat([m[:, :span], top], dim=1)
        span *= 2
    before = m[:, :-1].masked_fill(restart.unsqueeze(-1), EMPTY)
    top = torch.maximum(before, u + k).detach()
    old, new = (before - top).exp(), (u + k - top).exp()
    y = (old * a[:, :-1] + new * v) / (old * b[:, :-1] + new)
    return y, torch.stack([a, b, m], dim=2)


class TimeMix(nn.Module):
    """sigmoid(r) * wkv(k, v), each a projection of shifted tokens."""

    decay_base: Tensor
    bonus_base: Tensor

    def __init__(self, config: I3Config):
        super().__init__()
        width = config.d_model
        # Decay and bonus are an initial curve, which stays in fp32, and a learned offset.
        self.register_buffer("decay_base", torch.zeros(width))
        self.register_buffer("bonus_base", torch.zeros(width))
        self.decay_offset = nn.Parameter(torch.zeros(width))
        self.bonus_offset = nn.Parameter(torch.zeros(width))
        self.mix_key = nn.Parameter(torch.zeros(width))
        self.mix_value = nn.Parameter(torch.zeros(width))
        self.mix_receptance = nn.Parameter(torch.zeros(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(
        self, now: Tensor, before: Tensor, piece: Piece, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normed tokens [B, n, D], those before them, state [B, 3, D] -> [B, n, D], new state."""
        k = wide(self.key(torch.lerp(before, now, self.mix_key)))
        v = wide(self.value(torch.lerp(before, now, self.mix_value)))
        r = wide(self.receptance(torch.lerp(before, now, self.mix_receptance)))
        w = -torch.exp(wide(self.decay_base) + wide(self.decay_offset))
        u = wide(self.bonus_base) + wide(self.bonus_offset)
        # The steps of the scan take much memory: they are computed again for the gradient.
        inputs = (k, v, w, u, piece.restart, state)
        y, states = (
            checkpoint(wkv, *inputs, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else wkv(*inputs)
        )
        return self.output((r.sigmoid() * y).to(now.dtype)), piece.after(states)


class ChannelMix(nn.Module):
    """sigmoid(r) * value(relu(k)^2), with projections of shifted tokens."""

    def __init__(self, config: I3Config):
        super().__init__()
        width, inner = config.d_model, config.ff_mult * config.d_model
        self.mix_key = nn.Parameter(torch.zeros(width))
        self.mix_receptance = nn.Parameter(torch.zeros(width))
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(inner, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)

    def forward(self, now: Tensor, before: Tensor) -> Tensor:
        """Normed tokens [B, n, D], and those before them -> [B, n, D]."""
        k = self.key(torch.lerp(before, now, self.mix_key))
        r = self.receptance(torch.lerp(before, now, self.mix_receptance))
        return r.sigmoid() * self.value(k.relu().square())


class RwkvBlock(GradientCheckpointingLayer):
    """Time-mix and channel-mix, each with its norm, token shift and residual connection."""

    def __init__(self, config: I3Config):
        super().__init__()
        self.norm_time = nn.LayerNorm(config.d_model)
        self.norm_channel = nn.LayerNorm(config.d_model)
        self.time_mix = TimeMix(config)
        self.channel_mix = ChannelMix(config)

    def forward(
        self, x: Tensor, piece: Piece, state: Tensor, time: Tensor, channel: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, n, D] -> the same, and the three parts of the new state.

        Args:
            x: the residual stream.
            piece: where its tokens stand.
            state: of `wkv`, [B, 3, D].
            time: the normed token before the piece, for time-mix [B, D].
            channel: the same for channel-mix.
        """
        now, before, time = self.shift(self.norm_time(x), time, piece)
        y, state = self.time_mix(now, before, piece, state)
        x = x + y
        now, before, channel = self.shift(self.norm_channel(x), channel, piece)
        return x + self.channel_mix(now, before), state, time, channel

    @staticmethod
    def shift(now: Tensor, last: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, n, D], those before them, and the last of them [B, D]."""
        every = torch.cat([last.unsqueeze(1), now], dim=1)
        before = every[:, :-1].masked_fill(piece.restart.unsqueeze(-1), 0.0)
        return now, before, piece.after(every)


class FeedForward(nn.Module):
    """down(GELU(up(x)))."""

    def __init__(self, config: I3Config):
        super().__init__()
        width, inner = config.d_model, config.ff_mult * config.d_model
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> the same."""
        return self.down(F.gelu(self.up(x)))


class LiteralCompressor(nn.Module):
    """M learned queries read the chunk by cross-attention (Perceiver, arXiv:2103.03206)."""

    def __init__(self, config: I3Config, views: int):
        super().__init__()
        width = config.d_model
        self.heads, self.views = config.heads, views
        self.queries = nn.Parameter(torch.zeros(config.latents, width))
        self.norm_in, self.norm_ff, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ff = FeedForward(config)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Compress [B, T, D], of which the tokens `keep` [B, T] count, to [B, M, D]."""
        k, v = self.key_value(self.norm_in(hidden)).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (self.query(self.queries), k, v))
        logits = wide(q @ k.mT) * q.shape[-1] ** -0.5
        shares = logits.masked_fill(~keep[:, None, None], NEVER).softmax(-1)
        latents = self.queries + self.output(merge_heads(shares.to(v.dtype) @ v))
        return self.norm_out(latents + self.ff(self.norm_ff(latents)))

    def unfold(self, latents: Tensor) -> Sequence[Tensor]:
        """What attention sees of latents, by views: themselves, [B, M, D] each."""
        return [latents] * self.views


class RecordsCompressor(nn.Module):
    """A latent is R sub-latents of D/R channels, each made for one token that a router chooses."""

    def __init__(self, config: I3Config, views: int):
        super().__init__()
        width = config.d_model
        self.part = part = width // config.sub_latents
        self.views = views
        self.queries = nn.Parameter(torch.zeros(config.latents, width))
        self.norm_in, self.norm_ff = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(part)
        self.salience = nn.Linear(width, 1, bias=False)  # the router
        self.query = nn.Linear(width, part, bias=False)
        self.key = nn.Linear(width, part, bias=False)
        self.record = nn.Linear(width, part, bias=False)  # the values
        self.ff = FeedForward(config)
        self.token = nn.Linear(part, views * width, bias=False)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Compress [B, T, D], of which the tokens `keep` [B, T] count, to [B, M, D]."""
        n, part = self.norm_in(hidden), self.part
        learned = self.queries.view(-1, part)
        score = (wide(n) * wide(self.salience.weight[0])).sum(-1).masked_fill(~keep, NOT_KEPT)
        ranked = score.sort(dim=-1, descending=True, stable=True).indices
        chosen = ranked[:, : len(learned)].sort(-1).values  # [B, M R]
        place = chosen.unsqueeze(-1)

        q, k, v = (
            project(n).masked_fill(~keep.unsqueeze(-1), 0.0)
            for project in (self.query, self.key, self.record)
        )
        q = q.gather(1, place.expand(-1, -1, part)) + learned
        logits = wide(q @ k.mT) * part**-0.5 + self.prior(place, keep.shape[1]).log()
        shares = logits.masked_fill(~keep.unsqueeze(1), float("-inf")).softmax(-1)

        latents = (shares.to(v.dtype) @ v).view(len(n), *self.queries.shape) + self.queries
        latents = latents + self.ff(self.norm_ff(latents))
        size = 2 * score.gather(1, chosen).sigmoid().unsqueeze(-1).to(n.dtype)
        return (size * self.norm_out(latents.unflatten(-1, (-1, part)).flatten(1, 2))).view_as(
            latents
        )

    @staticmethod
    def prior(place: Tensor, length: int) -> Tensor:
        """Initial shares of tokens: a sub-latent's own, those near it, and all: [B, M R, T]."""
        distance = (torch.arange(length, device=place.device) - place).abs()
        return 0.94 * (distance == 0) + 0.05 / 17 * (distance <= 8) + 0.01 / length

    def unfold(self, latents: Tensor) -> Sequence[Tensor]:
        """What attention sees of latents [B, M, D], by views: sub-latents as tokens [B, M R, D]."""
        parts = latents.reshape(len(latents), -1, self.part)
        return self.token(parts).chunk(self.views, dim=-1)


class Slots(nn.Module):
    """A learned vector for each key of an earlier chunk."""

    def __init__(self, keys: int, width: int):
        super().__init__()
        self.slot = nn.Parameter(torch.zeros(keys, width))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., n, D] -> [..., H, n, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """[..., H, n, d] -> [..., n, D]."""
    return x.transpose(-2, -3).flatten(-2)


KeysValues = Sequence[Tensor]  # keys and values, [B, keys, D] each


class Attention(nn.Module):
    """One softmax over the chunk's tokens and the keys of earlier chunks.

    Tokens carry no positions. To the keys of a chunk that is a chunks older a query adds its logit
    of age a.
    """

    own_views = 0  # of latents; such layers all read view 0

    def __init__(self, config: I3Config, views: int):
        super().__init__()
        self.views = range(views, views + self.own_views) if self.own_views else range(1)
        width, self.heads, self.chunks = config.d_model, config.heads, config.history_chunks
        ages = self.heads * self.chunks
        self.query = nn.Linear(width, width + ages, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.age_bias = nn.Parameter(torch.zeros(ages))

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, n, D] -> queries [B, H, n, d], and logits of ages, oldest first [B, H, n, C]."""
        q = split_heads(self.query(x), self.heads)
        q, ages = q.split([q.shape[-1] - self.chunks, self.chunks], dim=-1)
        return q, wide(ages) + wide(self.age_bias.view(self.heads, 1, self.chunks))

    def keys_values(self, x: Tensor) -> KeysValues:
        """Of tokens [B, n, D]."""
        k, v = self.key_value(x).chunk(2, dim=-1)
        return k, v

    def past_keys_values(self, views: list[Tensor]) -> KeysValues:
        """Of a chunk's latents, as its views show them [B, M R, D]."""
        return self.keys_values(views[0])

    def logits(self, q: Tensor, k: Tensor, seen: Tensor, more: Tensor | float = 0.0) -> Tensor:
        """q [B, H, n, d], k [B, keys, D], seen [B, 1, n, keys] -> [B, H, n, keys]."""
        logits = wide(q @ split_heads(k, self.heads).mT) * q.shape[-1] ** -0.5
        return (logits + more).masked_fill(~seen, NEVER)

    def past_logits(self, q: Tensor, k: Tensor, seen: Tensor, ages: Tensor) -> Tensor:
        """The same for the keys [B, c M R, D] of c chunks, seen [B, 1, n, c]."""
        chunks = seen.shape[-1]
        keys = k.shape[1] // max(1, chunks)
        seen, ages = (
            x.repeat_interleave(keys, dim=-1) for x in (seen, ages[..., self.chunks - chunks :])
        )
        return self.logits(q, k, seen, ages)

    def read(self, shares: Tensor, v: Tensor) -> Tensor:
        """shares [B, H, n, keys], v [B, keys, D] -> [B, H, n, d]."""
        return shares.to(v.dtype) @ split_heads(v, self.heads)

    def forward(self, x: Tensor, own: KeysValues, past: KeysValues, seen: Seen) -> Tensor:
        """Normed tokens x [B, n, D], own [B, S, D], past [B, c M R, D] -> [B, n, D]."""
        q, ages = self.queries(x)
        both = self.past_logits(q, past[0], seen.history, ages), self.logits(q, own[0], seen.own)
        shares = torch.cat(both, dim=-1).softmax(-1)
        return self.output(merge_heads(self.read(shares, torch.cat([past[1], own[1]], dim=1))))


class DualAttention(Attention):
    """A softmax over the chunk's tokens and one over history, which is added with a share p.

        o = o_own + p (o_past - j o_own)          p = sigmoid(z_past - z_own - n(x))

    z is the log of a softmax's denominator. History is read through views of its own. z_own,
    queries and projections of tokens get j times their gradient from it: at j = 0 they learn from
    the chunk alone, and at j = 1 both are one softmax.
    """

    own_views = 2

    def __init__(self, config: I3Config, views: int):
        super().__init__(config, views)
        self.joined = config.joined  # j
        self.reserve = nn.Linear(config.d_model, config.heads, bias=False)
        self.reserve_bias = nn.Parameter(torch.zeros(config.heads))

    def past_keys_values(self, views: list[Tensor]) -> KeysValues:
        """Of a chunk's latents, as its views show them [B, M R, D]."""
        (k, _), (_, v) = (self.projected(view).chunk(2, dim=-1) for view in views)
        return k, v

    def projected(self, x: Tensor) -> Tensor:
        """Keys and values of x, whose projection gets j times its gradient, and x all of it."""
        both = self.key_value(x)
        if not torch.is_grad_enabled():
            return both
        of_weight = self.key_value(x.detach())
        return both + (self.joined - 1) * (of_weight - of_weight.detach())

    def taught(self, x: Tensor) -> Tensor:
        """x, which gets j times its gradient."""
        return torch.lerp(x.detach(), x, self.joined)

    def forward(self, x: Tensor, own: KeysValues, past: KeysValues, seen: Seen) -> Tensor:
        """Normed tokens x [B, n, D], own [B, S, D], past [B, c M R, D] -> [B, n, D]."""
        q, ages = self.queries(x)
        of_own = self.logits(q, own[0], seen.own)
        of_past = self.past_logits(self.taught(q), past[0], seen.history, ages)
        lead = of_past.logsumexp(-1) - self.taught(of_own.logsumexp(-1))  # [B, H, n]
        reserve = wide(self.reserve(x)) + wide(self.reserve_bias)  # [B, n, H]
        share = (lead - reserve.mT).sigmoid().unsqueeze(-1).to(x.dtype)
        read_own = self.read(of_own.softmax(-1), own[1])
        read_past = self.read(of_past.softmax(-1), past[1])
        return self.output(merge_heads(read_own + share * (read_past - self.joined * read_own)))


class AttentionBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each with its norm and residual connection."""

    def __init__(self, config: I3Config, kind: type[Attention], views: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.d_model)
        self.norm_ff = nn.LayerNorm(config.d_model)
        self.attention = kind(config, views)
        self.ff = FeedForward(config)

    def forward(
        self, x: Tensor, piece: Piece, seen: Seen, *kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, n, D] -> the same, and keys and values of the chunk with the new tokens.

        Args:
            x: the residual stream.
            piece: where its tokens stand.
            seen: what they attend to.
            kept: keys and values of the chunk's tokens before, [B, S, D] each, and of c earlier
                chunks, [B, c M R, D] each, the oldest first.
        """
        old_k, old_v, *past = kept
        normed = self.norm_attention(x)
        k, v = self.attention.keys_values(normed)
        k, v = piece.put(old_k, k), piece.put(old_v, v)
        x = x + self.attention(normed, (k, v), past, seen)
        return x + self.ff(self.norm_ff(x)), k, v


class I3Cache:
    """What the model keeps of the tokens that it has read, with a row for each sequence.

    Each row fills its chunks at its own pace: padding is not kept. Tensors are replaced and never
    changed, so `copy.copy` of a cache is a snapshot of it. Size does not grow with the text.
    """

    is_compileable = False

    def __init__(self, rows: int, config: I3Config, like: Tensor):
        """A cache of sequences that have not begun, in the dtype and on the device of `like`."""
        width, lower = config.d_model, config.layers.count("rwkv")
        upper = len(config.layers) - lower
        number = torch.zeros(rows, dtype=torch.long, device=like.device)
        none, before = like.new_zeros(rows, 0, width), like.new_zeros(rows, width)
        state = wide(like.new_zeros(rows, 3, width))
        state[:, 2] = EMPTY
        self.columns = 0
        """Columns of input that were read, padding included."""
        self.depth = number
        """[B], chunks before the present one that hold a part of the document it continues."""
        self.filled = number
        """[B], tokens in the present chunk, below T."""
        self.tokens = number.new_zeros(rows, 0)
        """[B, S], the chunk's tokens; here and below S is the largest of `filled`."""
        self.hidden = none
        """[B, S, D], output of the RWKV layers."""
        self.last = before
        """[B, D], the model's output at the newest token."""
        self.lower = [(state, before, before)] * lower
        """State of each RWKV layer."""
        self.own: list[KeysValues] = [(none, none)] * upper
        """Of each attention layer, keys and values of the chunk's tokens [B, S, D]."""
        self.past: list[KeysValues] = [(none, none)] * upper
        """Of each attention layer, keys and values of history [B, c M R, D], the oldest first."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input that were read, padding included."""
        return self.columns

    def state_dict(self) -> dict[str, Tensor]:
        """All that the cache holds, as tensors by name, for `I3ForCausalLM.load_cache`."""
        state = {"columns": torch.tensor(self.columns)}

        def keep(name: str, x: Tensor) -> Tensor:
            state[name] = x.detach().clone(memory_format=torch.contiguous_format)
            return x

        self.mapped(keep)
        return state

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """The attributes, with change(name, x) for every tensor x, [B, ...] each."""

        def changed(name: str, part: Any) -> Any:
            if isinstance(part, Tensor):
                return change(name, part)
            if isinstance(part, list | tuple):
                return type(part)(changed(f"{name}.{i}", x) for i, x in enumerate(part))
            return part

        return {name: changed(name, part) for name, part in self.__dict__.items()}

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor, [B, ...] each."""
        self.__dict__.update(self.mapped(lambda _, x: change(x)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i a copy of row `beam_idx[i]`; beam_idx is [B] int64."""
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [N] int64."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, max_length: int) -> None:
        """Refuse to forget tokens: recurrent state cannot go back.

        Raises:
            ValueError: always; it says what to do instead.
        """
        raise ValueError(
            "an i3 cache cannot be cropped: keep copy.copy(cache) of the place to return to"
        )


def check_inputs(input_ids: Tensor | None, mask: Tensor | None, cache: Any) -> Tensor:
    """The tokens [B, N] of a call.

    Raises:
        ValueError: they are none, or the mask or the cache does not belong to them.
    """
    if input_ids is None or input_ids.dim() != 2 or not input_ids.shape[1]:
        found = "none" if input_ids is None else list(input_ids.shape)
        raise ValueError(
            f"an i3 model reads input_ids [B, N] with N of 1 or more, not {found}; it takes no "
            "inputs_embeds, which do not show where documents begin"
        )
    rows, columns = input_ids.shape
    if cache is not None and not hasattr(cache, "filled"):
        raise ValueError(
            f"past_key_values should be what an i3 model returned, not {type(cache).__name__}: "
            "leave it out, and the model makes its own"
        )
    if cache is not None and len(cache.filled) != rows:
        raise ValueError(
            f"past_key_values is of {len(cache.filled)} rows and input_ids of {rows}: see its "
            "batch_repeat_interleave and batch_select_indices"
        )
    if mask is not None and (mask.dim() != 2 or len(mask) != rows or mask.shape[1] < columns):
        raise ValueError(
            f"attention_mask {list(mask.shape)} should be [{rows}, {columns} or more], as "
            f"input_ids are {list(input_ids.shape)}"
        )
    return input_ids


ATTENTION = {"attention": Attention, "dual-attention": DualAttention}
COMPRESSORS: dict[str, type[LiteralCompressor | RecordsCompressor]] = {
    "literal": LiteralCompressor,
    "records": RecordsCompressor,
}


class I3ForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head: token ids to logits of the next token.

    A row is a stream of documents: each <BOS> restarts the model.
    """

    config: I3Config
    config_class = I3Config
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["RwkvBlock", "AttentionBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["decay_base", "bonus_base"]  # noqa: RUF012
    _is_stateful = True  # no assisted generation, which would have to go back

    def __init__(self, config: I3Config):
        super().__init__(config)
        width, lower = config.d_model, config.layers.count("rwkv")
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.norm_in = nn.LayerNorm(width)
        self.rwkv = nn.ModuleList(RwkvBlock(config) for _ in range(lower))
        views = int("attention" in config.layers)
        for kind in config.layers[lower:]:
            if kind not in self._modules:
                self.add_module(kind, nn.ModuleList())
            cast("nn.ModuleList", self._modules[kind]).append(
                AttentionBlock(config, ATTENTION[kind], views)
            )
            views += ATTENTION[kind].own_views
        self.compressor = COMPRESSORS[config.compressor](config, views)
        keys = config.sub_latents if config.compressor == "records" else 1
        self.slots = Slots(config.latents * keys, width)
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    @property
    def upper(self) -> list[AttentionBlock]:
        """The attention layers from the bottom."""
        kinds = self.config.layers[len(self.rwkv) :]
        names = [f"{kind}.{kinds[:number].count(kind)}" for number, kind in enumerate(kinds)]
        return [cast(AttentionBlock, self.get_submodule(name)) for name in names]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call of `generate` makes an I3Cache

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of tokens."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of tokens."""
        self.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.head = new_embeddings

    def load_cache(self, state: Mapping[str, Tensor]) -> I3Cache:
        """The cache with this `state_dict`, on the device and in the dtype of the model.

        Raises:
            ValueError: it is of a model of other sizes.
        """
        cache = I3Cache(0, self.config, self.slots.slot)
        sizes = {name: x.shape for name, x in cache.state_dict().items()}  # 0 is any size
        found = {name: x.shape for name, x in state.items()}
        if sizes.keys() != found.keys() or not all(
            len(found[name]) == len(size)
            and all(a in (0, b) for a, b in zip(size, found[name], strict=True))
            for name, size in sizes.items()
        ):
            raise ValueError(
                "this is no state of a cache of the model: give what state_dict() of "
                "past_key_values returned, with the weights that computed it"
            )
        cache.__dict__.update(cache.mapped(lambda name, x: state[name].to(x)))
        cache.columns = int(state["columns"])
        return cache

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: I3Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token after each position.

        Args:
            input_ids: [B, N] int64.
            attention_mask: [B, at least N]; 0 marks padding, anywhere in a row. The last N columns
                count. Logits at padding are those of the last token before it.
            past_key_values: what an earlier call returned; it is updated.
            labels: [B, N] int64, the tokens themselves; -100 is not predicted.
            use_cache: whether to return a cache; the default is the configuration's.
            logits_to_keep: compute the logits of so many last columns only, or of the columns
                [n] int64; 0 is all.
            kwargs: for the loss: `num_items_in_batch` divides its sum.

        Raises:
            ValueError: an argument is of another shape or kind, or something is asked for that the
                model does not return.
        """
        input_ids = check_inputs(input_ids, attention_mask, past_key_values)
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise ValueError("an i3 model returns no attentions and no hidden states")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask[:, -input_ids.shape[1] :].bool()
        cache = past_key_values
        if cache is None:
            cache = I3Cache(len(input_ids), self.config, self.slots.slot)
        x = self.read(input_ids, mask, cache)
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.norm_out(x[:, last]))
        loss = None
        if labels is not None:
            # Padding predicts nothing.
            labels = torch.cat([labels[:, :1], labels[:, 1:].masked_fill(~mask[:, :-1], -100)], 1)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        keep = self.config.use_cache if use_cache is None else use_cache
        return CausalLMOutputWithPast(loss, logits, cast(Any, cache) if keep else None)

    def read(self, input_ids: Tensor, mask: Tensor, cache: I3Cache) -> Tensor:
        """Read tokens [B, N] and return the residual stream at each column [B, N, D].

        Every row's tokens are read chunk by chunk, without its padding.

        Args:
            input_ids: the tokens.
            mask: [B, N] bool, false at padding.
            cache: what was read before; it is updated.
        """
        tokens = input_ids.gather(1, (~mask).long().argsort(dim=1, stable=True))
        read, total = torch.zeros_like(cache.filled), mask.sum(1)
        outputs, new = [cache.last.unsqueeze(1)], [torch.ones_like(mask[:, :1])]
        while bool((read < total).any()):
            count = torch.minimum(self.config.chunk_length - cache.filled, total - read)
            column = torch.arange(int(count.max()), device=tokens.device)
            place = (read.unsqueeze(1) + column).clamp(max=tokens.shape[1] - 1)
            outputs.append(self.read_piece(tokens.gather(1, place), count, cache))
            new.append(column < count.unsqueeze(1))
            read = read + count
        cache.columns += input_ids.shape[1]
        # A row's outputs in their order, from that of the last token before this call.
        order = (~torch.cat(new, dim=1)).long().argsort(dim=1, stable=True)
        column = order.gather(1, torch.cat([mask.cumsum(1), total.unsqueeze(1)], dim=1))
        every = torch.cat(outputs, dim=1)
        x = every.gather(1, column.unsqueeze(-1).expand(-1, -1, every.shape[-1]))
        cache.last = x[:, -1].clone()  # not a view, which would keep all of x
        return x[:, :-1]

    def read_piece(self, tokens: Tensor, count: Tensor, cache: I3Cache) -> Tensor:
        """Read the first `count` [B] of tokens [B, n], which end no later than each row's chunk.

        Returns:
            The residual stream [B, n, D]; anything at the other tokens.
        """
        piece, seen = self.place(tokens, count, cache)
        x = self.norm_in(self.embedding(tokens))
        states, own = [], list[KeysValues]()
        for block, state in zip(self.rwkv, cache.lower, strict=True):
            x, *state = block(x, piece, *state)
            states.append(tuple(state))
        hidden = x
        for block, chunk, past in zip(self.upper, cache.own, cache.past, strict=True):
            x, *chunk = block(x, piece, seen, *chunk, *past)
            own.append(tuple(chunk))
        cache.lower, cache.own, cache.hidden = states, own, piece.put(cache.hidden, hidden)
        cache.filled = cache.filled + count
        self.close_chunks(cache)
        return x

    def place(self, tokens: Tensor, count: Tensor, cache: I3Cache) -> tuple[Piece, Seen]:
        """Where new tokens stand in their chunks, and what they see; adds them to the cache.

        A segment is a document's part of a chunk. Segment 0 continues the chunk before, and only it
        sees history.

        Args:
            tokens: [B, n] int64.
            count: [B] int64, how many of a row's columns are tokens of it.
            cache: what was read before.
        """
        bos, column = self.config.bos_token_id, torch.arange(tokens.shape[1], device=tokens.device)
        rows, columns = (column < count.unsqueeze(1)).nonzero(as_tuple=True)
        slot = cache.filled.unsqueeze(1) + column
        restart = tokens == bos
        if not self.config.state_carry:
            restart = restart | (slot == 0)
        size = int((cache.filled + count).max())
        piece = Piece(count, rows, columns, slot[rows, columns], restart, size)
        cache.tokens = piece.put(cache.tokens, tokens)
        segments = (cache.tokens == bos).cumsum(1)
        key = torch.arange(size, device=tokens.device)
        slot = slot.clamp(max=size - 1).unsqueeze(-1)
        segment = segments.gather(1, slot.squeeze(-1)).unsqueeze(-1)  # of each query
        own = (key <= slot) & (segments.unsqueeze(1) == segment)
        chunks = cache.past[0][0].shape[1] // len(self.slots.slot)
        age = torch.arange(chunks, 0, -1, device=tokens.device)
        history = (segment == 0) & (age <= cache.depth.view(-1, 1, 1))
        return piece, Seen(own.unsqueeze(1), history.unsqueeze(1))

    def close_chunks(self, cache: I3Cache) -> None:
        """Compress the full chunks to history, and empty them."""
        full = cache.filled == self.config.chunk_length
        if not bool(full.any()):
            return
        begins = cache.tokens == self.config.bos_token_id
        segments = begins[full].cumsum(1)
        latents = self.compressor(cache.hidden[full], segments == segments[:, -1:])
        shown = [view + self.slots.slot for view in self.compressor.unfold(latents)]
        past: list[KeysValues] = []
        for block, kept in zip(self.upper, cache.past, strict=True):
            new = block.attention.past_keys_values([shown[view] for view in block.attention.views])
            past.append(tuple(self.remember(*pair, full) for pair in zip(kept, new, strict=True)))
        depth = (cache.depth + 1).masked_fill(begins.any(1), 1)
        cache.past, cache.depth = past, depth.where(full, cache.depth)
        cache.filled = cache.filled.masked_fill(full, 0)
        size = int(cache.filled.max())
        cache.tokens, cache.hidden = cache.tokens[:, :size], cache.hidden[:, :size]
        cache.own = [(k[:, :size], v[:, :size]) for k, v in cache.own]

    def remember(self, kept: Tensor, new: Tensor, full: Tensor) -> Tensor:
        """Add a chunk to what rows keep of the newest C chunks: [B, c M R, D], the oldest first.

        Args:
            kept: [B, c M R, D].
            new: [F, M R, D], of the rows whose chunk is full; the others get a chunk of zeros as
                their oldest.
            full: [B] bool, with F true.
        """
        none = new.new_zeros(len(kept), *new.shape[1:])
        newest = torch.cat([kept, none.index_put((full,), new)], dim=1)
        kept = newest.where(full.view(-1, 1, 1), torch.cat([none, kept], dim=1))
        return kept[:, -self.config.history_chunks * new.shape[1] :]
