"""How many floating-point operations a token takes, and how many the device can do.

    FLOPs per token = 6 x N + 12 x A

N is the number of weights that a token is multiplied with: each projection's stored weights, times
how often it is applied per token. Tables, norms, padding and elementwise work (WKV too) count as 0.
A is the sum over attention layers of width x keys that a token sees on average, whatever else a
kernel computes. Forward is one third, backward two; a multiplication and an addition are two
operations (Kaplan et al., 2020, arXiv:2001.08361).

MFU, model FLOPs utilisation (Chowdhery et al., 2022, arXiv:2204.02311), is here the share of the
best rate that a bf16 matrix product reaches on the same device in the same run.
"""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from gpt import GPT
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.data.lanes import Batch
from i3dist.model.layers import Channels
from i3dist.model.lm import I3LM
from i3dist.model.segments import causal_mask, history_mask, last_segment, segment_ids

FORMULA = "FLOPs/token = 6 x weights in its matrix products + 12 x attention width x keys it sees"


class PerToken(NamedTuple):
    """What the formula takes."""

    weights: float  # N
    attention: float  # A

    @property
    def flops(self) -> float:
        """Floating-point operations of forward and backward."""
        return 6 * self.weights + 12 * self.attention


def of_i3(model: I3LM, batch: Batch) -> PerToken:
    """A window of the i3, with the library's compressor or without compressor and history.

    Per chunk, the compressor's feed-forward refines M latents, whose sub-latents read the kept
    tokens. A window of K chunks projects the sub-latents of C + K chunks; R of them cost as much as
    a token. Left out: router scores, picking queries, and work that does not grow with the lanes.
    """
    s, (_, window, length) = model.settings, batch.tokens.shape
    with_history = model.keys_per_chunk > 0
    latents = s.latents / length if with_history else 0.0
    again = latents * (s.history_chunks + window) / window
    uses = {
        "compressor.ff": latents,
        "compressor.token": 0.0,
        "compressor.salience": 0.0,  # a sum
        "attention.key_value": 1 + again,
    }
    weights = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            use = next((n for part, n in uses.items() if part in name), 1.0)
            weights += use * module.weight.numel()
    segments = segment_ids(batch.tokens, model.bos_id).flatten(0, 1)
    keys = _mean_seen(causal_mask(segments))
    read = 0.0
    if with_history:
        past = history_mask(segments, batch.depth.flatten(), s.history_chunks)
        keys += model.keys_per_chunk * _mean_seen(past)
        # R sub-latents of a latent, each an R-th as wide.
        read = latents * float(last_segment(segments).sum(-1).float().mean())
    return PerToken(weights, s.d_model * (len(model.upper) * keys + read))


def of_gpt(model: GPT, tokens: Tensor, bos_id: int | None) -> PerToken:
    """Rows of the GPT [B, T]; causal over whole rows, or in documents that `bos_id` opens."""
    projections = [m for m in model.modules() if isinstance(m, nn.Linear)]
    length = tokens.shape[1]
    keys = (length + 1) / 2
    if bos_id is not None:
        keys = _mean_seen(causal_mask(segment_ids(tokens, bos_id)))
    attention = len(model.blocks) * model.embedding.embedding_dim * keys
    return PerToken(float(sum(m.weight.numel() for m in projections)), attention)


def _mean_seen(mask: Tensor) -> float:
    """Keys a query sees on average; mask [..., queries, keys] bool."""
    return float(mask.sum() / mask[..., 0].numel())


Product = tuple[int, int, int]  # rows, inner, columns


def products(cube: int, rows: int, model: ModelSettings) -> list[Product]:
    """A cube, and the model's own products of `rows` tokens."""
    width = Channels(model.d_model)
    wide = width.times(model.ff_mult).computed
    d = width.computed
    sides = [(d, d), (d, wide), (wide, d), (d, model.vocab)]
    return [(cube, cube, cube), *((rows, *side) for side in sides)]


def matrix_product_rate(shapes: Iterable[Product], device: torch.device) -> float:
    """The best of some bf16 matrix products of random numbers, in FLOP/s."""
    best = 0.0
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device).bfloat16()
        b = torch.randn(columns, inner, device=device).bfloat16()
        out = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)
        seconds = _seconds(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), device)
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Per call, the best of three times twenty calls in a row."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(4):
        wait()
        started = time.perf_counter()
        for _ in range(20):
            call()
        wait()
        times.append((time.perf_counter() - started) / 20)
    return min(times[1:])
