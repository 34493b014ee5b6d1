"""Reading a prompt, many chunks side by side.

Notation: L tokens of the prompt, t of its last chunk, T tokens of a chunk, C history chunks, M
latents, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.config import ModelSettings
from i3dist.inference.forward import WINDOW, document_depth
from i3dist.model.block import LayerState
from i3dist.model.layers import Channels
from i3dist.model.lm import I3LM
from i3dist.model.segments import (
    causal_mask,
    chunks_seen,
    history_mask,
    last_segment,
    restarts,
    segment_ids,
)
from i3dist.model.state import LaneState, unstack_states
from i3dist.ops.attention import KeysValues, attention_bias
from i3dist.ops.wkv import compile_wkv


class Prompt(NamedTuple):
    """What one row remembers after its prompt, whose last chunk may be full but is not closed."""

    hidden: Tensor  # [1, t, D], output of the lower layers in the last chunk
    states: list[LayerState]  # of the lower layers
    own: list[KeysValues]  # of each upper layer, [1, 1, t, D]
    latents: Tensor  # [1, C, M, D], oldest first; 0 where there was no chunk
    depth: int  # chunks before the last that belong to the document it continues
    segments: Tensor  # [t], of the last chunk
    logits: Tensor  # [V] fp32, after the last token


def compile_ahead(settings: ModelSettings, tokens: int, device: torch.device) -> None:
    """Begin to compile what `read_prompt` calls, while weights are read; on a GPU.

    Args:
        settings: of the model, whose weights will most likely be bf16.
        tokens: L.
        device: where it will be.
    """
    if device.type == "cuda":
        length, width = min(tokens, settings.chunk_length), Channels(settings.d_model).computed
        compile_wkv(length, width, torch.bfloat16, device)


@torch.no_grad()
def read_prompt(model: I3LM, tokens: Tensor, at_once: bool | None = None) -> Prompt:
    """Read L >= 1 tokens; the stream is cut every T tokens, as in training.

    Only chunks whose latents or state can still be seen are read, and only the last one by the
    layers that see history: the others need no prediction.

    Args:
        model: the model.
        tokens: [L] int64.
        at_once: whether the last chunk goes through the lower layers beside the others, where no
            state goes from one to the next: half as many kernels, which take a GPU's host longer
            than the GPU. None is on a GPU.
    """
    settings, bos = model.settings, model.bos_id
    length = settings.chunk_length
    depths = document_depth(tokens.unsqueeze(0), bos, length)  # [1, N], of all chunks
    depth, count = int(depths[0, -1]), depths.shape[1] - 1
    first = count - (depth if settings.state_carry else min(depth, settings.history_chunks))
    full, last = tokens.tensor_split([count * length])
    chunks = full.view(1, count, length)[:, first:]
    at_once = tokens.is_cuda if at_once is None else at_once
    states: list[LayerState] | None
    if at_once and not settings.state_carry and 0 < chunks.shape[1] <= WINDOW:
        latents, hidden, states = _side_by_side(model, chunks[0], last)
    else:
        latents, states = _history(model, chunks, depths[:, first:-1])
        restart = restarts(last.view(1, 1, -1), depths[:, -1:], bos, settings.state_carry)[0]
        hidden, states = model.run_lower(model.embed(last.unsqueeze(0)), restart, states)
    segments = segment_ids(last, bos).unsqueeze(0)
    x, own = read_above(model, hidden, latents, segments, depths[:, -1:])
    logits = model.head(model.norm_out(x[0, -1])).float()
    return Prompt(hidden, states, own, latents, depth, segments[0], logits)


def _side_by_side(
    model: I3LM, chunks: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, list[LayerState]]:
    """Chunks [N, T] and the last one [t] through the lower layers, as rows without a past.

    Returns:
        Latents [1, C, M, D] of the chunks, and of the last one hidden states [1, t, D] and state.
    """
    # The last chunk ends where the others end, so its state is what they leave. What stands before
    # its first token is forgotten there.
    before = chunks.shape[1] - len(last)
    rows = torch.cat([chunks, F.pad(last, (before, 0)).unsqueeze(0)])
    restart = restarts(rows, torch.zeros_like(rows[:, 0]), model.bos_id, carry=False)
    restart[-1, before] = True
    hidden, states = model.run_lower(model.embed(rows), restart)
    new = model.compressor(hidden[:-1], last_segment(segment_ids(chunks, model.bos_id)))
    latents = F.pad(new, (0, 0, 0, 0, model.settings.history_chunks - len(new), 0))
    of_last = [tuple(part[-1:] for part in state) for state in states]
    return latents.unsqueeze(0), hidden[-1:, before:], of_last


def _history(model: I3LM, chunks: Tensor, depth: Tensor) -> tuple[Tensor, list[LayerState] | None]:
    """Latents [1, C, M, D] of the newest of chunks [1, N, T], whose depths are [1, N], and the
    state after them if it is carried; None is empty."""
    settings, weight = model.settings, model.head.weight
    state = LaneState.empty(1, settings, weight.device, weight.dtype)
    for window, depths in zip(chunks.split(WINDOW, 1), depth.split(WINDOW, 1), strict=True):
        if window.shape[1]:  # no chunks are split into one part, which is empty
            _, state = model.below(window, depths, state)
    padded = state.map(model.width.pad)
    carried = settings.state_carry
    return padded.latents, unstack_states(model.stack.lower, padded.layers) if carried else None


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
