"""Generation: what may be drawn, when it stops, and that the seed decides."""

import math
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from i3dist.config import ModelSettings
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.inference.generate import Sampling, distribution, generate, sample
from i3dist.model.lm import I3LM
from tests.model.conftest import SMALL

logit_lists = st.lists(st.floats(-20, 20), min_size=2, max_size=12)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(values=logit_lists)
def test_temperature_zero_takes_the_likeliest(values: list[float]) -> None:
    logits = torch.tensor(values)
    assert logits[sample(logits, Sampling(temperature=0), rng())] == logits.max()


@given(values=logit_lists, k=st.integers(1, 12), seed=st.integers(0, 99))
def test_top_k_keeps_k(values: list[float], k: int, seed: int) -> None:
    logits = torch.tensor(values)
    drawn = sample(logits, Sampling(temperature=1, top_k=k), rng(seed))
    assert (logits > logits[drawn]).sum() < k


@given(values=logit_lists, p=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(
    values: list[float], p: float, seed: int
) -> None:
    logits = torch.tensor(values)
    drawn = sample(logits, Sampling(temperature=1, top_p=p), rng(seed))
    likelier = logits.softmax(-1)[logits > logits[drawn]].sum()
    assert likelier < p + 1e-5


def wanted(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Probability of each token that may be drawn, by Python's own floats; not `distribution`."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    top = logits[order[0]] / sampling.temperature
    weights = {i: math.exp(logits[i] / sampling.temperature - top) for i in order}
    whole, kept, reached = math.fsum(weights.values()), {}, 0.0
    for i in order:
        if sampling.top_p < 1 and reached >= sampling.top_p:
            break
        kept[i] = weights[i] / whole
        reached += kept[i]
    return {i: share / math.fsum(kept.values()) for i, share in kept.items()}


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([2, 7, 300]),
    spread=st.floats(0.01, 10),
    equal=st.booleans(),
    temperature=st.floats(0.1, 20),
    top_k=st.sampled_from([0, 1, 3, 40, 100_000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1)),
)
@settings(max_examples=100, deadline=None)
def test_tokens_are_drawn_from_the_distribution_of_the_words(
    seed: int, size: int, spread: float, equal: bool, temperature: float, top_k: int, top_p: float
) -> None:
    """As another implementation in fp64 has it, from one token to all, many of them equal."""
    logits = spread * torch.randn(size, generator=rng(seed))
    if equal:
        logits = logits.round()
    sampling = Sampling(temperature, top_k, top_p)
    ids, weights = distribution(logits, sampling)
    shares = weights / weights.sum()
    want = wanted(logits.tolist(), sampling)
    uncut = wanted(logits.tolist(), replace(sampling, top_p=1.0))
    assert ids.tolist() == list(uncut), "the likeliest first, of equal ones the lowest id"
    # Where they reach top_p within fp32's rounding, one more or less may be kept.
    sums = accumulate(uncut.values())
    assume(top_p == 1 or all(abs(reached - top_p) > 1e-5 for reached in sums))
    for token, share in zip(ids.tolist(), shares.tolist(), strict=True):
        assert share == pytest.approx(want.get(token, 0.0), rel=1e-3, abs=1e-6)


@given(
    size=st.sampled_from([300, 5_000, 32_000]),
    tail=st.floats(-85, 0),
    top_k=st.sampled_from([0, 10**6]),
)
@settings(max_examples=30, deadline=None)
def test_at_top_p_1_and_no_top_k_nothing_is_cut(size: int, tail: float, top_k: int) -> None:
    """However unlikely it is, and however many are likelier: rounding cuts no tail."""
    logits = 0.01 * torch.randn(size, generator=rng())
    logits[size // 2] = tail
    ids, shares = distribution(logits, Sampling(temperature=1.0, top_k=top_k, top_p=1.0))
    assert (shares > 0).all() and sorted(ids.tolist()) == list(range(size))
    share = shares[ids == size // 2].item()
    assert share == pytest.approx(logits.double().softmax(-1)[size // 2].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("shares", "top_p", "kept"),
    [
        ([0.5, 0.25, 0.25], 0.5, 1),
        ([0.5, 0.25, 0.25], 0.51, 2),
        ([0.25, 0.25, 0.25, 0.25], 0.75, 3),
        ([0.9, 0.1], 1e-9, 1),
        ([0.5, 0.25, 0.25], 0.999999, 3),
    ],
)
def test_top_p_keeps_no_token_more_than_it_needs(
    shares: list[float], top_p: float, kept: int
) -> None:
    _, left = distribution(torch.tensor(shares).log(), Sampling(temperature=1.0, top_p=top_p))
    assert (left > 0).tolist() == [True] * kept + [False] * (len(shares) - kept)


def test_frequencies_are_those_of_the_distribution() -> None:
    logits, sampling = torch.tensor([0.0, 1.0, 2.0, 3.0]), Sampling(temperature=2.0, top_p=0.8)
    generator, draws = rng(), 4000
    counts = Counter(sample(logits, sampling, generator) for _ in range(draws))
    want = wanted(logits.tolist(), sampling)
    assert set(counts) == set(want) == {1, 2, 3}
    for token, share in want.items():
        assert counts[token] / draws == pytest.approx(share, abs=0.03)


@given(values=logit_lists, seed=st.integers(0, 99))
def test_the_forbidden_is_never_drawn(values: list[float], seed: int) -> None:
    logits = torch.tensor(values)
    logits[::2] = float("-inf")
    assert sample(logits, Sampling(temperature=1), rng(seed)) % 2 == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": 1e-40},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 2},
    ],
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--"):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def parts(data: Path) -> tuple[I3LM, Tokenizer]:
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    torch.manual_seed(0)
    settings = ModelSettings.model_validate(SMALL | {"vocab_size": tokenizer.vocab_size})
    return I3LM(settings, tokenizer.bos_id).eval(), tokenizer


def text(parts: tuple[I3LM, Tokenizer], seed: int = 0, tokens: int = 40, **more: object) -> str:
    model, tokenizer = parts
    sampling = Sampling(temperature=1.0)
    return "".join(generate(model, tokenizer, "def ", tokens, sampling, seed, **more))  # type: ignore[arg-type]


def test_the_seed_decides(parts: tuple[I3LM, Tokenizer]) -> None:
    assert text(parts) == text(parts)
    assert text(parts, seed=1) != text(parts)


def test_it_stops_at_the_end_of_the_document_unless_told(parts: tuple[I3LM, Tokenizer]) -> None:
    model, tokenizer = parts
    likely = model.head.weight.clone()
    # A final norm of constant output makes <EOS> certain.
    with torch.no_grad():
        model.norm_out.weight.zero_()
        model.norm_out.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[tokenizer.eos_id] = 10.0
    try:
        assert text(parts) == ""
        assert text(parts, ignore_eos=True, tokens=3) == "\n\n" * 3
    finally:
        with torch.no_grad():
            model.norm_out.weight.fill_(1.0)
            model.norm_out.bias.zero_()
            model.head.weight.copy_(likely)


def test_logits_that_are_not_finite_are_one_line(parts: tuple[I3LM, Tokenizer]) -> None:
    model, _ = parts
    kept = model.norm_out.bias.clone()
    try:
        with torch.no_grad():
            model.norm_out.bias[0] = float("nan")
        with pytest.raises(UserError, match="not finite"):
            text(parts)
    finally:
        with torch.no_grad():
            model.norm_out.bias.copy_(kept)


def test_an_empty_prompt_begins_a_document(parts: tuple[I3LM, Tokenizer]) -> None:
    model, tokenizer = parts
    pieces = list(generate(model, tokenizer, "", 30, Sampling(), 0))
    assert all(isinstance(piece, str) for piece in pieces)
