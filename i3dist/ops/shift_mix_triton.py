"""Residual, LayerNorm, token shift and mixes as a pair of Triton kernels: the CUDA form.

Notation: N sequences, T tokens, D channels, P channels with padding, M mixes. Tokens are numbered
through all sequences. A program walks a run of them with whole tokens in registers, so it has the
previous one at hand: the forward kernel goes from first to last, the backward kernel from last to
first, as gradients go back one token. The token beyond a run's edge it computes once more.

Triton's tensors are powers of two long, and P is seldom near one, so the channels of a token, a
row in the functions here, are a tuple of pieces of W channels. Parameter gradients are summed
over a run in registers and leave as one summand per program: no atomic additions, so the same bits
in every run.
"""

# Kernels are untyped, and tuples of pieces grow.
# mypy: disable-error-code="no-untyped-def, assignment"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3dist.ops.ahead import launch
from i3dist.ops.shift_mix_naive import MixInputs, MixSaved
from i3dist.ops.triton_keys import compute_keys


class Plan(NamedTuple):
    """How a kernel is spread over the device."""

    programs: int  # at most
    width: int  # W
    warps: int  # of a program
    stages: int  # tokens in flight: loads run ahead of the arithmetic, but for single bytes (cuts)


# An H100 or H200 has 132 multiprocessors. The backward kernel fills the registers of each with two
# programs; more would leave more summands.
FORWARD = Plan(programs=4224, width=256, warps=4, stages=4)
BACKWARD = Plan(programs=264, width=256, warps=4, stages=4)


@triton.jit
def _load(pointer, D: tl.constexpr, P: tl.constexpr, W: tl.constexpr, when=True):
    """A row in fp32; 0 beyond D, and throughout unless `when`."""
    row = ()
    for first in tl.static_range(0, P, W):
        channel = first + tl.arange(0, W)
        piece = tl.load(pointer + channel, mask=(channel < D) & when, other=0.0)
        row += (piece.to(tl.float32),)
    return row


@triton.jit
def _store(pointer, row, P: tl.constexpr, W: tl.constexpr):
    for c in tl.static_range(len(row)):
        channel = c * W + tl.arange(0, W)
        tl.store(pointer + channel, row[c].to(pointer.dtype.element_ty), mask=channel < P)


@triton.jit
def _zeros_like(x):
    result = ()
    for c in tl.static_range(len(x)):
        result += (tl.zeros_like(x[c]),)
    return result


@triton.jit
def _add(x, y):
    """x + y."""
    result = ()
    for c in tl.static_range(len(x)):
        result += (x[c] + y[c],)
    return result


@triton.jit
def _subtract(x, y):
    """x - y."""
    result = ()
    for c in tl.static_range(len(x)):
        result += (x[c] - y[c],)
    return result


@triton.jit
def _multiply(x, y):
    """x y."""
    result = ()
    for c in tl.static_range(len(x)):
        result += (x[c] * y[c],)
    return result


@triton.jit
def _multiply_add(x, y, z):
    """x y + z."""
    result = ()
    for c in tl.static_range(len(x)):
        result += (x[c] * y[c] + z[c],)
    return result


@triton.jit
def _affine(x, slope, offset):
    """x slope + offset, both scalar."""
    result = ()
    for c in tl.static_range(len(x)):
        result += (x[c] * slope + offset,)
    return result


@triton.jit
def _keep(x, limit, W: tl.constexpr):
    """x; 0 from channel `limit` on. Selected, not multiplied by 0: x may be infinite."""
    result = ()
    for c in tl.static_range(len(x)):
        result += (tl.where(c * W + tl.arange(0, W) < limit, x[c], 0.0),)
    return result


@triton.jit
def _round(x, dtype: tl.constexpr):
    """x in fp32, as it would be read back from a tensor of the dtype."""
    result = ()
    for c in tl.static_range(len(x)):
        result += (x[c].to(dtype).to(tl.float32),)
    return result


