"""The sliced loss, eager and compiled, against its definition."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from i3dist.ops import cross_entropy
from i3dist.ops.cross_entropy import IGNORE, token_losses, token_losses_naive

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def as_if_compiled(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """What `token_losses` computes where it is compiled, without waiting for a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "is_compiling", lambda: True)
        patch.setattr(cross_entropy, "_compiled_softmax", lambda: cross_entropy._softmax_)
        return token_losses(hidden, head, targets)


def inputs(
    tokens: int, vocab: int, dtype: torch.dtype, scale: float = 1.0, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [2, T, 8], head [V, 8] and targets [2, T].

    In eighths, so that logits are exact in whatever order they are added up: rounding of one of
    2,000 would show in its gradient.
    """
    hidden = ((8 * scale * torch.randn(2, tokens, 8)).round() / 8).to(dtype).requires_grad_()
    head = ((8 * torch.randn(vocab, 8)).round() / 8).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (2, tokens))
    targets[torch.rand(2, tokens) < ignored] = IGNORE
    return hidden, head, targets


def differentiate(form: Form, given: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Losses, and gradients of hidden states and head."""
    losses = form(*given)
    return [losses, *torch.autograd.grad(losses, given[:2], weights.to(losses.dtype))]


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], close: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= close * (1 + b.abs().max())


any_inputs = given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 30),
    slice_elements=st.sampled_from([1, 50, 2**20]),
    scale=st.sampled_from([0.1, 1.0, 300.0]),
    upstream=st.sampled_from([1.0, 1e-5, -3.0, 700.0]),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "close"), DTYPES)
@any_inputs
@settings(max_examples=25, deadline=None)
def test_slices_equal_the_definition_in_values_and_gradients(
    compiled: bool,
    dtype: torch.dtype,
    close: float,
    tokens: int,
    vocab: int,
    slice_elements: int,
    scale: float,
    upstream: float,
    seed: int,
) -> None:
    """With any upstream gradients if eager, with any common one if compiled."""
    torch.manual_seed(seed)
    parts = inputs(tokens, vocab, dtype, scale)
    weights = torch.full((2, tokens), upstream) if compiled else torch.randn(2, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "SLICE_ELEMENTS", slice_elements)
        got = differentiate(as_if_compiled if compiled else token_losses, parts, weights)
    want = differentiate(token_losses_naive, parts, weights)
    size = max(1.0, abs(upstream)) if compiled else 1.0
    assert_close(got[:1], want[:1], close)
    assert_close(got[1:], want[1:], close * size)
    assert not got[0][parts[2] == IGNORE].any()


@pytest.mark.parametrize(("dtype", "close"), DTYPES)
def test_compile_holds_it_whole(
    dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PyTorch's compiler: values, gradients, and the same bits in every run."""
    torch.compiler.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "SLICE_ELEMENTS", 30 * 12)
    parts, weights = inputs(20, 30, dtype), torch.full((2, 20), 0.3)
    compiled = torch.compile(token_losses, fullgraph=True, dynamic=False)
    got, again = (differentiate(compiled, parts, weights) for _ in range(2))
    assert_close(got, differentiate(token_losses_naive, parts, weights), close)
    for a, b in zip(got, again, strict=True):
        assert a.equal(b)
    with torch.no_grad():
        assert_close([compiled(*parts)], got[:1], close)


@pytest.mark.parametrize("form", [token_losses, as_if_compiled])
def test_no_target_gives_zero_loss_and_gradient(form: Form) -> None:
    hidden, head = (torch.randn(n, 8, requires_grad=True) for n in (5, 7))
    losses = form(hidden, head, torch.full((5,), IGNORE))
    assert not losses.any()
    assert not any(g.any() for g in torch.autograd.grad(losses.sum(), [hidden, head]))


