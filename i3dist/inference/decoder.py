"""Token-by-token evaluation with constant memory: the training forward, one token at a time.

Notation: n new tokens, T chunk length, C history chunks, H heads, D width, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from i3dist.model.block import LayerState
from i3dist.model.lm import I3LM
from i3dist.model.segments import causal_mask, chunks_seen, history_mask, last_segment, segment_ids
from i3dist.ops.attention import KeysValues, attention_bias


@dataclass
class _Chunk:
    """The chunk being read: all that layers and compressor need of it."""

    tokens: Tensor  # [1, t]
    hidden: Tensor  # [1, t, D], output of the lower layers
    states: list[LayerState] | None  # of the lower layers; None before the first token
    own: list[KeysValues | None]  # of each upper layer, [1, 1, t, D]
    past: list[KeysValues] = field(default_factory=list)  # the same, [1, C * keys_per_chunk, D]


class Decoder:
    """Reads one stream and predicts what follows its last token.

    Holds at most one chunk of tokens and C chunks of latents, however long the stream. As in
    training the stream is cut every T tokens, and may hold several documents. Layers run the same
    `forward` as in training, from the state or the keys and values of the tokens before.
    """

    def __init__(self, model: I3LM, gate: float = 1.0):
        self.model = model
        weight = model.head.weight
        self.gate = torch.tensor(gate, device=weight.device)
        sizes = model.settings
        self.latents = weight.new_zeros(1, sizes.history_chunks, sizes.latents, sizes.d_model)
        self.depth = 0  # chunks before this one that belong to the document it continues
        self.chunk = self._open_chunk(None)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Read n >= 1 tokens, [n] int64, and return the logits after the last one, [V] fp32."""
        length = self.model.settings.chunk_length
        while tokens.numel():
            if self.chunk.tokens.shape[1] == length:
                self._close_chunk()
            room = length - self.chunk.tokens.shape[1]
            x = self._read(tokens[:room].unsqueeze(0))
            tokens = tokens[room:]
        return self.model.head(self.model.norm_out(x[0, -1])).float()

    def _read(self, tokens: Tensor) -> Tensor:
        """Extend the chunk by tokens [1, n] and return their residual stream [1, n, D]."""
        model, chunk = self.model, self.chunk
        begins = tokens == model.bos_id
        if not chunk.tokens.shape[1]:
            begins[:, 0] |= self.depth == 0 or not model.settings.state_carry
            chunk.past = self._history(tokens)
        x, chunk.states = model.run_lower(model.embed(tokens), begins, chunk.states)
        chunk.tokens = torch.cat([chunk.tokens, tokens], dim=1)
        chunk.hidden = torch.cat([chunk.hidden, x], dim=1)
        bias, x = self._bias(tokens.shape[1]), x.unsqueeze(1)
        for i, block in enumerate(model.upper):
            x, chunk.own[i] = block(x, chunk.past[i], chunk.own[i], bias)
        return x.squeeze(1)

    def _history(self, tokens: Tensor) -> list[KeysValues]:
        """What each upper layer sees of history in a chunk that begins with tokens [1, n]."""
        model, latents = self.model, self.latents
        segments = segment_ids(tokens, model.bos_id).unsqueeze(1)
        depth = torch.tensor([[self.depth]], device=latents.device)
        seen = chunks_seen(segments, depth, latents.shape[1], self.gate)[:, : latents.shape[1]]
        return model.history(model.width.pad(latents), seen)

    def _bias(self, new: int) -> Tensor:
        """Attention bias of the chunk's last `new` tokens over history and the chunk so far."""
        settings = self.model.settings
        segments = segment_ids(self.chunk.tokens, self.model.bos_id)
        own = causal_mask(segments)[:, -new:]
        depth = torch.tensor([self.depth], device=segments.device)
        history = history_mask(segments[:, -new:], depth, settings.history_chunks)
        return attention_bias(own, history, self.gate, self.model.keys_per_chunk)

    def _close_chunk(self) -> None:
        """Compress the full chunk into the history and begin the next one."""
        model, chunk = self.model, self.chunk
        segments = segment_ids(chunk.tokens, model.bos_id)
        latents = model.compressor(chunk.hidden, last_segment(segments)).unsqueeze(1)
        self.latents = torch.cat([self.latents[:, 1:], model.width.trim(latents)], dim=1)
        self.depth = 1 if (chunk.tokens == model.bos_id).any() else self.depth + 1
        self.chunk = self._open_chunk(chunk.states)

    def _open_chunk(self, states: list[LayerState] | None) -> _Chunk:
        tokens = torch.empty(1, 0, dtype=torch.long, device=self.latents.device)
        hidden = self.latents.new_empty(1, 0, self.model.width.computed)
        return _Chunk(tokens, hidden, states, [None] * len(self.model.upper))
