"""Reading a prompt, many chunks side by side.

Notation: L tokens of the prompt, t of its last chunk, T tokens of a chunk, C history chunks, M
latents, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i3dist.model.block import LayerState
from i3dist.model.lm import I3LM
from i3dist.model.segments import (
    causal_mask,
    chunks_seen,
    history_mask,
    last_segment,
    restarts,
    segment_ids,
)
from i3dist.ops.attention import KeysValues, attention_bias

WINDOW = 8  # chunks computed at once


class Prompt(NamedTuple):
    """What one row remembers after its prompt, whose last chunk may be full but is not closed."""

    hidden: Tensor  # [1, t, D], output of the lower layers in the last chunk
    states: list[LayerState]  # of the lower layers
    own: list[KeysValues]  # of each upper layer, [1, 1, t, D]
    latents: Tensor  # [1, C, M, D], oldest first; 0 where there was no chunk
    depth: int  # chunks before the last that belong to the document it continues
    segments: Tensor  # [t], of the last chunk
    logits: Tensor  # [V] fp32, after the last token


@torch.no_grad()
def read_prompt(model: I3LM, tokens: Tensor) -> Prompt:
    """Read L >= 1 tokens [L] int64; the stream is cut every T tokens, as in training.

    Only chunks whose latents or state can still be seen are read, and only the last one by the
    layers that see history: the others need no prediction.
    """
    settings, bos = model.settings, model.bos_id
    length = settings.chunk_length
    count = (len(tokens) - 1) // length
    chunks, last = tokens[: count * length].view(count, length), tokens[count * length :]
    depths = _depths(chunks, bos)
    reach = depths[-1] if settings.state_carry else min(depths[-1], settings.history_chunks)
    first = count - reach
    latents, states = _compress(model, chunks[first:], depths[first:-1])

    depth = torch.tensor([[depths[-1]]], device=tokens.device)
    restart = restarts(last.view(1, 1, -1), depth, bos, settings.state_carry)[0]
    hidden, states = model.run_lower(model.embed(last.unsqueeze(0)), restart, states)
    segments = segment_ids(last, bos).unsqueeze(0)
    x, own = read_above(model, hidden, latents, segments, depth)
    logits = model.head(model.norm_out(x[0, -1])).float()
    return Prompt(hidden, states, own, latents, depths[-1], segments[0], logits)


def _depths(chunks: Tensor, bos: int) -> list[int]:
    """How many chunks before each one, and before what follows, belong to its first document."""
    depths = [0]
    for opens in (chunks == bos).any(1).tolist():
        depths.append(1 if opens else depths[-1] + 1)
    return depths


def _compress(
    model: I3LM, chunks: Tensor, depths: list[int]
) -> tuple[Tensor, list[LayerState] | None]:
    """Latents [1, C, M, D] of the newest of chunks [N, T], and the state after them if it is
    carried; None is empty."""
    settings, weight = model.settings, model.head.weight
    capacity, carry = settings.history_chunks, settings.state_carry
    latents = weight.new_zeros(1, capacity, settings.latents, model.width.computed)
    states: list[LayerState] | None = None
    depth = torch.tensor([depths], device=chunks.device)
    for start in range(0, len(chunks), WINDOW):
        window = chunks[start : start + WINDOW]
        restart = restarts(window[None], depth[:, start : start + WINDOW], model.bos_id, carry)[0]
        x = model.embed(window)
        if carry:  # one sequence
            hidden, states = model.run_lower(
                x.view(1, -1, x.shape[-1]), restart.view(1, -1), states
            )
        else:
            hidden, _ = model.run_lower(x, restart)
        keep = last_segment(segment_ids(window, model.bos_id))
        new = model.compressor(hidden.view_as(x), keep)
        latents = torch.cat([latents, new.unsqueeze(0)], dim=1)[:, -capacity:]
    return latents, states


def read_above(
    model: I3LM,
    x: Tensor,
    latents: Tensor,
    segments: Tensor,
    depth: Tensor,
    before: Sequence[KeysValues | None] | None = None,
) -> tuple[Tensor, list[KeysValues]]:
    """The upper layers over the next n tokens of a chunk.

    Args:
        model: the model.
        x: the residual stream of these tokens, [1, n, D].
        latents: [1, C, M, D], oldest first.
        segments: of the chunk up to the last of them, [1, t].
        depth: [1, 1], chunks before this one that belong to the document it continues.
        before: each layer's own keys of the chunk's t - n tokens before; None if there is none.

    Returns:
        The residual stream [1, n, D], and each layer's own keys and values, [1, 1, t, D].
    """
    chunks, new = model.settings.history_chunks, segments[:, -x.shape[1] :]
    gate = torch.ones((), device=x.device)
    own = causal_mask(segments)[:, -x.shape[1] :]
    visible = attention_bias(own, history_mask(new, depth[0], chunks), gate, model.keys_per_chunk)
    seen = chunks_seen(new.unsqueeze(1), depth, chunks, gate)[:, :chunks]
    past, x = model.history(latents, seen), x.unsqueeze(1)
    joined = []
    for i, block in enumerate(model.upper):
        x, keys_values = block(x, past[i], before[i] if before else None, visible)
        joined.append(keys_values)
    return x.squeeze(1), joined
