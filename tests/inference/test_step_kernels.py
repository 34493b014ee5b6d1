"""The Triton kernels of a decoding step against PyTorch's operators.

On a GPU, or without one in Triton's interpreter: TRITON_INTERPRET=1 and triton installed.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from i3dist.inference import batch_decoder as decoding
from i3dist.inference import steps
from i3dist.inference.batch_decoder import BatchDecoder, enter
from i3dist.inference.closing import RecordsClosing
from i3dist.inference.layout import laid_out
from i3dist.inference.place import Place
from i3dist.inference.sampling import SPLIT_MIX, Sampling
from i3dist.inference.steps import AttentionStep, LatentStep, Sight, attend_step, step_kernels
from i3dist.inference.token_stream import NOT_FINITE, choose_tokens
from i3dist.model.attention import AttentionBlock
from i3dist.model.compressor_records import RecordsCompressor
from i3dist.model.lm import I3LM
from i3dist.ops.order import highest
from i3dist.ops.shift_mix import Norm
from tests.inference.test_batch_decoder import gap, tensors
from tests.model.conftest import VARIANTS, build
from tests.model.small import C, T, random_stream
from tests.model.streams import logits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
THERE = importlib.util.find_spec("triton") and (INTERPRETED or torch.cuda.is_available())
pytestmark = pytest.mark.skipif(not THERE, reason="needs Triton with a GPU or its interpreter")
DEVICE = "cpu" if INTERPRETED else "cuda"
ROWS_KERNELS = pytest.mark.skipif(
    THERE and not INTERPRETED and torch.cuda.get_device_capability() < (9, 0),
    reason="needs a Hopper GPU or Triton's interpreter",
)
NEAR = 1e-5 if INTERPRETED else 1e-4
# Of products on matrix units, and their error.
PRECISE, ROUNDED = (torch.float32, 1e-5) if INTERPRETED else (torch.bfloat16, 1e-2)
ONE_SOFTMAX, TWO = "1xrwkv,1xattention", "1xrwkv,1xdual-attention"
MEANS = (1e9, 30, 6, 60, 1e9, 15)  # tokens of documents, of each row


def places(length: int, chunks: int) -> Place:
    """Of rows at a chunk's start, in its middle and at its end, with documents of every kind."""
    position = torch.tensor([0, 0, length // 2, length // 2, length - 1, length - 1])
    start = torch.tensor([0, 0, length // 3, length // 2, length - 1, 0])
    opened = torch.tensor([False, True, True, True, True, False])
    depth = torch.tensor([chunks + 2, 5, 3, 1, 2, 1])
    oldest = torch.tensor([0, chunks - 1, 1, 0, 1, chunks - 1])
    return Place(*(part.to(DEVICE) for part in (position, start, opened, depth, oldest)))


def sight(place: Place, length: int, chunks: int) -> Sight:
    """What tokens at these places see, one after the other."""
    own = torch.zeros(len(place.start), length, dtype=torch.bool)
    past = torch.zeros(len(place.start), chunks, dtype=torch.bool)
    order = torch.zeros(len(place.start), chunks, dtype=torch.int64)
    for row, (position, start, opened, depth, oldest) in enumerate(
        zip(*(part.tolist() for part in place), strict=True)
    ):
        own[row, start : position + 1] = True
        for slot in range(chunks):
            order[row, slot] = (slot - oldest) % chunks
        past[row, max(0, chunks - depth) :] = not opened
    return Sight(place.position, own.to(DEVICE), past.to(DEVICE), order.to(DEVICE))


@pytest.mark.parametrize(
    ("layers", "joined"), [(ONE_SOFTMAX, None), *((TWO, joined) for joined in (None, 0.3))]
)
@pytest.mark.parametrize("rows", [6, 1], ids="{} rows".format)
@torch.no_grad()
def test_attention_of_a_token(layers: str, joined: float | None, rows: int) -> None:
    """Several splits of chunk and of history, the last ones not full."""
    length, chunks, keys_per_chunk = 70, 3, 25
    torch.manual_seed(0)
    model = build(joined, layers=layers, chunk_length=length, history_chunks=chunks)
    model = model.float().to(DEVICE)
    block = model.upper[0]
    assert isinstance(block, AttentionBlock)
    attention = block.attention
    for parameter in block.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    place = Place(*(part[-rows:].contiguous() for part in places(length, chunks)))
    channels = attention.inner.computed // attention.heads
    size = (rows, attention.heads, chunks * keys_per_chunk + length, channels)
    keys, values = torch.randn(2, *size, device=DEVICE)
    first = attention.inner.per_head
    slots = torch.arange(chunks * keys_per_chunk, device=DEVICE) // keys_per_chunk
    keys[..., first:] = 0.0
    keys[:, :, : len(slots), first : first + chunks] = functional.one_hot(slots).float()
    x = model.width.pad(torch.randn(rows, model.width.stored, device=DEVICE))
    token, own_keys, own_values = torch.arange(rows, device=DEVICE), keys.clone(), values.clone()
    wanted = attend_step(block, x, keys, values, sight(place, length, chunks), token)

    parts = [attention.query, attention.key_value]
    parts += [attention.reserve] if hasattr(attention, "reserve") else []
    y = torch.cat([part(block.norm_attention(x)) for part in parts], dim=-1)
    kernels = step_kernels("attend_triton")
    heads = kernels.Heads(
        attention.heads, first, chunks, length, attention.scale, attention.age_bias,
        getattr(attention, "reserve_bias", None), getattr(attention, "joined", None),
    )  # fmt: skip
    counted = place._replace(position=place.position + 1)
    read = kernels.attend(y, own_keys, own_values, counted, heads)
    pairs = (read, wanted), (own_keys, keys), (own_values, values)
    assert all((part - other).abs().max() < NEAR for part, other in pairs)


@pytest.mark.parametrize(
    ("layers", "joined"),
    [
        ("1xrwkv,1xattention", None),
        *(("1xrwkv,1xdual-attention", j) for j in (None, 0.0, 0.3, 1.0)),
    ],
)
@torch.no_grad()
def test_attention_over_sub_latents(layers: str, joined: float | None) -> None:
    """As over the keys and values that are made of them. Several programs for chunks and for slots,
    the last ones not full; channels of a sub-latent are no power of two."""
    length, chunks, rows = 70, 9, 6
    torch.manual_seed(0)
    shape = {"d_model": 96, "chunk_length": length, "history_chunks": chunks, "latents": 33}
    model = build(joined, layers=layers, **shape)
    for parameter in model.parameters():
        parameter.copy_(0.15 * torch.randn_like(parameter))
    model = laid_out(model).float().to(DEVICE)
    (block,), (views,), kernels = model.upper, model.stack.views, step_kernels("attend_triton")
    assert isinstance(block, AttentionBlock)

    def residual(*size: int) -> Tensor:
        return model.width.pad(torch.randn(*size, model.width.stored, device=DEVICE))

    own = [block.attention.keys_values(residual(1, 1, length)) for _ in range(rows)]
    latents, x, token = residual(rows, chunks, 33), residual(rows), torch.arange(rows)
    by_keys, by_latents = (
        kind(block, model, views, own, latents) for kind in (AttentionStep, LatentStep)
    )
    history, place = by_latents.sub_latents, places(length, chunks)
    assert kernels.reads_latents(rows, block.attention.heads, history.latents.shape[-1], 4)
    assert sum(kernels._cut(history.latents.shape[-1])) > kernels.LEAST_DOT * 2
    wanted = attend_step(
        block, x, by_keys.keys, by_keys.values, sight(place, length, chunks), token.to(DEVICE)
    )
    weight, heads = by_latents.joined
    y = block.norm_attention(x) @ weight.T
    counted = place._replace(position=place.position + 1)
    read = kernels.attend(y, by_latents.keys, by_latents.values, counted, heads, history)
    assert (read - wanted).abs().max() < NEAR
    for part, other in (by_latents.keys, by_keys.keys), (by_latents.values, by_keys.values):
        assert (part - other[:, :, -length:]).abs().max() < NEAR


@pytest.mark.parametrize(
    ("rows", "heads", "channels", "size", "wanted"),
    [
        (5, 10, 304, 2, True),  # the default model's
        (4, 10, 304, 2, False),  # keys of few rows are as fast
        (5, 10, 300, 2, False),  # matrix units want 16 channels, or a multiple
        (5, 17, 304, 2, False),  # registers do not hold the sums of all heads,
        (5, 10, 304, 4, False),  # nor shared memory a tile of fp32,
        (5, 10, 1184, 2, False),  # or of the literal compressor's whole latents
    ],
)
def test_which_history_is_read_as_sub_latents(
    rows: int, heads: int, channels: int, size: int, wanted: bool
) -> None:
    assert step_kernels("attend_triton").reads_latents(rows, heads, channels, size) == wanted


@pytest.mark.parametrize(("channels", "size", "wanted"), [(128, 2, 3), (256, 4, 2), (512, 4, 1)])
def test_tiles_fit_in_shared_memory(channels: int, size: int, wanted: int) -> None:
    assert step_kernels("attend_triton")._stages(channels, size) == wanted


@pytest.mark.parametrize("chunks", [1, 8, 9, 100, 1000])
def test_one_program_joins_what_few_have_read(chunks: int) -> None:
    kernels = step_kernels("attend_triton")
    blocks, cuts, each = kernels._programs(130, chunks)
    assert blocks == 3 and (cuts - 1) * each < chunks <= cuts * each
    assert blocks * cuts <= kernels.MOST_SPLITS + blocks and each >= kernels.LATENTS.chunks


@pytest.mark.parametrize("rows", [1, 3], ids="{} rows".format)
def test_layer_norm_of_a_wide_row(rows: int) -> None:
    """In several pieces, the last not full; padding is not part of the mean."""
    channels, width = 1030, 1040
    torch.manual_seed(0)
    x, scale, offset = (
        3 * torch.randn(rows, channels) + 1,
        torch.randn(channels),
        torch.ones(channels),
    )
    weight = torch.randn(40, channels)
    wanted = functional.layer_norm(x, (channels,), scale, offset, eps=0.5) @ weight.T

    def padded(part: Tensor) -> Tensor:
        return functional.pad(part, (0, width - channels)).to(DEVICE)

    norm = Norm(padded(scale), padded(offset), channels, 0.5)
    kernels = step_kernels("step_triton")
    _, read = kernels.normed_product(kernels.Residual(padded(x)), norm, padded(weight))
    assert (read.cpu() - wanted).abs().max() < 1e-3


@ROWS_KERNELS
@pytest.mark.parametrize("name", ["time", "output", "hidden", "down", "head"])
@pytest.mark.parametrize("rows", [2, 17, 50, 70], ids="{} rows".format)
def test_a_product_of_several_rows(name: str, rows: int) -> None:
    """Over several tiles of outputs and inputs, the last ones not full; rows have gaps. Many rows
    are a library's, and the last product's few."""
    kernels = step_kernels("rows_triton")
    in_library = rows > kernels.MOST_ROWS or (rows <= kernels.FEW_ROWS and name == "head")
    held = rows <= kernels.FEW_ROWS and name in kernels.HELD
    plan = (kernels.HELD if held else kernels.STAGED)[name]
    outputs, width = plan.outputs + 16, 2 * plan.width + 16
    kinds = {"hidden": kernels.CHANNEL_MIX, "head": kernels.GELU}
    kind, groups = kinds.get(name, kernels.PARTS), {"time": 3, "hidden": 2}.get(name, 1)
    dtype = torch.float32 if name == "head" else None
    torch.manual_seed(0)
    x = torch.randn(groups, rows, width + 16, device=DEVICE, dtype=PRECISE)[..., :width]
    weight = torch.randn(groups * outputs, width, device=DEVICE, dtype=PRECISE) / width**0.5
    if name == "hidden":
        weight = weight[: outputs + 24]  # gates are fewer than keys
    library = mock.Mock(wraps=kernels.rows_product_naive)
    with mock.patch.object(kernels, "rows_product_naive", library):
        y = kernels.rows_product(x if groups > 1 else x[0], weight, kind, name, outputs, dtype)
    assert library.called == in_library
    wanted = kernels.rows_product_naive(x.double(), weight.double(), kind, outputs)
    in_parts = kind == kernels.PARTS and not in_library
    assert y.dtype == (torch.float32 if in_parts else dtype or PRECISE)
    if kind == kernels.PARTS:
        assert (len(y) > 1) == in_parts
        y = y.sum(0, keepdim=True)
    assert (y - wanted).norm() < ROUNDED * wanted.norm()


@pytest.mark.parametrize("gated", [False, True])
def test_parts_of_a_product_are_joined(gated: bool) -> None:
    """Before the stream is normalised, and where it is not; padding stays 0."""
    channels, width, rows, kernels = 1030, 1040, 3, step_kernels("step_triton")
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        part = torch.randn(*shape, channels, device=DEVICE)
        return functional.pad(part, (0, width - channels))

    x, parts, gates = random(rows), random(4, rows), random(rows, 2)
    gate = gates[:, 1] if gated else None
    wanted = x + parts.sum(0) * (1 if gate is None else gate)
    stream, scale = kernels.Residual(x, parts, gate), random()
    assert (kernels.join(stream) - wanted).abs().max() < 5e-5
    joined, normed = kernels.norm_mix(stream, Norm(scale, scale, channels, 0.5))
    inside = functional.layer_norm(wanted[:, :channels], (channels,), eps=0.5)
    inside = scale[:channels] * (inside + 1)
    assert (joined - wanted).abs().max() < 5e-5
    assert (normed[:, :channels] - inside).abs().max() < 1e-4
    assert not normed[:, channels:].any() and not joined[:, channels:].any()


@pytest.mark.parametrize("length", [75, 12], ids="{} tokens".format)
@torch.no_grad()
def test_chunks_are_closed(length: int) -> None:
    """Whole chunks, and some with fewer tokens than sub-latents; equal scores; a row named twice;
    tokens of another document that are no numbers."""
    torch.manual_seed(0)
    shape = {"d_model": 66, "chunk_length": length, "latents": 5, "sub_latents": 2}
    model = laid_out(on_device(build(**shape)))
    rows, compressor = 6, model.compressor
    assert isinstance(compressor, RecordsCompressor)
    for norm in (compressor.norm_in, compressor.norm_ff, compressor.norm_out):
        for part in norm.parameters():
            part[: norm.channels.stored].normal_()
    hidden = model.width.pad(torch.randn(rows, length, model.width.stored, device=DEVICE))
    hidden[2, length // 2 :] = hidden[2, 0]
    place = Place(*(part.clone() for part in places(length, C)))
    place.start[:] = torch.tensor([0, length - 1, 0, length // 2, length - 3, 1])
    hidden[3, : length // 2] = float("nan")
    latents = torch.zeros(rows, C, *compressor.queries.shape, device=DEVICE)
    latents = model.width.pad(latents.normal_())
    parts = compressor.split(latents)
    named = torch.tensor([2, 1, 5, 3, 4, 3], device=DEVICE)
    keep = torch.arange(length, device=DEVICE) >= place.start[named].unsqueeze(-1)
    wanted, slots = latents.clone(), place.oldest[named]
    wanted[named, slots] = new = compressor(hidden[named], keep)
    sub_latents = parts.clone()
    sub_latents[named, slots] = compressor.split(new)

    closing = RecordsClosing(compressor, length)
    closing(hidden, named, place, latents, parts)
    for part, other in (latents, wanted), (parts, sub_latents):
        assert (part - other).abs().max() < 10 * NEAR
    latents.zero_()
    closing(hidden, named, place, latents, None)
    assert (latents[named, slots] - new).abs().max() < 10 * NEAR

    after = Place(*(part.clone() for part in place))
    after.close(named, C)
    step_kernels("close_triton").begin(named, place, C)
    assert all(part.equal(other) for part, other in zip(place, after, strict=True))


@pytest.mark.parametrize("length", [70, 128], ids="{} tokens".format)
def test_tokens_with_the_highest_scores(length: int) -> None:
    """Of equal ones the first; no more than there is room for if some are no numbers."""
    torch.manual_seed(0)
    scores, kernels = torch.randn(5, length, device=DEVICE), step_kernels("close_triton")
    scores[1] = scores[1].round()
    scores[2, 20:] = -1e4
    scores[3] = 0.0
    chosen, sizes = kernels.choose(scores, 30)
    wanted = highest(scores, 30)
    assert (chosen % length).equal(wanted)
    assert (chosen // length).equal(torch.arange(5, device=DEVICE)[:, None].expand(-1, 30))
    assert (sizes - 2 * scores.gather(1, wanted).sigmoid()).abs().max() < 1e-6
    scores[4, ::2] = float("nan")
    chosen, _ = kernels.choose(scores, 30)
    assert (chosen[4] // length == 4).all() and (chosen[4].diff() > 0).all()
    assert chosen[:4].equal(kernels.choose(scores[:4], 30)[0])


def is_float(x: Tensor) -> bool:
    """In place of `has_kernels`: the interpreter has kernels on the CPU."""
    return x.is_floating_point()


@contextmanager
def by_kernels() -> Iterator[None]:
    parts = (mock.patch.object(part, "has_kernels", is_float) for part in (steps, decoding))
    with next(parts), next(parts):
        yield


def on_device(model: I3LM) -> I3LM:
    """In fp32, with weights in rows of memory, as a GPU has them."""
    model = model.float().to(DEVICE)
    for parameter in model.parameters():
        parameter.data = parameter.contiguous()
    return model


DUAL = {"compressor": "records", "layers": "2xrwkv,2xdual-attention"}
CASES = [
    *((changes, False, rows) for rows in (1, 6) for changes in VARIANTS),
    *((DUAL | {"joined": joined}, True, 6) for joined in ("0", "1")),
]


def named(case: object) -> str:
    return "-".join(case.values()) if isinstance(case, dict) else str(case)


@pytest.mark.parametrize(("changes", "carry", "rows"), CASES, ids=named)
@torch.no_grad()
def test_a_decoder_by_kernels(changes: dict[str, str], carry: bool, rows: int) -> None:
    """Rows with every number of chunks before, some of which close theirs, apart. One row reads
    history as keys, several read it as sub-latents."""
    model = laid_out(build(**changes, state_carry=carry))
    tokens = torch.cat([random_stream(i, C + 3, mean) for i, mean in enumerate(MEANS[:rows])])
    wanted = logits(model, tokens).flatten(1, 2).to(DEVICE)
    model, streams = on_device(model), tokens.flatten(1).to(DEVICE)
    prompts = [(C + 3) * T - 3, 4 * T, T - 1, 3 * T - 1, 2 * T, 7][:rows]
    with by_kernels():
        assert gap(model, streams, prompts, wanted) < 10 * NEAR


@ROWS_KERNELS
@pytest.mark.parametrize("few", [32, 0], ids=["held", "staged"])
def test_products_of_a_decoder(few: int) -> None:
    """On a GPU in bf16; several parts of a product, and rows that begin a chunk."""
    model, kernels = on_device(laid_out(build(**DUAL))).to(PRECISE), step_kernels("rows_triton")
    tokens = random_stream(3, 2, 20).flatten().to(DEVICE)

    def read() -> Tensor:
        decoder = BatchDecoder(model, [tokens[: T - 1]] * 6)
        return torch.stack([decoder.feed(token.expand(6)) for token in tokens[:2]])

    unused, plans = mock.Mock(side_effect=AssertionError), kernels.HELD if few else kernels.STAGED
    narrow = {name: plan._replace(width=16) for name, plan in plans.items()}
    with (
        by_kernels(),
        mock.patch.object(kernels, "FEW_ROWS", few),
        mock.patch.dict(plans, narrow),
    ):
        with mock.patch.object(kernels, "rows_product_naive", unused):
            y = read()
        with mock.patch.object(kernels, "_fits", return_value=False):
            wanted = read()
    assert (y - wanted).norm() < 3 * ROUNDED * wanted.norm()


def test_memory_of_sub_latents() -> None:
    """Is constant, and in one place; history has no keys, and a full chunk makes no product of
    weights."""
    model, rows = on_device(laid_out(build(**DUAL))), 6
    tokens = random_stream(3, 2, 20).flatten().to(DEVICE)
    with by_kernels():
        decoder = BatchDecoder(model, [tokens[: T - 2]] * rows)
        decoder.feed(tokens[:1].expand(rows))
        before = [(part.shape, part.data_ptr()) for part in tensors(decoder)]
        unused = mock.Mock(side_effect=AssertionError)
        with (
            mock.patch.object(decoder.model.compressor, "through", unused),
            mock.patch.object(decoder.model.slots, "project", unused),
        ):
            for token in tokens[:4]:
                decoder.feed(token.expand(rows))
    assert [(part.shape, part.data_ptr()) for part in tensors(decoder)] == before
    for step in decoder.upper:
        assert isinstance(step, LatentStep)
        assert step.latents is not None and step.latents.shape[:2] == (rows, C)
        assert step.keys.shape[2] == step.values.shape[2] == T


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_sampling_of_tokens(temperature: float) -> None:
    """Over several pieces; forbidden tokens, rows that end, and rows that are not finite."""
    torch.manual_seed(0)
    rows, size, eos, bos = 8, 20_000, 3, 2
    logits = 3 * torch.randn(rows, size, device=DEVICE)
    logits[1, 700] = float("nan")
    logits[2, size - 1] = float("inf")
    logits[3, size - 1] = 50.0
    allowed = torch.zeros(size, device=DEVICE)
    allowed[[0, 1, 2, 4]] = float("-inf")
    logits[4, 4], logits[5, 0] = 100.0, 100.0
    seeds = torch.arange(rows, device=DEVICE) + 2**62
    before = torch.tensor([7, eos, 7, 7, 7, 7, eos, -1], device=DEVICE)
    kernel = step_kernels("token_triton").sample
    tokens, drawn = before.clone(), torch.full_like(seeds, 5)
    for step in range(5, 8):
        numbers = torch.full_like(seeds, step)
        wanted = choose_tokens(logits, allowed, Sampling(temperature), seeds, numbers)
        ended = (tokens == eos) & (wanted >= 0)
        wanted = torch.where(ended, bos, wanted)
        ids = eos, bos, NOT_FINITE
        kernel(logits, allowed, temperature, (seeds, drawn), tokens, *ids, SPLIT_MIX)
        assert tokens.equal(wanted)
        assert drawn.tolist() == [step + 1] * rows


@torch.no_grad()
def test_a_token_is_placed_and_kept() -> None:
    length, rows, bos = 12, 6, 2
    torch.manual_seed(0)
    model = build().float().to(DEVICE)
    kernels = step_kernels("token_triton")
    tokens = torch.tensor([bos, 5, bos, 6, bos, 7], device=DEVICE)
    tokens = torch.stack([tokens, tokens + 1], dim=1)[:, 0]  # a column of several steps' tokens
    for carry in (False, True):
        place = places(length, 3)._replace(depth=torch.tensor([0, 0, 1, 1, 1, 2], device=DEVICE))
        wanted = Place(*(part.clone() for part in place))
        model.settings = model.settings.model_copy(update={"state_carry": carry})
        x, restart, _ = enter(model, wanted, tokens)
        table, norm = model.embedding.weight, model.norm_in.padded()
        got, begins = kernels.enter(tokens, table, norm, place, bos, carry)
        assert (got - x).abs().max() < NEAR and begins.equal(restart)
        assert all(part.equal(other) for part, other in zip(place, wanted, strict=True))
        hidden: Tensor = torch.zeros(rows, length, x.shape[1], device=DEVICE)
        kernels.keep(got, hidden, place.position)
        assert place.position.equal(wanted.position + 1)
        assert hidden[torch.arange(rows), wanted.position].equal(got)
        assert hidden.count_nonzero() == got.count_nonzero()
