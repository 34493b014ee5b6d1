"""Random streams of documents, cut into chunks, and the depth that the loader gives each chunk."""

import numpy as np
import torch
from torch import Tensor

from i3dist.data.shards import document_depth
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState

BOS, EOS = 2, 3


def stream(seed: int, chunks: int, length: int, vocab: int, mean_document: float) -> Tensor:
    """Tokens [1, chunks, length] of ``<BOS> text <EOS>`` documents."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < chunks * length:
        size = min(rng.geometric(1.0 / mean_document), chunks * length)
        tokens += [BOS, *rng.integers(4, vocab, size).tolist(), EOS]
    return torch.tensor(tokens[: chunks * length]).view(1, chunks, length)


def depth_of(tokens: Tensor) -> Tensor:
    """[B, K, T] -> [B, K], by the loader's own rule."""
    rows = [torch.from_numpy(document_depth(row.numpy().astype(np.uint16), BOS)) for row in tokens]
    return torch.stack(rows)


def empty(model: I3LM, rows: int = 1) -> LaneState:
    """Lanes that have read nothing, in the model's type."""
    weight = model.head.weight
    return LaneState.empty(rows, model.settings, weight.device, weight.dtype)


def hidden_states(
    model: I3LM, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor
) -> tuple[Tensor, LaneState]:
    """What `head` reads, [B, K, T, D], and the lanes' state after the window."""
    below, state = model.below(tokens, depth, state)
    return model.norm_out(model.above(below, gate)), state


def logits(model: I3LM, tokens: Tensor, gate: float = 1.0) -> Tensor:
    """Logits [B, K, T, V] of whole streams in one window."""
    state = empty(model, len(tokens))
    hidden, _ = hidden_states(model, tokens, depth_of(tokens), state, torch.tensor(gate))
    return model.head(hidden)
