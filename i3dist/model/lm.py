"""The i3 language model. Letters: B lanes, K chunks of a window, T tokens, C history chunks,
M latents, D width, V vocabulary.

The compressor reads the RWKV stack, below the attention blocks, so a chunk's latents do not depend
on history: the K chunks of a window run side by side, and each chunk's attention then sees its own
tokens and the latents of the C chunks before it.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.attention import AttentionBlock, HistoryEmbedding, attention_bias
from i3dist.model.compress import Compressor
from i3dist.model.layers import linear
from i3dist.model.rwkv import RwkvBlock
from i3dist.model.segments import causal_mask, history_mask, last_segment, restarts, segment_ids
from i3dist.model.state import LaneState, RwkvState
from i3dist.ops.cross_entropy import token_losses


class I3LM(nn.Module):
    """RWKV blocks, a compressor beside them, causal attention blocks above, an untied head."""

    def __init__(self, settings: ModelSettings, bos_id: int):
        super().__init__()
        self.settings = settings
        self.bos_id = bos_id
        width, heads, mult = settings.d_model, settings.heads, settings.ff_mult
        layers = settings.rwkv_layers
        self.embedding = nn.Embedding(settings.vocab, width)
        self.norm_in = nn.LayerNorm(width)
        self.rwkv = nn.ModuleList(RwkvBlock(width, mult, i, layers) for i in range(layers))
        self.compressor = Compressor(width, heads, mult, settings.latents)
        self.history = HistoryEmbedding(width, settings.history_chunks, settings.latents)
        self.attention = nn.ModuleList(
            AttentionBlock(width, heads, mult) for _ in range(settings.attention_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.head = linear(width, settings.vocab)
        self._initialise()

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
        hidden, state = self.hidden(tokens, depth, state, gate)
        return token_losses(hidden, self.head.weight, targets), state

    def hidden(
        self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """Final hidden states [B, K, T, D] (the head makes logits of them) and the new state."""
        segments = segment_ids(tokens, self.bos_id)
        x, carried = self._recur(tokens, depth, state.rwkv)
        latents = self.compressor(x, last_segment(segments))
        latents = torch.cat([state.latents, latents], dim=1)  # [B, C + K, M, D]
        x = self._attend(x, segments, depth, latents, gate)
        newest = latents[:, -self.settings.history_chunks :]
        return self.norm_out(x), LaneState(newest, carried).detach()

    def run_rwkv(self, x: Tensor, restart: Tensor, state: RwkvState) -> tuple[Tensor, RwkvState]:
        """The RWKV stack on N independent sequences. x [N, T, D], restart [N, T]."""
        after = []
        for i, block in enumerate(self.rwkv):
            x, layer_state = block(x, restart, tuple(part[:, i] for part in state))
            after.append(layer_state)
        return x, RwkvState(*(torch.stack(parts, dim=1) for parts in zip(*after, strict=True)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids -> the residual stream's start, [..., D]."""
        return self.norm_in(self.embedding(tokens))

    def _recur(self, tokens: Tensor, depth: Tensor, carried: RwkvState) -> tuple[Tensor, RwkvState]:
        """The RWKV stack over a window: independent chunks, or one sequence where state carries."""
        carry = self.settings.state_carry
        restart = restarts(tokens, depth, self.bos_id, carry)
        x = self.embed(tokens)
        rows = (lambda t: t.flatten(1, 2)) if carry else (lambda t: t.flatten(0, 1))
        flat = rows(x)
        state = carried if carry else self.empty_rwkv(flat.shape[0], x)
        y, after = self.run_rwkv(flat, rows(restart), state)
        return y.view_as(x), after if carry else carried

    def empty_rwkv(self, rows: int, like: Tensor) -> RwkvState:
        """Recurrent state of `rows` sequences that have read nothing."""
        settings = self.settings
        return RwkvState.empty(
            rows, settings.rwkv_layers, settings.d_model, like.device, like.dtype
        )

    def _attend(
        self, x: Tensor, segments: Tensor, depth: Tensor, latents: Tensor, gate: Tensor
    ) -> Tensor:
        """The attention blocks over a window. x [B, K, T, D], latents [B, C + K, M, D]."""
        settings = self.settings
        bias = attention_bias(
            causal_mask(segments).flatten(0, 1),
            history_mask(segments, depth, settings.history_chunks).flatten(0, 1),
            gate,
            settings.latents,
        )
        flat = x.flatten(0, 1)
        for block, (keys, values) in zip(
            self.attention, self.history_keys_values(latents), strict=True
        ):
            flat, _ = block(flat, (keys.flatten(0, 1), values.flatten(0, 1)), None, bias)
        return flat.view_as(x)

    def history_keys_values(self, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each attention block sees of history: latents [B, C + K, M, D] ->
        keys and values [B, K, H, C * M, D/H] per block."""
        blocks = cast("Iterable[AttentionBlock]", self.attention)
        return [b.attention.history_keys_values(latents, self.history) for b in blocks]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal(0, 0.02); projections that end a residual branch shrink with the depth (GPT-2)."""
        branches = 2 * (self.settings.rwkv_layers + self.settings.attention_layers)
        ends = ("output.weight", "value.weight", "down.weight")
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            ends_branch = name.endswith(ends) and "time_mix.value" not in name
            nn.init.normal_(parameter, std=0.02 / branches**0.5 if ends_branch else 0.02)


PARTS = ("embedding", "rwkv", "compressor", "history", "attention", "head", "norms")


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
