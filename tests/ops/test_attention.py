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
    BlockVisibility,
    KeysValues,
    Visibility,
    Window,
    attend,
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
    visible = block_visibility(Window(segments, depth, CHUNKS, latents), torch.tensor(1.0))
    assert isinstance(visible, BlockVisibility)
    queries, keys = window * length, visible.history + window * length
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
def test_fused_kernel_equals_matrix_in_values_and_gradients(gate: float, channels: int) -> None:
    """And two runs of it agree bit for bit: a continued run depends on that."""
    segments, depth = (x.cuda() for x in inputs(0, 4, 512))
    leaves = [x.cuda().requires_grad_() for x in random_leaves(4, 512, 4 * channels, 1)]
    low = [x.detach().bfloat16().requires_grad_() for x in leaves]
    by_matrix, by_rule = both_forms(segments, depth, gate)
    fused = torch.compile(attend_heads, dynamic=False)

    def run(form: Callable[..., Tensor], given: list[Tensor], visible: Visibility) -> list[Tensor]:
        out = form(given, visible, 4, 0.2)
        return [out, *torch.autograd.grad(out, given, torch.ones_like(out).cumsum(-1) / channels)]

    want, once, again = (
        run(attend_heads, leaves, by_matrix),
        run(fused, low, by_rule),
        run(fused, low, by_rule),
    )
    for exact, first, second in zip(want, once, again, strict=True):
        assert first.equal(second)
        assert (first - exact).norm() <= 1e-2 * exact.norm()
