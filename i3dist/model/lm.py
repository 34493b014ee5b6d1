"""The i3 language model. Letters: B lanes, K chunks of a window, T tokens, C history chunks,
M latents, D width, V vocabulary.

The compressor reads the RWKV stack, below the attention blocks, so a chunk's latents do not depend
on history: the K chunks of a window run side by side, and each chunk's attention then sees its own
tokens and the latents of the C chunks before it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.attention import AttentionBlock, Slots
from i3dist.model.compressor import Compressor
from i3dist.model.layers import ALIGNMENT, Channels, LayerNorm, Linear
from i3dist.model.rwkv import RwkvBlock
from i3dist.model.segments import (
    causal_mask,
    chunks_seen,
    history_mask,
    last_segment,
    restarts,
    segment_ids,
)
from i3dist.model.state import LaneState, RwkvState
from i3dist.ops.attention import KeysValues, Visibility, attention_bias, block_visibility
from i3dist.ops.cross_entropy import token_losses

# Rows are aligned already; padding them further would make operators of ours copy their inputs.
COMPILE: dict[str, Any] = {"dynamic": False, "options": {"comprehensive_padding": False}}


class Below(NamedTuple):
    """A window below history: what the attention blocks start from. A lane is a row of each part.

    `latents` are those of the C chunks before the window and of its own K, oldest first.
    """

    x: Tensor  # [B, K, T, D] residual stream after the RWKV stack
    segments: Tensor  # [B, K, T]
    depth: Tensor  # [B, K] chunks before each that belong to the document it continues
    latents: Tensor  # [B, C + K, M, D]


class I3LM(nn.Module):
    """RWKV blocks, a compressor beside them, causal attention blocks above, an untied head."""

    def __init__(self, settings: ModelSettings, bos_id: int, alignment: int = ALIGNMENT):
        """Build the model.

        Args:
            settings: the architecture.
            bos_id: the token that opens a document.
            alignment: channels are computed in multiples of it; changes nothing but rounding.
        """
        super().__init__()
        self.settings = settings
        self.bos_id = bos_id
        self.width = width = Channels(settings.d_model, alignment=alignment)
        heads, mult, layers = settings.heads, settings.ff_mult, settings.rwkv_layers
        self.compiled = False
        self.embedding = nn.Embedding(settings.vocab, width.stored)
        self.norm_in = LayerNorm(width)
        self.rwkv = nn.ModuleList(RwkvBlock(width, mult, i, layers) for i in range(layers))
        self.compressor = Compressor(
            width, mult, settings.latents, settings.records, settings.chunk_length
        )
        self.slots = Slots(width, self.keys_per_chunk)
        self.attention = nn.ModuleList(
            AttentionBlock(width, heads, mult, settings.history_chunks)
            for _ in range(settings.attention_layers)
        )
        self.norm_out = LayerNorm(width)
        # The vocabulary stays as it is: a padded logit would take part in the softmax.
        self.head = Linear(width, Channels(settings.vocab, alignment=1))
        self.draw()

    @property
    def keys_per_chunk(self) -> int:
        """What attention sees of an earlier chunk."""
        return self.settings.latents * self.compressor.records

    def compile_blocks(self) -> None:
        """Compile block by block: all blocks of a kind share one compilation."""
        self.compiled = True
        for block in (*self.rwkv, *self.attention, self.compressor):
            block.compile(**COMPILE)
        for name in ("_start", "losses", "history"):
            setattr(self, name, torch.compile(getattr(self, name), **COMPILE))

    def forward(
        self, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """Cross-entropy of every position, and the lanes' state after the window.

        Args:
            tokens: [B, K, T] int64.
            targets: [B, K, T] int64, `IGNORE` where nothing is predicted.
            depth: [B, K] int, how many chunks before each belong to the document it continues.
            state: what the lanes remember.
            gate: scalar g in [0, 1] of history.

        Returns:
            Losses [B, K, T] fp32 in nats, 0 where the target is `IGNORE`; the new, detached state.
        """
        x, state = self._blocks(tokens, depth, state, gate)
        return self.losses(x, targets), state

    def hidden(
        self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """Final hidden states [B, K, T, D] (the head makes logits of them) and the new state."""
        x, state = self._blocks(tokens, depth, state, gate)
        return self.norm_out(x), state

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [B, K, T] of the blocks' output [B, K, T, D]."""
        return token_losses(self.norm_out(x), self.head.computed(self.head.weight), targets)

    def _blocks(
        self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """All blocks over a window: the residual stream [B, K, T, D] and the new state."""
        below, state = self.below(tokens, depth, state)
        return self.above(below, gate), state

    def below(self, tokens: Tensor, depth: Tensor, state: LaneState) -> tuple[Below, LaneState]:
        """The part of `forward` that no history enters: the RWKV stack and the compressor.

        Returns:
            What `above` takes, and the new, detached state.
        """
        segments = segment_ids(tokens, self.bos_id)
        x, carried = self._recur(tokens, depth, state.rwkv)
        new = self.compressor(x.flatten(0, 1), last_segment(segments).flatten(0, 1))
        new = new.unflatten(0, tokens.shape[:2])
        latents = torch.cat([self.width.pad(state.latents), new], dim=1)
        newest = self.width.trim(latents[:, -self.settings.history_chunks :])
        return Below(x, segments, depth, latents), LaneState(newest, carried).detach()

    def above(self, below: Below, gate: Tensor) -> Tensor:
        """The rest: the attention blocks. Returns the residual stream [B, K, T, D].

        One `below` serves several calls, with another gate or with other latents in it.
        """
        return self._attend(*below, gate)

    def run_rwkv(self, x: Tensor, restart: Tensor, state: RwkvState) -> tuple[Tensor, RwkvState]:
        """The RWKV stack on N independent sequences. x [N, T, D], restart [N, T]."""
        after = []
        for i, block in enumerate(self.rwkv):
            x, layer_state = block(x, restart, tuple(part[:, i] for part in state))
            after.append(layer_state)
        return x, RwkvState(*(torch.stack(parts, dim=1) for parts in zip(*after, strict=True)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids -> the residual stream's start, [..., D].

        The lookup itself is never compiled: its gradient would be summed by atomic additions in
        bf16, in another order every time.
        """
        return self._start(self.embedding(tokens))

    def _start(self, embedded: Tensor) -> Tensor:
        """[..., stored] -> [..., D]."""
        return self.norm_in(self.width.pad(embedded))

    def _recur(self, tokens: Tensor, depth: Tensor, carried: RwkvState) -> tuple[Tensor, RwkvState]:
        """The RWKV stack over a window: independent chunks, or one sequence where state carries."""
        carry = self.settings.state_carry
        restart = restarts(tokens, depth, self.bos_id, carry)
        x = self.embed(tokens)
        rows = (lambda t: t.flatten(1, 2)) if carry else (lambda t: t.flatten(0, 1))
        flat = rows(x)
        if not carry:
            y, _ = self.run_rwkv(flat, rows(restart), self.empty_rwkv(flat.shape[0], x))
            return y.view_as(x), carried
        y, after = self.run_rwkv(flat, rows(restart), carried.map(self.width.pad))
        return y.view_as(x), after.map(self.width.trim)

    def empty_rwkv(self, rows: int, like: Tensor) -> RwkvState:
        """Recurrent state of `rows` sequences that have read nothing, as it is computed with."""
        layers, width = self.settings.rwkv_layers, self.width.computed
        return RwkvState.empty(rows, layers, width, like.device, like.dtype)

    def _attend(
        self, x: Tensor, segments: Tensor, depth: Tensor, latents: Tensor, gate: Tensor
    ) -> Tensor:
        """The attention blocks over a window. x [B, K, T, D], latents [B, C + K, M, D]."""
        visible = self._visible(segments, depth, gate)
        seen = chunks_seen(segments, depth, self.settings.history_chunks, gate)
        for block, past in zip(self.attention, self.history(latents, seen), strict=True):
            x, _ = block(x, past, None, visible)
        return x

    def _visible(self, segments: Tensor, depth: Tensor, gate: Tensor) -> Visibility:
        """What tokens see. segments [B, K, T], depth [B, K]."""
        chunks, keys = self.settings.history_chunks, self.keys_per_chunk
        if self.compiled and segments.is_cuda:
            return block_visibility(segments, depth, gate, chunks, keys)
        segments, depth = segments.flatten(0, 1), depth.flatten()
        history = history_mask(segments, depth, chunks)
        return attention_bias(causal_mask(segments), history, gate, keys)

    def history(self, latents: Tensor, seen: Tensor) -> list[KeysValues]:
        """What each attention block sees of history: latents [B, C + K, M, D] ->
        [B, (C + K) * keys_per_chunk, D] per block.

        Args:
            latents: of chunks, oldest first.
            seen: [B, C + K] bool, from `chunks_seen`. The others count as 0: attention gives them
                no weight, but 0 times NaN is NaN.
        """
        latents = torch.where(seen[..., None, None], latents, 0.0)

        def project(weight: Tensor) -> Tensor:
            return self.compressor.project(latents, weight) + self.slots.project(weight)

        blocks = cast("Iterable[AttentionBlock]", self.attention)
        return [block.attention.history(project) for block in blocks]

    @torch.no_grad()
    def draw(self) -> None:
        """Draw all matrices: normal with deviation sqrt(2 / 5D), 0.018 for the card ("SmallInit":
        Nguyen & Salazar, 2019, arXiv:1910.05895); projections that end a residual branch shrink
        with the depth (GPT-2). Then parts that begin in a way of their own do so."""
        std = (0.4 / self.width.stored) ** 0.5
        branches = 2 * (self.settings.rwkv_layers + self.settings.attention_layers)
        ends = (".output.weight", "channel_mix.value.weight", ".down.weight")
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            nn.init.normal_(parameter, std=std / branches**0.5 if name.endswith(ends) else std)
        for module in self.modules():
            begin: Callable[[], None] | None = getattr(module, "begin", None)
            if begin is not None:
                begin()


PARTS = ("embedding", "rwkv", "compressor", "slots", "attention", "head", "norms")


def parameters_by_part(model: I3LM) -> dict[str, int]:
    """Parameter count of each of `PARTS`; the sum is the model's."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        top = name.split(".")[0]
        counts[top if top in counts else "norms"] += parameter.numel()
    return counts


def decayed(model: nn.Module) -> Iterator[str]:
    """Names of the matrices that weight decay applies to: projections and token tables."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            yield f"{name}.weight"
