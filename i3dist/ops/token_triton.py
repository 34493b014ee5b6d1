"""What stands before and behind the layers of a decoding step, as Triton kernels.

Notation: B rows, P channels with padding, T tokens of a chunk, V vocabulary. The same in PyTorch is
`enter` in `i3dist.inference.batch_decoder`, and `choose_tokens` in `i3dist.inference.token_stream`.
"""

# Kernels are untyped, and tuples of pieces grow.
# mypy: disable-error-code="no-untyped-def, assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops.attend_triton import Place
from i3dist.ops.rows_triton import _start_next, early
from i3dist.ops.shift_mix import Norm
from i3dist.ops.step_triton import _normed, _row, _store
from i3dist.ops.triton_keys import compute_keys

ROWS, BLOCK = 64, 128  # blocks read at once, and their tokens, whose weights are summed first


@triton.jit
def _enter(
    tokens, table, norm_weight, norm_bias, D, eps, position, start, opened, depth, x, restart,
    BOS: tl.constexpr, CARRY: tl.constexpr, EARLY: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Places the token of a row: its document, and the start of the residual stream."""
    b = tl.program_id(0)
    slope, offset = _row(norm_weight, D, P, W), _row(norm_bias, D, P, W)
    _start_next(EARLY)
    token = tl.maximum(tl.load(tokens + b), 0)
    normed = _normed(_row(table + token * D, D, P, W), slope, offset, D, eps, x, W)
    _store(x + b * P, normed, P, W)
    at, begins = tl.load(position + b), token == BOS
    first = at == 0
    if CARRY:
        first = first & (tl.load(depth + b) == 0)
    tl.store(restart + b, (begins | first).to(tl.int8))
    tl.store(start + b, at, begins)
    tl.store(opened + b, 1, begins)


@triton.jit
def _keep(x, hidden, position, T, EARLY: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """Puts a row's token into its chunk, and counts it."""
    b = tl.program_id(0)
    _start_next(EARLY)
    at = tl.load(position + b)
    _store(hidden + (b * T + at) * P, _row(x + b * P, P, P, W), P, W)
    tl.debug_barrier()  # all threads have read the place
    tl.store(position + b, at + 1)


@triton.jit
def _shift(bits, COUNT: tl.constexpr):
    """Shift 64 bits right, with zeros from the left."""
    return (bits >> COUNT) & ((1 << (64 - COUNT)) - 1)


@triton.jit
def _mix(bits, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """SplitMix64's function from 64 bits to 64 bits."""
    bits = (bits ^ _shift(bits, 30)) * FIRST
    bits = (bits ^ _shift(bits, 27)) * SECOND
    return bits ^ _shift(bits, 31)


@triton.jit
def _piece(logits, allowed, V, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS blocks of a row's logits, where they stand, and whether all are finite; -inf behind."""
    token = first + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.load(logits + token, token < V, 0.0)
    finite = tl.abs(row) < float("inf")
    return row + tl.load(allowed + token, token < V, float("-inf")), token, finite


@triton.jit
def _shares(row, most, temperature):
    """What tokens' probabilities are proportional to, in fp64, so that rounding cuts no tail."""
    return tl.exp((row - most) / temperature).to(tl.float64)


@triton.jit
def _sample(
    logits, allowed, seeds, drawn, tokens, temperature,
    V: tl.constexpr, EOS: tl.constexpr, BOS: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, NOT_FINITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LIKELIEST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Samples a row's next token."""
    b = tl.program_id(0)
    _start_next(EARLY)
    before, step, seed = tl.load(tokens + b), tl.load(drawn + b), tl.load(seeds + b)
    logits += b * V
    highest, best, all_finite = _piece(logits, allowed, V, 0, ROWS, BLOCK)
    for first in tl.static_range(ROWS * BLOCK, V, ROWS * BLOCK):
        row, token, finite = _piece(logits, allowed, V, first, ROWS, BLOCK)
        best = tl.where(row > highest, token, best)
        highest, all_finite = tl.maximum(highest, row), all_finite & finite
    right = tl.min(tl.min(all_finite.to(tl.int32), axis=1)) != 0
    most = tl.max(tl.max(highest, axis=1))
    if LIKELIEST:
        chosen = tl.min(tl.min(tl.where(highest == most, best, V), axis=1)).to(tl.int64)
    else:
        totals, whole = (), tl.full((), 0, tl.float64)
        for first in tl.static_range(0, V, ROWS * BLOCK):
            row, _, _ = _piece(logits, allowed, V, first, ROWS, BLOCK)
            total = tl.sum(tl.sum(_shares(row, most, temperature), axis=1))
            totals += (total,)
            whole += total
        bits = _mix(_mix(seed, FIRST, SECOND) + (step + 1) * STEP, FIRST, SECOND)
        point = _shift(bits, 11).to(tl.float64) * (2.0**-53) * whole
        # The piece of the point: the last with any share that begins at it or before.
        start, end, piece = whole * 0, whole * 0, tl.full((), 0, tl.int32)
        for i in tl.static_range(len(totals)):
            begun = (totals[i] > 0) & (end <= point)
            start, piece = tl.where(begun, end, start), tl.where(begun, i, piece)
            end += totals[i]
        row, _, _ = _piece(logits, allowed, V, piece * ROWS * BLOCK, ROWS, BLOCK)
        # Its first block whose end is above the point; by rounding it may be that none is.
        sums = tl.sum(_shares(row, most, temperature), axis=1)
        ends, number = start + tl.cumsum(sums), tl.arange(0, ROWS)
        block = tl.sum((ends <= point).to(tl.int32))
        block = tl.minimum(block, tl.max(tl.where(sums > 0, number, 0))) + piece * ROWS
        start = tl.max(tl.where(ends <= point, ends, start))
        lane = tl.arange(0, BLOCK)
        token = block * BLOCK + lane
        row = tl.load(logits + token, token < V, 0.0)
        row += tl.load(allowed + token, token < V, float("-inf"))
        shares = _shares(row, most, temperature)
        inside = tl.sum((start + tl.cumsum(shares) <= point).to(tl.int32))
        inside = tl.minimum(inside, tl.max(tl.where(shares > 0, lane, 0)))
        chosen = (block * BLOCK + inside).to(tl.int64)
    chosen = tl.where(before == EOS, BOS, chosen)
    tl.debug_barrier()  # all threads have read what changes
    tl.store(tokens + b, tl.where(right, chosen, NOT_FINITE))
    tl.store(drawn + b, step + 1)


def enter(
    tokens: Tensor, table: Tensor, norm: Norm, place: Place, bos_id: int, carry: bool
) -> tuple[Tensor, Tensor]:
    """Place tokens [B] in their documents; a token below 0 counts as 0.

    Args:
        tokens: int64.
        table: [V, D], of embeddings.
        norm: of what they give.
        place: where the rows are; changes.
        bos_id: the token that opens a document.
        carry: whether state goes on from one chunk of a document to the next.

    Returns:
        The residual stream's start [B, P], and whether recurrent state restarts, [B] bool.
    """
    rows, width = len(tokens), len(norm.weight)
    position, start, opened, depth, _ = place
    x, restart = table.new_empty(rows, width), torch.empty_like(opened)
    _enter[(rows,)](
        tokens.contiguous(), table, norm.weight, norm.bias, norm.channels, norm.eps, position,
        start, opened, depth, x, restart, BOS=bos_id, CARRY=carry, P=width, W=512, num_warps=4,
        **early(),
    )  # fmt: skip
    return x, restart


def keep(x: Tensor, hidden: Tensor, position: Tensor) -> None:
    """Put tokens x [B, P] into their places of hidden [B, T, P], and count them."""
    rows, length, width = hidden.shape
    _keep[(rows,)](x, hidden, position, length, P=width, W=512, num_warps=4, **early())


def sample(
    logits: Tensor, allowed: Tensor, temperature: float, numbers: tuple[Tensor, Tensor],
    tokens: Tensor, eos_id: int, bos_id: int, not_finite: int, constants: tuple[int, int, int],
) -> None:  # fmt: skip
    """Replace tokens [B] int64 by those that follow, with `bos_id` behind `eos_id`.

    Args:
        logits: [B, V] fp32.
        allowed: [V], added to them.
        temperature: divides the logits; 0 takes the likeliest token.
        numbers: [B] int64, seeds and how many numbers were drawn from them, which changes.
        tokens: changes.
        eos_id: the token that ends a document.
        bos_id: the one that opens a document.
        not_finite: stands for a token that cannot be sampled, as logits are not finite.
        constants: SplitMix64's step and factors.
    """
    rows, size = logits.shape
    step, first, second = constants
    _sample[(rows,)](
        logits, allowed, *numbers, tokens, float(temperature or 1.0), V=size, EOS=eos_id,
        BOS=bos_id, STEP=step, FIRST=first, SECOND=second, NOT_FINITE=not_finite, ROWS=ROWS,
        BLOCK=BLOCK, LIKELIEST=temperature == 0, num_warps=32, **early(),
    )  # fmt: skip


compute_keys(globals())
