"""Operations of a token in a GPT, and how many the device can do in practice: the best rate that a
bf16 matrix product reaches on it. `i3dist.tracking.mfu` has the formula, and the data sheets' peaks
that MFU is a share of.
"""

import time
from collections.abc import Callable, Iterable

import torch
from gpt import GPT
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.layers import Channels
from i3dist.model.segments import causal_mask, segment_ids
from i3dist.tracking.mfu import PerToken, mean_seen

FORMULA = "FLOPs/token = 6 x weights in its matrix products + 12 x attention width x keys it sees"


def of_gpt(model: GPT, tokens: Tensor, bos_id: int | None) -> PerToken:
    """Rows of the GPT [B, T]; causal over whole rows, or in documents that `bos_id` opens."""
    projections = [m for m in model.modules() if isinstance(m, nn.Linear)]
    length = tokens.shape[1]
    keys = (length + 1) / 2
    if bos_id is not None:
        keys = mean_seen(causal_mask(segment_ids(tokens, bos_id)))
    attention = len(model.blocks) * model.embedding.embedding_dim * keys
    return PerToken(float(sum(m.weight.numel() for m in projections)), attention)


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