@pytest.mark.parametrize("form", [token_losses, as_if_compiled])
@pytest.mark.parametrize("upstream", [5.0, -5.0, math.inf, math.nan])
def test_the_upstream_gradient_of_an_ignored_token_does_not_matter(
    form: Form, upstream: float
) -> None:
    parts = inputs(20, 30, torch.float32)
    ones = torch.ones(2, 20)
    other = ones.masked_fill(parts[2] == IGNORE, upstream)
    got, want = (differentiate(form, parts, weights) for weights in (other, ones))
    for a, b in zip(got, want, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("change", [1e-6, -1.0, math.nan])
def test_several_upstream_gradients_are_nan_in_the_head_if_compiled(change: float) -> None:
    """The hidden states' gradient has each token's own, and is right."""
    parts = inputs(20, 30, torch.float32, ignored=0.0)
    weights = torch.ones(2, 20)
    weights[1, 3] += change
    _, hidden, head = differentiate(as_if_compiled, parts, weights)
    want = differentiate(token_losses_naive, parts, weights)[1]
    assert head.isnan().all()
    torch.testing.assert_close(hidden, want, equal_nan=True)


def test_an_upstream_gradient_that_is_not_finite_reaches_the_head_if_compiled() -> None:
    """So that the step is skipped."""
    parts = inputs(20, 30, torch.float32)
    for upstream in (math.inf, math.nan):
        _, hidden, head = differentiate(as_if_compiled, parts, torch.full((2, 20), upstream))
        assert not hidden.isfinite().all() and not head.isfinite().any()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_the_derivatives(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "SLICE_ELEMENTS", 7 * 3)
    hidden, head, targets = inputs(4, 7, torch.float64)

    def losses(hidden: Tensor, head: Tensor) -> Tensor:
        if compiled:
            return 0.3 * as_if_compiled(hidden, head, targets).sum()
        return token_losses(hidden, head, targets)

    assert torch.autograd.gradcheck(losses, (hidden, head))


class Allocations(TorchDispatchMode):
    """Records the operators that run and the largest tensor that one of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        found = func(*args, **kwargs or {})
        self.operators.append(func.overloadpacket)
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return found

    def products(self) -> int:
        """Matrix products so far."""
        return self.operators.count(torch.ops.aten.mm)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator that a compiler sees as one, as the operators inside it."""
    monkeypatch.setattr(cross_entropy, "_fused", partial(cross_entropy._in_slices, fused=True))


TOKENS, VOCAB, ROWS = 2 * 64, 50, 16  # of the slices
SLICES = TOKENS // ROWS


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize(
    ("form", "products"), [(token_losses, 4), (as_if_compiled, 3), (token_losses_naive, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_logits_of_all_tokens(
    form: Form, products: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither computed nor kept. Compiled, no product is computed twice."""
    monkeypatch.setattr(cross_entropy, "SLICE_ELEMENTS", VOCAB * ROWS)
    parts = inputs(TOKENS // 2, VOCAB, dtype)
    kept: list[Tensor] = []
    with (
        Allocations() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        differentiate(form, parts, torch.ones(2, TOKENS // 2))
    if form is token_losses_naive:  # the oracle of this test can fail
        assert seen.largest == TOKENS * VOCAB
        assert max(t.numel() for t in kept) == TOKENS * VOCAB
        return
    assert seen.products() == products * SLICES
    assert seen.largest == max(ROWS * VOCAB, TOKENS * 8)
    assert max(t.numel() for t in kept) == TOKENS * 8


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize("form", [token_losses, as_if_compiled])
@pytest.mark.parametrize("grad_enabled", [False, True])
def test_without_gradients_there_is_no_work_for_them(
    form: Form, grad_enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "SLICE_ELEMENTS", VOCAB * ROWS)
    parts = inputs(TOKENS // 2, VOCAB, torch.float32)
    given = [p.detach() for p in parts] if grad_enabled else parts
    with torch.set_grad_enabled(grad_enabled), Allocations() as seen:
        losses = form(*given)
    assert seen.products() == SLICES
    assert seen.largest < TOKENS * VOCAB
    assert_close([losses], [token_losses_naive(*parts)], 1e-5)


@needs_gpu
def test_of_the_cards_width_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to the definition in fp64, the same bits in every run, and little memory."""
    torch.compiler.reset()
    torch.manual_seed(0)
    rows, vocab, width, tokens = 1024, 32_000, 1184, 5 * 1024 + 100
    monkeypatch.setattr(cross_entropy, "SLICE_ELEMENTS_ON_GPU", rows * vocab)
    hidden = torch.randn(1, tokens, width, device="cuda").bfloat16().requires_grad_()
    head = (0.03 * torch.randn(vocab, width, device="cuda")).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (1, tokens), device="cuda")
    targets[torch.rand(1, tokens, device="cuda") < 0.1] = IGNORE
    parts, weights = (hidden, head, targets), torch.full((1, tokens), 1e-3, device="cuda")
    compiled = torch.compile(token_losses, fullgraph=True, dynamic=False)
    first = differentiate(compiled, parts, weights)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = differentiate(compiled, parts, weights)
    used = torch.cuda.max_memory_allocated() - before
    for a, b in zip(first, again, strict=True):
        assert a.equal(b)
    # A slice's logits, the head's gradient in fp32 and bf16, the hidden states' twice.
    assert used < 1.2 * (2 * rows * vocab + 6 * vocab * width + 4 * tokens * width)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    for a, b in zip(
        first, differentiate(token_losses_naive, (*exact, targets), weights), strict=True
    ):
        assert (a.double() - b).norm() < 5e-3 * b.norm()
