"""Sampling the next token of every row of a batch. Notation: B rows, V vocabulary.

Everything here runs on the logits' device and waits for nothing, so it can be part of a CUDA graph.
"""

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.errors import UserError
from i3dist.inference.sampling_settings import Sampling as Sampling

# Tokens whose weights are summed first: for several rows PyTorch 2.11 compiles no long running sum.
BLOCK = 128

# SplitMix64 (Steele et al., 2014, doi:10.1145/2660193.2660195), its constants as signed integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = (30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)
SPLIT_MIX = (_STEP, _ROUNDS[0][1], _ROUNDS[1][1])


def check_request(tokens: int, seed: int) -> None:
    """Raise `UserError` unless so many tokens can be sampled with this seed."""
    if not isinstance(tokens, Integral) or tokens < 1:
        raise UserError(f"tokens={tokens} must be 1 or more, a whole number")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be from 0 to 2^63 - 1, a whole number")


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Sample a token id for each row, never one at -inf: [B] int64.

    Args:
        logits: [B, V] fp32.
        sampling: how.
        uniform: [B] fp64, random numbers in [0, 1).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # In fp64, so that rounding cuts no tail.
    weights = distribution(logits, sampling).double()
    blocks = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(-1).cumsum(-1)
    point = uniform.unsqueeze(-1) * ends[:, -1:]
    block = _first_above(ends, point)
    rows = torch.arange(len(logits), device=logits.device)
    start = F.pad(ends, (1, 0))[rows, block].unsqueeze(-1)
    return block * BLOCK + _first_above(start + blocks[rows, block].cumsum(-1), point)


def _first_above(sums: Tensor, point: Tensor) -> Tensor:
    """The first of rising sums [B, N] that is above a point [B, 1]: [B] int64. If rounding leaves
    none, the first of the largest, which is the last that adds something."""
    return ((sums <= point) & (sums < sums[:, -1:])).sum(-1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are sampled from at a temperature above 0: weights [B, V] fp32.

    They are the probabilities, or 0 where `top_k` or `top_p` cuts, and need not sum to 1. `top_p`
    applies to what `top_k` leaves. Of equally likely tokens the lowest id counts as the likelier.
    """
    logits = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return logits.softmax(-1)
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        values, ids = values[:, : sampling.top_k], ids[:, : sampling.top_k]
    weights = values.softmax(-1)
    if sampling.top_p < 1:  # at 1 a rounded sum could cut the last tokens
        # A token stays if those before it have not reached top_p. So the first always stays.
        before = F.pad(weights[:, :-1].double().cumsum(-1), (1, 0))
        weights = weights.masked_fill(before >= sampling.top_p, 0.0)
    return torch.zeros_like(logits).scatter(-1, ids, weights)


def uniform(seeds: Tensor, step: Tensor) -> Tensor:
    """Random numbers in [0, 1): [B] fp64, the same on every device and in every version of PyTorch.

    Args:
        seeds: [B] int64; each seed has a sequence of its own.
        step: int64 from 0, which number of the sequence; scalar, or [B].
    """
    bits = _mix(_mix(seeds) + (step + 1) * _STEP)
    return _shift(bits, 11).double() * 2.0**-53


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's function from 64 bits to 64 bits; products wrap around."""
    for shift, factor in _ROUNDS:
        bits = (bits ^ _shift(bits, shift)) * factor
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Shift right, with zeros from the left."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
