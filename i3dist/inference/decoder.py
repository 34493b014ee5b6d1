"""Token-by-token evaluation with constant memory: the training forward, one token at a time.

Letters: n new tokens, T chunk length, C history chunks, H heads, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from i3dist.model.lm import I3LM
from i3dist.model.segments import chunks_seen, history_mask, last_segment, segment_ids
from i3dist.model.state import LaneState, RwkvState
from i3dist.ops.attention import KeysValues, attention_bias


@dataclass
class _Chunk:
    """The chunk being read: everything attention and the compressor need of it."""

    tokens: Tensor  # [1, t]
    hidden: Tensor  # [1, t, D] output of the RWKV stack
    rwkv: RwkvState
    own: list[KeysValues | None]  # per attention block, [1, 1, t, D]
    past: list[KeysValues]  # per attention block, [1, C * keys_per_chunk, D]; empty at first


class Decoder:
    """Reads one stream, chunk by chunk, and predicts what follows each token.

    Holds at most one chunk of tokens and C chunks of latents, however long the stream. The stream
    is cut every T tokens from its first, exactly as in training; it may hold several documents.
    """

    def __init__(self, model: I3LM, gate: float = 1.0):
        self.model = model
        weight = model.head.weight
        self.gate = torch.tensor(gate, device=weight.device)
        self.state = LaneState.empty(1, model.settings, weight.device, weight.dtype)
        self.depth = 0  # chunks before this one that belong to the document it continues
        self.chunk = self._open_chunk(model.empty_rwkv(1, weight))

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
        x, chunk.rwkv = model.run_rwkv(model.embed(tokens), begins, chunk.rwkv)
        chunk.tokens = torch.cat([chunk.tokens, tokens], dim=1)
        chunk.hidden = torch.cat([chunk.hidden, x], dim=1)
        bias, x = self._bias(tokens.shape[1]), x.unsqueeze(1)
        for i, block in enumerate(model.attention):
            x, chunk.own[i] = block(x, chunk.past[i], chunk.own[i], bias)
        return x.squeeze(1)

    def _history(self, tokens: Tensor) -> list[KeysValues]:
        """What is seen of earlier chunks in a chunk that begins with tokens [1, n]."""
        model, latents = self.model, self.state.latents
        segments = segment_ids(tokens, model.bos_id).unsqueeze(1)
        depth = torch.tensor([[self.depth]], device=latents.device)
        seen = chunks_seen(segments, depth, latents.shape[1], self.gate)[:, : latents.shape[1]]
        return model.history(model.width.pad(latents), seen)

    def _bias(self, new: int) -> Tensor:
        """Attention bias of the chunk's last `new` tokens over history and the chunk so far."""
        settings = self.model.settings
        segments = segment_ids(self.chunk.tokens, self.model.bos_id)
        position = torch.arange(segments.shape[1], device=segments.device)
        own = (position[-new:, None] >= position) & (segments[:, -new:, None] == segments[:, None])
        depth = torch.tensor([self.depth], device=segments.device)
        history = history_mask(segments[:, -new:], depth, settings.history_chunks)
        return attention_bias(own, history, self.gate, self.model.keys_per_chunk)

    def _close_chunk(self) -> None:
        """Compress the full chunk into the history and begin the next one."""
        model, chunk = self.model, self.chunk
        segments = segment_ids(chunk.tokens, model.bos_id)
        latents = model.compressor(chunk.hidden, last_segment(segments)).unsqueeze(1)
        newest = torch.cat([self.state.latents[:, 1:], model.width.trim(latents)], dim=1)
        self.state = LaneState(newest, self.state.rwkv)
        self.depth = 1 if (chunk.tokens == model.bos_id).any() else self.depth + 1
        self.chunk = self._open_chunk(chunk.rwkv)

    def _open_chunk(self, rwkv: RwkvState) -> _Chunk:
        model, latents = self.model, self.state.latents
        return _Chunk(
            tokens=torch.empty(1, 0, dtype=torch.long, device=latents.device),
            hidden=latents.new_empty(1, 0, model.width.computed),
            rwkv=rwkv,
            own=[None] * len(model.attention),
            past=[],
        )
