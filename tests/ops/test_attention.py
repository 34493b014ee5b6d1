"""The fused kernel's rule against the matrix that spells it out."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from i3dist.model.segments import causal_mask, history_mask
from i3dist.ops.attention import (
    NEVER,
    ApartVisibility,
    Branch,
    KeysValues,
    Visibility,
    Window,
    apart_visibility,
    attend,
    attend_apart,
    attention_bias,
    block_visibility,
)

LANES, CHUNKS, LATENTS = 2, 3, 4


def inputs(seed: int, window: int, length: int) -> tuple[Tensor, Tensor]:
    """Segments [B, K, T] and depth [B, K] of random windows."""
    random = torch.Generator().manual_seed(seed)
    begins = torch.rand(LANES, window, length, generator=random) < 0.2
    return begins.cumsum(-1), torch.randint(0, CHUNKS + 2, (LANES, window), generator=random)


def both_forms(segments: Tensor, depth: Tensor, gate: float) -> tuple[Visibility, Visibility]:
    strength = torch.tensor(gate, device=segments.device)
    rows, depths = segments.flatten(0, 1), depth.flatten()
    history = history_mask(rows, depths, CHUNKS)
    return (
        attention_bias(causal_mask(rows), history, strength, LATENTS),
        block_visibility(Window(segments, depth, CHUNKS, LATENTS), strength),
    )


def random_leaves(window: int, length: int, channels: int, seed: int) -> list[Tensor]:
    """Query, keys and values of tokens, keys and values of history."""
    random = torch.Generator().manual_seed(seed)
    tokens, past = (LANES, window, length), (LANES, (CHUNKS + window) * LATENTS)
    sizes = (tokens, tokens, tokens, past, past)
    return [torch.randn(*size, channels, generator=random) for size in sizes]


def attend_heads(leaves: list[Tensor], visible: Visibility, heads: int, scale: float) -> Tensor:
    query, *others = leaves
    return attend(query, KeysValues(*others[2:]), KeysValues(*others[:2]), visible, heads, scale)


def joined(own: Branch, past: Branch) -> Tensor:
    """What one softmax over both would give."""
    share = (past.total - own.total).sigmoid().unsqueeze(-1).to(own.mixed.dtype)
    own_read, past_read = (x.mixed.unflatten(-1, (share.shape[-2], -1)) for x in (own, past))
    return (own_read + share * (past_read - own_read)).flatten(-2)


def attend_heads_apart(
    leaves: list[Tensor], visible: Visibility, heads: int, scale: float
) -> Tensor:
    query, *others = leaves
    past, own = KeysValues(*others[2:]), KeysValues(*others[:2])
    return joined(*attend_apart((query, query), past, own, visible, heads, scale))


def apart_rule(segments: Tensor, depth: Tensor, gate: float) -> ApartVisibility:
    strength = torch.tensor(gate, device=segments.device)
    return apart_visibility(Window(segments, depth, CHUNKS, LATENTS), strength)


@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
@given(seed=st.integers(0, 2**31), window=st.integers(1, 5), length=st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_rule_equals_matrix(gate: float, seed: int, window: int, length: int) -> None:
    leaves = [x.double() for x in random_leaves(window, length, 32, seed)]
    by_matrix, by_rule = (
        attend_heads(leaves, visible, heads=2, scale=0.3)
        for visible in both_forms(*inputs(seed, window, length), gate)
    )
    torch.testing.assert_close(by_rule, by_matrix, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
@given(seed=st.integers(0, 2**31), window=st.integers(1, 5), length=st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_two_softmaxes_joined_by_their_totals_are_one(
    gate: float, seed: int, window: int, length: int
) -> None:
    """In both forms; and gradients are finite, where a query sees no history too."""
    leaves = [x.double().requires_grad_() for x in random_leaves(window, length, 32, seed)]
    given_ = inputs(seed, window, length)
    by_matrix, _ = both_forms(*given_, gate)
    wanted = attend_heads(leaves, by_matrix, heads=2, scale=0.3)
    gradients = torch.autograd.grad(wanted.square().sum(), leaves)
    found = attend_heads_apart(leaves, by_matrix, heads=2, scale=0.3)
    fixed = [x.detach() for x in leaves]  # the fused form has a gradient on a GPU only
    by_rule = attend_heads_apart(fixed, apart_rule(*given_, gate), heads=2, scale=0.3)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(by_rule, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), leaves), gradients, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_nothing_seen_is_next_to_nothing() -> None:
    """Its total is so low that no share of it is left, and what is read of it is a number."""
    segments, depth = torch.ones(LANES, 2, 4, dtype=torch.int64), torch.full((LANES, 2), 3)
    leaves = random_leaves(2, 4, 8, seed=0)
    past, own = KeysValues(*leaves[3:]), KeysValues(*leaves[1:3])
    for visible in (both_forms(segments, depth, 1.0)[0], apart_rule(segments, depth, 1.0)):
        _, none = attend_apart((leaves[0], leaves[0]), past, own, visible, 2, 0.3)
        assert none.mixed.isfinite().all()
        assert (none.total <= 0.99 * NEVER).all()
        assert (none.total.sigmoid() == 0).all()


@given(
    seed=st.integers(0, 2**31),
    window=st.integers(1, 4),
    length=st.integers(1, 300) | st.just(256),
    latents=st.sampled_from([0, 1, 32, 100, 128]),
)
@settings(max_examples=40, deadline=None)
def test_tiles_are_those_in_which_the_rule_sees_something(
    seed: int, window: int, length: int, latents: int
) -> None:
    """Of whole tiles the kernel asks no rule, and others than those listed it passes over."""
    random = torch.Generator().manual_seed(seed)
    often = (1, 0.1, 0.01, 0)[seed % 4]  # documents of 1, 10, 100 tokens; one
    segments = (torch.rand(LANES, window, length, generator=random) < often).cumsum(-1)
    depth = torch.randint(0, CHUNKS + 2, (LANES, window), generator=random)
    seen = Window(segments, depth, CHUNKS, latents)
    joint = block_visibility(seen, torch.tensor(1.0))
    queries = window * length
    rules = [(joint, joint.history + queries)]
    if latents:
        apart = apart_visibility(seen, torch.tensor(1.0))
        rules += [(apart.own, queries), (apart.past, joint.history)]
    for visible, keys in rules:
        wanted = create_block_mask(visible.mask.mask_mod, LANES, None, queries, keys, device="cpu")
        assert visible.mask.shape == wanted.shape
        for found, expected in zip(listed_tiles(visible.mask), listed_tiles(wanted), strict=True):
            assert found == expected


def listed_tiles(mask: BlockMask) -> list[list[list[int]]]:
    """Which tiles of keys each tile of queries sees, and the other way round: partly, and whole."""
    parts = (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
        (mask.q_num_blocks, mask.q_indices),
        (mask.full_q_num_blocks, mask.full_q_indices),
    )
    return [
        [
            sorted(row[:count].tolist())
            for count, row in zip(n.flatten(), i.flatten(0, -2), strict=True)
        ]
        for n, i in parts
        if n is not None and i is not None
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("channels", [32, 128])
@pytest.mark.parametrize("apart", [False, True])
def test_fused_kernel_equals_matrix_in_values_and_gradients(
    gate: float, channels: int, apart: bool
) -> None:
    """And two runs of it agree bit for bit: a continued run depends on that."""
    segments, depth = (x.cuda() for x in inputs(0, 4, 512))
    leaves = [x.cuda().requires_grad_() for x in random_leaves(4, 512, 4 * channels, 1)]
    low = [x.detach().bfloat16().requires_grad_() for x in leaves]
    by_matrix, by_rule = both_forms(segments, depth, gate)
    if apart:
        by_rule = apart_rule(segments, depth, gate)
    attending = attend_heads_apart if apart else attend_heads
    fused = torch.compile(attending, dynamic=False)

    def run(form: Callable[..., Tensor], given: list[Tensor], visible: Visibility) -> list[Tensor]:
        out = form(given, visible, 4, 0.2)
        return [out, *torch.autograd.grad(out, given, torch.ones_like(out).cumsum(-1) / channels)]

    want, once, again = (
        run(attending, leaves, by_matrix),
        run(fused, low, by_rule),
        run(fused, low, by_rule),
    )
    for exact, first, second in zip(want, once, again, strict=True):
        assert first.equal(second)
        assert (first - exact).norm() <= 1e-2 * exact.norm()
