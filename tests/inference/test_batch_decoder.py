"""The batched decoder: in every row the logits of the training forward, in constant memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.layout import laid_out
from i3dist.inference.prompt import Prompt, read_prompt
from i3dist.inference.steps import STEPS, UpperStep
from i3dist.model.attention import AttentionBlock
from i3dist.model.block import Block
from i3dist.model.layer_kinds import LAYER_KINDS
from i3dist.model.lm import I3LM
from i3dist.ops.compiled import Compiled
from tests.model.conftest import SMALL, VARIANTS, build
from tests.model.kinds import Conv, Mlp
from tests.model.small import C, T, random_stream, seeds
from tests.model.streams import logits


class Own(AttentionBlock):
    """A kind that sees history and has no step of its own."""


OURS: dict[str, type[Block]] = {"mlp": Mlp, "conv": Conv, "own": Own}
# Each kind alone, kinds beside each other, and kinds without a step of their own.
STACKS = [
    *VARIANTS,
    {"compressor": "literal", "layers": "1xrwkv,1xdual-attention,1xattention"},
    {"compressor": "records", "layers": "1xconv,1xrwkv,1xmlp,1xown,1xattention"},
    {"compressor": "literal", "layers": "1xmlp,2xown"},
]
each_stack = pytest.mark.parametrize("changes", STACKS, ids=lambda x: "-".join(x.values()))


@contextmanager
def model_of(**changes: object) -> Iterator[I3LM]:
    LAYER_KINDS.update(OURS)
    try:
        yield build(**changes)
    finally:
        for name in OURS:
            del LAYER_KINDS[name]


@torch.no_grad()
def gap(
    model: I3LM, streams: Tensor, prompts: list[int], wanted: Tensor, compiled: bool = False
) -> float:
    """How far a batch is from `wanted` at most, when it begins with so many tokens of streams."""
    begun = [row[:count] for row, count in zip(streams, prompts, strict=True)]
    decoder = BatchDecoder(model, begun, compiled)
    rows = range(len(prompts))
    gaps = [(decoder.logits[i] - wanted[i, prompts[i] - 1]).abs().max() for i in rows]
    for step in range(streams.shape[1] - max(prompts)):
        read = decoder.feed(torch.stack([streams[i, prompts[i] + step] for i in rows]))
        gaps += [(read[i] - wanted[i, prompts[i] + step]).abs().max() for i in rows]
    return float(torch.stack(gaps).max())


@each_stack
@pytest.mark.parametrize("carry", [False, True])
@given(
    seed=seeds,
    prompts=st.one_of(
        st.lists(st.integers(1, 4 * T), min_size=1, max_size=4),
        st.sampled_from([[T] * 3, [2 * T, 1, 2 * T, 2 * T], [T - 1, T, T + 1], [7, 2, T] * 2]),
    ),
    mean_document=st.sampled_from([6, 30, 10_000]),
)
@settings(max_examples=5, deadline=None)
def test_each_row_equals_the_training_forward(
    changes: dict[str, str], carry: bool, seed: int, prompts: list[int], mean_document: float
) -> None:
    """Over more chunks than history holds; documents begin anywhere."""
    with model_of(state_carry=carry, **changes) as model:
        streams = [random_stream(seed + i, C + 3, mean_document) for i in range(len(prompts))]
        tokens = torch.cat(streams)
        wanted = logits(model, tokens).flatten(1, 2)
        assert gap(model, tokens.flatten(1), prompts, wanted) < 1e-5


@torch.no_grad()
def gap_in_pieces(model: I3LM, tokens: Tensor, sizes: list[int], wanted: Tensor) -> float:
    """The same of one row [L], read as a prompt of sizes[0] tokens and then in pieces: every other
    one at once, the rest token by token."""
    decoder, end = BatchDecoder(model, [tokens[: sizes[0]]]), sizes[0]
    gaps = [(decoder.logits[0] - wanted[end - 1]).abs().max()]
    for number, size in enumerate(sizes[1:]):
        new, end = tokens[end : end + size], end + size
        read = decoder.read(new) if number % 2 == 0 else [decoder.feed(x[None]) for x in new][-1]
        gaps.append((read[0] - wanted[end - 1]).abs().max())
    return float(torch.stack(gaps).max())


@each_stack
@pytest.mark.parametrize("carry", [False, True])
@given(
    seed=seeds,
    sizes=st.lists(
        st.one_of(st.integers(1, 4 * T), st.sampled_from([T, 2 * T])), min_size=3, max_size=6
    ),
    begun=st.integers(0, 2 * T),
)
@example(seed=0, sizes=[2, 3, 1, T], begun=T + 4)  # a piece in the chunk that it begins in
@settings(max_examples=5, deadline=None)
def test_pieces_of_a_document_are_read_as_the_whole(
    changes: dict[str, str], carry: bool, seed: int, sizes: list[int], begun: int
) -> None:
    """It begins anywhere in its chunk, behind others; pieces end anywhere."""
    with model_of(state_carry=carry, **changes) as model:
        others = random_stream(seed, 3, 6).flatten()[:begun]
        text = random_stream(seed + 1, 30, 1e9).flatten()
        length = begun + sum(sizes)
        tokens = torch.cat([others, text])[: -(-length // T) * T]
        wanted = logits(model, tokens.view(1, -1, T)).flatten(0, 2)
        first = [begun + sizes[0], *sizes[1:]]
        assert gap_in_pieces(model, tokens, first, wanted) < 1e-5


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda x: "-".join(x.values()))
def test_a_prompt_side_by_side_equals_one_in_order(changes: dict[str, str]) -> None:
    model = laid_out(build(**changes))
    tokens = random_stream(1, C + 3, 40).flatten()
    for length in (T - 1, T, T + 1, 2 * T, 3 * T + 5, (C + 1) * T, (C + 2) * T + 1):
        a, b = (read_prompt(model, tokens[:length], way) for way in (False, True))
        assert a.depth == b.depth and a.segments.equal(b.segments)
        for part, other in zip(flat(a), flat(b), strict=True):
            assert part.shape == other.shape and (part - other).abs().max() < 1e-9


def flat(prompt: Prompt) -> list[Tensor]:
    """Its floating-point tensors."""
    states, own = chain.from_iterable(prompt.states), chain.from_iterable(prompt.own)
    return [prompt.hidden, prompt.latents, prompt.logits, *states, *own]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda x: "-".join(x.values()))
def test_in_fp32_too(changes: dict[str, str]) -> None:
    model = build(**changes)
    tokens = torch.cat([random_stream(i, C + 3, mean) for i, mean in enumerate((15, 60, 1e9))])
    wanted = logits(model, tokens).flatten(1, 2)
    assert gap(model.float(), tokens.flatten(1), [1, T, 3 * T + 5], wanted) < 1e-4


def tensors(decoder: BatchDecoder) -> list[Tensor]:
    """All that it remembers of what it read."""
    found = [decoder.hidden, decoder.latents, *decoder.place]
    for step in (*decoder.lower, *decoder.upper):
        for value in vars(step).values():
            found += value if isinstance(value, tuple) else [value]
    return [part for part in found if isinstance(part, Tensor)]


@each_stack
def test_memory_is_constant(changes: dict[str, str]) -> None:
    """Where every kind has a step of its own, also its place: a recording needs that."""
    with model_of(**changes) as model:
        tokens = random_stream(3, C + 4, 20).flatten()
        decoder = BatchDecoder(model, [tokens[:1], tokens[: T + 3]])
        before = [(part.shape, part.data_ptr()) for part in tensors(decoder)]
        for token in tokens[T:]:
            decoder.feed(token.expand(2))
        after = [(part.shape, part.data_ptr()) for part in tensors(decoder)]
        assert [shape for shape, _ in after] == [shape for shape, _ in before]
        if not any(name in changes["layers"] for name in OURS):
            assert after == before


@pytest.mark.parametrize("carry", [False, True])
def test_of_a_long_prompt_only_what_can_be_seen_is_read(carry: bool) -> None:
    model, read = build(state_carry=carry), []
    tokens = random_stream(0, 20, 1e9).flatten()
    decoder_of = laid_out(model)
    decoder_of.embedding.register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    BatchDecoder(decoder_of, [tokens])
    assert sum(read) == (20 * T if carry else (C + 1) * T)


@each_stack
@torch.no_grad()
def test_the_model_is_not_changed(changes: dict[str, str]) -> None:
    with model_of(**changes) as model:
        before = {name: (part.clone(), part.data_ptr()) for name, part in model.named_parameters()}
        tokens = random_stream(0)
        wanted = logits(model, tokens)
        copied = laid_out(model)
        assert logits(copied, tokens).equal(wanted)
        BatchDecoder(model, [tokens.flatten()])
        for name, part in model.named_parameters():
            old, address = before[name]
            assert part.equal(old) and part.data_ptr() == address and part.requires_grad, name


def test_of_a_compiled_model_nothing_is_compiled() -> None:
    """Prompts have shapes of their own, which are not worth it."""
    model, tokens = build(), random_stream(0)
    wanted = logits(model, tokens)
    unused = mock.Mock(side_effect=AssertionError)
    with mock.patch.object(Compiled, "__call__", unused):
        model.compile_blocks()
        copied = laid_out(model)
        assert not copied.compiled and logits(copied, tokens).equal(wanted)
        with pytest.raises(AssertionError):
            logits(model, tokens)


def test_weights_are_padded_once() -> None:
    model = laid_out(build())
    assert model.width.computed > SMALL["d_model"], "or nothing is to be padded"
    for name, part in model.named_parameters():
        if name.endswith(("key.weight", "up.weight", "norm_time.bias")):
            assert part.shape[-1] == model.width.computed, name
            assert not part.requires_grad


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda x: "-".join(x.values()))
def test_closing_a_chunk_makes_no_product_of_weights(changes: dict[str, str]) -> None:
    tokens = random_stream(1, 3, 1e9).flatten()
    decoder = BatchDecoder(build(**changes), [tokens[:1]])
    unused = mock.Mock(side_effect=AssertionError)
    with (
        mock.patch.object(decoder.model.compressor, "through", unused),
        mock.patch.object(decoder.model.slots, "project", unused),
    ):
        for token in tokens:
            decoder.feed(token.unsqueeze(0))


@each_stack
def test_six_rows_on_a_cpu_read_keys(changes: dict[str, str]) -> None:
    """Only kernels of a GPU read sub-latents of more rows."""
    with model_of(**changes) as model:
        decoder = BatchDecoder(model, [random_stream(0, 1).flatten()] * 6)
        for block, step in zip(model.upper, decoder.upper, strict=True):
            assert type(step) is STEPS.get(type(block), UpperStep)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [3, 6], ids="{} rows".format)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda x: "-".join(x.values()))
def test_recorded_steps_equal_the_training_forward(
    changes: dict[str, str], compiled: bool, rows: int
) -> None:
    """More than four rows read history as sub-latents."""
    model, means = build(**changes), (15, 60, 1e9) * (rows // 3)
    tokens = torch.cat([random_stream(i, C + 3, mean) for i, mean in enumerate(means)])
    wanted = logits(model, tokens).flatten(1, 2).cuda()
    streams, model = tokens.flatten(1).cuda(), model.float().cuda()
    prompts = [1, T, 3 * T + 5, 7, 2 * T, 3 * T + 4][:rows]
    assert gap(model, streams, prompts, wanted, compiled) < 1e-3