@triton.jit
def _load_sum(x, branch, at, D: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """A row of x + branch in fp32, rounded to x's dtype; of x where there is no branch."""
    row = _load(x + at, D, P, W)
    if branch is not None:
        row = _round(_add(row, _load(branch + at, D, P, W)), x.dtype.element_ty)
    return row


@triton.jit
def _fold(x):
    """The sum of a row's pieces [W]."""
    total = x[0]
    for c in tl.static_range(1, len(x)):
        total += x[c]
    return total


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _measure(x, eps, D: tl.constexpr, W: tl.constexpr):
    """A row's mean, and 1 / sqrt(variance + eps)."""
    mean = tl.sum(_fold(x), axis=0) / D
    centered = _keep(_affine(x, 1.0, -mean), D, W)
    return mean, tl.rsqrt(tl.sum(_fold(_multiply(centered, centered)), axis=0) / D + eps)


@triton.jit(do_not_specialize=["tokens", "T", "run"])
def _shift_mix_forward_kernel(
    x,
    weight,
    bias,
    mixes,
    restart,
    shift,
    branch,
    mixed,
    last,
    statistics,
    total,
    tokens,
    T,
    run,
    eps,
    D: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(first + run, tokens)
    n, t = first // T, first % T
    w, b = _load(weight, D, P, W), _load(bias, D, P, W)
    shares = ()
    for i in tl.static_range(len(mixed)):
        shares += (_load(mixes + i * P, D, P, W),)
    row = _load_sum(x, branch, tl.maximum(first - 1, 0) * P, D, P, W)
    mean, scale = _measure(row, eps, D, W)
    before = _multiply_add(_affine(row, scale, -mean * scale), w, b)
    next_cut = tl.load(restart + first) != 0
    for token in tl.range(first, end, num_stages=STAGES):
        row = _load_sum(x, branch, token * P, D, P, W)
        if branch is not None:
            _store(total + token * P, row, P, W)
        cut = next_cut
        next_cut = tl.load(restart + tl.minimum(token + 1, tokens - 1)) != 0
        if cut | (t == 0):
            before = _load(shift + n * P, D, P, W, when=cut == 0)
        mean, scale = _measure(row, eps, D, W)
        tl.store(statistics + token, mean)
        tl.store(statistics + tokens + token, scale)
        normed = _multiply_add(_affine(row, scale, -mean * scale), w, b)
        change = _subtract(normed, before)
        for i in tl.static_range(len(mixed)):
            _store(mixed[i] + token * P, _multiply_add(change, shares[i], before), P, W)
        before = normed
        t += 1
        if t == T:
            _store(last + n * P, normed, P, W)
            n, t = n + 1, t - T


@triton.jit
def _unmix(grads, shares):
    """The gradients of normed and before, from those of the mixed."""
    normed, both = _multiply(grads[0], shares[0]), grads[0]
    for i in tl.static_range(1, len(grads)):
        normed, both = _multiply_add(grads[i], shares[i], normed), _add(both, grads[i])
    return normed, _subtract(both, normed)


@triton.jit
def _norm_backward(grad, standard, scale, D: tl.constexpr, W: tl.constexpr):
    """The gradient of x from that of its standardised form."""
    total, product = tl.reduce(
        (_fold(grad), _fold(_multiply(grad, standard))), axis=0, combine_fn=_add_pairs
    )
    along = _affine(standard, -product / D * scale, -total / D * scale)
    result = ()
    for c in tl.static_range(len(grad)):
        result += (grad[c] * scale + along[c],)
    return _keep(result, D, W)


@triton.jit(do_not_specialize=["tokens", "T", "run"])
def _shift_mix_backward_kernel(
    grad_mixed,
    grad_last,
    x,
    weight,
    bias,
    mixes,
    restart,
    shift,
    statistics,
    grad_total,
    grad_x,
    grad_shift,
    summands,
    tokens,
    T,
    run,
    D: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    STAGES: tl.constexpr,
):
    M: tl.constexpr = len(grad_mixed)
    first = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(first + run, tokens)
    n, t = (end - 1) // T, (end - 1) % T
    w, b = _load(weight, D, P, W), _load(bias, D, P, W)
    shares, sum_mixes = (), ()
    for i in tl.static_range(M):
        shares += (_load(mixes + i * P, D, P, W),)
        sum_mixes += (_zeros_like(w),)
    sum_w, sum_b = _zeros_like(w), _zeros_like(w)
    # What the token after the run passes back.
    after = tl.minimum(end, tokens - 1)
    grads = ()
    for i in tl.static_range(M):
        grads += (_load(grad_mixed[i] + after * P, D, P, W, when=tl.load(restart + after) == 0),)
    passed = _unmix(grads, shares)[1]
    scale = tl.load(statistics + tokens + end - 1)
    row = _load(x + (end - 1) * P, D, P, W)
    standard = _affine(row, scale, -tl.load(statistics + end - 1) * scale)
    normed = _multiply_add(standard, w, b)
    next_cut = tl.load(restart + end - 1) != 0
    for step in tl.range(0, end - first, num_stages=STAGES):
        token = end - 1 - step
        behind = tl.maximum(token - 1, 0)
        row = _load(x + behind * P, D, P, W)
        grads = ()
        for i in tl.static_range(M):
            grads += (_load(grad_mixed[i] + token * P, D, P, W),)
        cut = next_cut
        next_cut = tl.load(restart + behind) != 0
        next_scale = tl.load(statistics + tokens + behind)
        next_standard = _affine(row, next_scale, -tl.load(statistics + behind) * next_scale)
        next_normed = _multiply_add(next_standard, w, b)
        before = next_normed
        if cut | (t == 0):
            before = _load(shift + n * P, D, P, W, when=cut == 0)
        if t == T - 1:
            passed = _load(grad_last + n * P, D, P, W)
        change = _subtract(normed, before)
        totals = ()
        for i in tl.static_range(M):
            totals += (_multiply_add(grads[i], change, sum_mixes[i]),)
        sum_mixes = totals
        grad, past = _unmix(grads, shares)
        grad = _add(grad, passed)
        sum_w, sum_b = _multiply_add(grad, standard, sum_w), _add(sum_b, grad)
        grad = _norm_backward(_multiply(grad, w), standard, scale, D, W)
        if grad_total is not None:
            grad = _add(grad, _load(grad_total + token * P, D, P, W))
        _store(grad_x + token * P, grad, P, W)
        passed = _keep(past, tl.where(cut, 0, D), W)
        if t == 0:
            _store(grad_shift + n * P, passed, P, W)
            n, t = n - 1, t + T
        t -= 1
        standard, scale, normed = next_standard, next_scale, next_normed
    summands += tl.program_id(0) * (2 + M) * P
    _store(summands, sum_w, P, W)
    _store(summands + P, sum_b, P, W)
    for i in tl.static_range(M):
        _store(summands + (2 + i) * P, sum_mixes[i], P, W)


def forward(inputs: MixInputs) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """M mixed [N, T, P], the last normed [N, P], each token's mean and scale [2, N, T], and
    x + branch [N, T, P] (no elements if there is no branch)."""
    x, weight, bias, mixes, restart, shift, channels, eps, branch = inputs
    x, weight, bias, mixes, shift = _contiguous(x, weight, bias, mixes, shift)
    rows, length, width = x.shape
    mixed = [torch.empty_like(x) for _ in mixes]
    last = torch.empty_like(shift)
    statistics = x.new_empty(2, rows, length, dtype=torch.float32)
    total = x.new_empty(0 if branch is None else x.shape)
    tokens = rows * length
    run = triton.cdiv(tokens, FORWARD.programs)
    launch(_shift_mix_forward_kernel, (triton.cdiv(tokens, run),), x)(
        x,
        weight,
        bias,
        mixes,
        restart.contiguous().view(torch.uint8),
        shift,
        None if branch is None else branch.contiguous(),
        tuple(mixed),
        last,
        statistics,
        total,
        tokens,
        length,
        run,
        eps,
        D=channels,
        P=width,
        W=FORWARD.width,
        STAGES=FORWARD.stages,
        num_warps=FORWARD.warps,
    )
    return mixed, last, statistics, total


def backward_programs(tokens: int) -> int:
    """How many programs, so how many summands of the parameters' gradients, there are."""
    return triton.cdiv(tokens, triton.cdiv(tokens, BACKWARD.programs))


def backward(
    grad_mixed: list[Tensor], grad_last: Tensor, saved: MixSaved, grad_total: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and shift, and summands [:, 2 + M, P] fp32 of weight's, bias's and mixes'."""
    x, weight, bias, mixes, restart, shift, statistics, channels = saved
    x, weight, bias, mixes, shift = _contiguous(x, weight, bias, mixes, shift)
    rows, length, width = x.shape
    grad_x, grad_shift = torch.empty_like(x), torch.empty_like(shift)
    tokens = rows * length
    programs = backward_programs(tokens)
    summands = statistics.new_empty(programs, 2 + len(mixes), width)
    launch(_shift_mix_backward_kernel, (programs,), x)(
        tuple(_contiguous(*grad_mixed)),
        grad_last.contiguous(),
        x,
        weight,
        bias,
        mixes,
        restart.contiguous().view(torch.uint8),
        shift,
        statistics,
        None if grad_total is None else grad_total.contiguous(),
        grad_x,
        grad_shift,
        summands,
        tokens,
        length,
        triton.cdiv(tokens, BACKWARD.programs),
        D=channels,
        P=width,
        W=BACKWARD.width,
        STAGES=BACKWARD.stages,
        num_warps=BACKWARD.warps,
    )
    return grad_x, grad_shift, summands


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


compute_keys(globals())
