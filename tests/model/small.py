"""Streams and the loss of the small model, and how near numbers must be."""

import torch
from hypothesis import strategies as st

from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE
from tests.model.conftest import SMALL
from tests.model.streams import depth_of, stream

T, V, C = SMALL["chunk_length"], SMALL["vocab_size"], SMALL["history_chunks"]
seeds = st.integers(0, 2**31)
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # fp64 rounding


def random_stream(seed: int, chunks: int = 6, mean_document: float = 30) -> torch.Tensor:
    return stream(seed, chunks, T, V, mean_document)


def other_token(token: torch.Tensor) -> torch.Tensor:
    return 4 + (token - 4 + 1) % (V - 4)


def training_loss(model: I3LM, tokens: torch.Tensor, state: LaneState) -> torch.Tensor:
    targets = torch.full_like(tokens, IGNORE)
    targets[..., :-1] = tokens[..., 1:]
    losses, _ = model(tokens, targets, depth_of(tokens), state, torch.tensor(1.0))
    return losses.sum()
