"""Products of several rows of a decoding step, as Triton kernels on matrix units.

A product of up to 64 rows takes as long as its weights take to arrive. So it has nearly as many
programs as the device has multiprocessors: where outputs are few, the inputs are cut, and the
kernel that reads the product adds its parts. And weights are fetched while the last kernel still
runs: for up to 32 rows into shared memory, for more rows, where that is slower, into the device's
cache.
PyTorch's operators compute products of more than 64 rows, and the last product of up to 32.

Notation: B rows, K inputs, F outputs, N outputs of a program, W inputs that it reads at once.
"""

# Kernels are untyped, and tuples of pieces grow.
# mypy: disable-error-code="no-untyped-def, assignment"

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from i3dist.ops.triton_keys import compute_keys

NONE, GELU, CHANNEL_MIX, PARTS = range(4)  # what becomes of a product
LEAST_ROWS = 16  # that matrix units multiply
FEW_ROWS = 32  # for which a program holds its weights in shared memory
MOST_ROWS = 64  # of a program


class Plan(NamedTuple):
    """How a product is spread over the device."""

    outputs: int  # N
    width: int  # W
    stages: int  # tiles of inputs that are on their way or in use
    warps: int  # of a program
    cuts: int = 1  # of the inputs

    def each(self, inputs: int) -> int:
        """Tiles of a cut."""
        return triton.cdiv(triton.cdiv(inputs, self.width), self.cuts)


# Plans of an RWKV layer's products, used for attention's too, and of the last product. Chosen by
# timing whole layers on an H200, out of 40 to 78 for each.
HELD = {
    "time": Plan(64, 256, 1, 4, 5),
    "output": Plan(64, 256, 1, 4, 5),
    "hidden": Plan(64, 256, 1, 4),
    "down": Plan(64, 256, 2, 4, 10),
}
STAGED = {
    "time": Plan(64, 128, 4, 4, 2),
    "output": Plan(32, 128, 4, 4, 2),
    "hidden": Plan(64, 128, 5, 4),
    "down": Plan(64, 128, 3, 4, 10),
    "head": Plan(256, 64, 4, 8),
}


