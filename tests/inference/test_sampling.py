"""Sampling: from what tokens are sampled, and with which random numbers."""

import math
from collections import Counter
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from i3dist.errors import UserError
from i3dist.inference.sampling import Sampling, distribution, sample, uniform

logit_lists = st.lists(st.floats(-20, 20), min_size=2, max_size=12)
numbers = st.floats(0, 1, exclude_max=True)
MASK = 2**64 - 1


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled(logits: list[float], sampling: Sampling, number: float) -> int:
    """Of one row; another, with other numbers, stands beside it."""
    rows = torch.tensor([logits, logits[::-1]])
    return int(sample(rows, sampling, torch.tensor([number, 0.5], dtype=torch.float64))[0])


@given(values=logit_lists, number=numbers)
def test_temperature_zero_takes_the_likeliest(values: list[float], number: float) -> None:
    logits = torch.tensor(values)
    assert logits[sampled(values, Sampling(temperature=0), number)] == logits.max()


@given(values=logit_lists, k=st.integers(1, 12), number=numbers)
def test_top_k_keeps_k(values: list[float], k: int, number: float) -> None:
    logits = torch.tensor(values)
    token = sampled(values, Sampling(temperature=1, top_k=k), number)
    assert (logits > logits[token]).sum() < k


@given(values=logit_lists, p=st.floats(0.01, 1), number=numbers)
def test_top_p_keeps_the_smallest_set_that_reaches_p(
    values: list[float], p: float, number: float
) -> None:
    logits = torch.tensor(values)
    token = sampled(values, Sampling(temperature=1, top_p=p), number)
    likelier = logits.softmax(-1)[logits > logits[token]].sum()
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
    weights = distribution(torch.stack([logits.roll(1), logits]), sampling)[1]
    shares = weights / weights.sum()
    want = wanted(logits.tolist(), sampling)
    uncut = wanted(logits.tolist(), replace(sampling, top_p=1.0))
    # Where they reach top_p within fp32's rounding, one more or less may be kept.
    sums = accumulate(uncut.values())
    assume(top_p == 1 or all(abs(reached - top_p) > 1e-5 for reached in sums))
    for token, share in enumerate(shares.tolist()):
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
    shares = distribution(logits[None], Sampling(temperature=1.0, top_k=top_k, top_p=1.0))[0]
    assert (shares > 0).all()
    assert shares[size // 2].item() == pytest.approx(
        logits.double().softmax(-1)[size // 2].item(), rel=1e-4
    )


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
    left = distribution(torch.tensor([shares]).log(), Sampling(temperature=1.0, top_p=top_p))
    assert (left[0] > 0).tolist() == [True] * kept + [False] * (len(shares) - kept)


def test_frequencies_are_those_of_the_distribution() -> None:
    sampling, draws = Sampling(temperature=2.0, top_p=0.8), 4000
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    numbers = torch.rand(draws, generator=rng(), dtype=torch.float64)
    counts = Counter(sample(logits.expand(draws, -1), sampling, numbers).tolist())
    want = wanted(logits.tolist(), sampling)
    assert set(counts) == set(want) == {1, 2, 3}
    for token, share in want.items():
        assert counts[token] / draws == pytest.approx(share, abs=0.03)


@given(values=logit_lists, number=numbers, least=st.booleans())
def test_the_forbidden_is_never_sampled(values: list[float], number: float, least: bool) -> None:
    values[::2] = [float("-inf")] * len(values[::2])
    number = 0.0 if least else number
    assert sampled(values, Sampling(temperature=1), number) % 2 == 1


def split_mix(state: int) -> tuple[int, int]:
    """SplitMix64 in Python's integers: the next state and number."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    return state, mixed(state)


def mixed(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def test_random_numbers_are_split_mixs() -> None:
    state, first = split_mix(1234567)
    assert (first, split_mix(state)[1]) == (6457827717110365317, 3203168211198807973)
    seeds = [0, 1, 2**63 - 1, 12345]
    states = [mixed(seed) for seed in seeds]
    for step in range(5):
        pairs = [split_mix(state) for state in states]
        states = [state for state, _ in pairs]
        got = uniform(torch.tensor(seeds), torch.tensor(step))
        assert got.tolist() == [(bits >> 11) / 2**53 for _, bits in pairs]


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
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} "):
        Sampling(**wrong)  # type: ignore[arg-type]