@triton.jit
def _round(x, pointer):
    """x as it would be in memory, in fp32."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _start_next(EARLY: tl.constexpr):
    """Let the next kernel load its weights, and wait for what the last one has written."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _fetch(
    matrix, first, rows, stride, size, ROWS: tl.constexpr, EACH: tl.constexpr, EARLY: tl.constexpr
):
    """Bring ROWS rows of `size` bytes, as many as a matrix has, into the device's cache; in EACH
    pieces of 16 bytes or a multiple, one for each thread."""
    if EARLY:
        number = tl.arange(0, ROWS * EACH)
        row, piece = first + number // EACH, (size // EACH + 15) // 16 * 16
        start = number % EACH * piece
        size = tl.where(row < rows, tl.minimum(piece, size - start), 0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0;"
            " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [matrix.to(tl.int64) + row.to(tl.int64) * stride + start, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _finish(
    total, x, y, group, row, output, size, B, outputs, F, KIND: tl.constexpr
):  # fmt: skip
    """Write a tile [rows, N] of a product. The outputs are those of a group, `size` of them."""
    mask = (row < B)[:, None] & (output < size)[None, :]
    if KIND == 3:  # PARTS
        number = tl.program_id(1) * (outputs // F) + group
        tl.store(y + (number * B + row[:, None]) * F + output[None, :], total, mask)
    else:
        total = _round(total, x)
        if KIND == 2:  # CHANNEL_MIX
            positive = tl.maximum(total, 0.0)
            gate = 1.0 / (1.0 + tl.exp(-total))
            total = tl.where(group > 0, gate, positive * positive)
        elif KIND == 1:  # GELU
            total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
        place = row[:, None] * outputs + (group * F + output)[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask)


@triton.jit
def _held(
    x, weight, y, B, stride, outputs, F,
    KIND: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    EACH: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """N outputs for ROWS rows, of EACH times W inputs, with weights that wait for the rows."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tiles, begin = tl.cdiv(F, N), tl.program_id(1) * EACH * W
    group, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * N
    size = tl.minimum(F, outputs - group * F)
    output, row = first + tl.arange(0, N), tl.arange(0, ROWS)
    weight += group * F * K
    BYTES: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    if EACH > 1:  # of one tile the loads below ask for all
        length = tl.minimum(EACH * W, K - begin) * BYTES
        _fetch(weight + begin, first, size, K * BYTES, length, N, max(1, 128 // N), EARLY)
    held = ()
    for i in tl.static_range(EACH):
        column = begin + i * W + tl.arange(0, W)
        mask = (output < size)[:, None] & (column < K)[None, :]
        held += (tl.load(weight + output[:, None] * K + column[None, :], mask, 0.0),)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    x += group * B * stride
    read = ()
    total = tl.zeros([N, ROWS], tl.float32)
    for i in tl.static_range(EACH + STAGES):
        if i < EACH:
            column = begin + i * W + tl.arange(0, W)
            mask = (row < B)[:, None] & (column < K)[None, :]
            read += (tl.load(x + row[:, None] * stride + column[None, :], mask, 0.0),)
        if i >= STAGES:
            part = tl.trans(read[i - STAGES])
            total = tl.dot(held[i - STAGES], part, total, input_precision="ieee")
    _finish(tl.trans(total), x, y, group, row, output, size, B, outputs, F, KIND)


@triton.jit
def _staged(
    rows, weights, x, weight, y, B, outputs, F,
    KIND: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    EACH: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same, with weights that arrive as they are used; `rows` and `weights` are x and weight
    as descriptors of tiles."""
    tiles, begin = tl.cdiv(F, N), tl.program_id(1) * EACH * W
    group, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * N
    size = tl.minimum(F, outputs - group * F)
    BYTES: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    length = tl.minimum(EACH * W, K - begin) * BYTES
    _fetch(
        weight + group * F * K + begin, first, size, K * BYTES, length, N, max(1, 128 // N), EARLY
    )
    _start_next(EARLY)
    total = tl.zeros([ROWS, N], tl.float32)
    for i in tl.range(0, EACH, num_stages=STAGES):
        part = rows.load([group * B, begin + i * W])
        w = weights.load([group * F + first, begin + i * W])
        total = tl.dot(part, tl.trans(w), total, input_precision="ieee")
    output, row = first + tl.arange(0, N), tl.arange(0, ROWS)
    _finish(total, x, y, group, row, output, size, B, outputs, F, KIND)


def rows_product(
    x: Tensor,
    weight: Tensor,
    kind: int,
    name: str,
    group: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A weight [F, K] times several rows.

    Args:
        x: [B, K], or [groups, B, K] with rows of its own for each group of outputs.
        weight: of all groups, one below the other.
        kind: what becomes of the product.
        name: of the plan.
        group: outputs of a group; the last may have fewer. None is all outputs.
        dtype: of the result; None is that of x.

    Returns:
        [B, F]; of `PARTS`, which add up to the product, [cuts, groups, B, outputs of a group]. They
        are fp32, a single one is of x's dtype.
    """
    (outputs, width), rows = weight.shape, x.shape[-2]
    group = group or outputs
    tile = max(LEAST_ROWS, triton.next_power_of_2(rows))
    few, in_library = rows <= FEW_ROWS, rows > MOST_ROWS or (rows <= FEW_ROWS and name not in HELD)
    held = few and not in_library and _fits(HELD[name], tile, x, held=True)
    plan = (HELD if held else STAGED)[name]
    if in_library or not (held or _fits(plan, tile, x, held=False)):
        return rows_product_naive(x, weight, kind, group, dtype)
    each = plan.each(width)
    cuts, groups = triton.cdiv(width, each * plan.width), triton.cdiv(outputs, group)
    if kind == PARTS:
        y = x.new_empty(cuts, groups, rows, group, dtype=torch.float32)
    else:
        y = x.new_empty(rows, outputs, dtype=dtype)
    last = outputs - (groups - 1) * group
    tiles = (groups - 1) * triton.cdiv(group, plan.outputs) + triton.cdiv(last, plan.outputs)
    grid = tiles, cuts
    sizes = {"KIND": kind, "K": width, "ROWS": tile, "N": plan.outputs, "W": plan.width}
    sizes |= {"EACH": each, "STAGES": plan.stages, "num_warps": plan.warps, **early()}
    if held:
        _held[grid](x, weight, y, rows, x.stride(-2), outputs, group, **sizes)
    else:
        flat = x if x.dim() == 2 else x.flatten(0, 1)
        parts = (flat, tile), (weight, plan.outputs)
        tiled = (TensorDescriptor.from_tensor(part, [n, plan.width]) for part, n in parts)
        _staged[grid](*tiled, x, weight, y, rows, outputs, group, **sizes)
    return y


def rows_product_naive(
    x: Tensor, weight: Tensor, kind: int, group: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The same by PyTorch's operators, in one part.

    It is faster for more than `MOST_ROWS` rows, and for the last product of up to `FEW_ROWS`.
    """
    x = x if x.dim() == 3 else x.unsqueeze(0)
    if kind == PARTS:
        return torch.bmm(x, weight.unflatten(0, (-1, group)).transpose(1, 2)).unsqueeze(0)
    y = [F.linear(*pair) for pair in zip(x, weight.split(group), strict=True)]
    if kind == CHANNEL_MIX:
        return torch.cat([y[0].relu().square(), y[1].sigmoid()], dim=-1)
    return (F.gelu(y[0]) if kind == GELU else y[0]).to(dtype or x.dtype)


def _fits(plan: Plan, rows: int, x: Tensor, held: bool) -> bool:
    """Whether the device has the instructions that a product needs, and its tiles fit in shared
    memory, all those of weights if they are held. fp32 has no kernel."""
    if not x.is_cuda:
        return True  # in the interpreter
    tiles = plan.stages * (plan.outputs + rows)
    if held:
        each = plan.each(x.shape[-1])
        tiles = each * plan.outputs + min(each, plan.stages + 1) * rows
    return early()["EARLY"] and x.element_size() == 2 and 2 * tiles * plan.width < _shared_memory()


@functools.cache
def _shared_memory() -> int:
    """Bytes of shared memory that a program can have."""
    device = torch.cuda.current_device()
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


@functools.cache
def early() -> dict[str, bool]:
    """Arguments of a launch: whether the kernel may start before the last one has ended, to load
    its weights (Hopper's programmatic dependent launch)."""
    early = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


compute_keys(globals())
