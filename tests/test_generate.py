"""Generation: what may be drawn, when it stops, and that the seed decides."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i3dist.config import ModelSettings
from i3dist.errors import UserError
from i3dist.generate import Sampling, draw, generate
from i3dist.model.lm import I3LM
from i3dist.tokenizer import Tokenizer
from tests.model.conftest import SMALL

logit_lists = st.lists(st.floats(-20, 20), min_size=2, max_size=12)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(values=logit_lists)
def test_temperature_zero_takes_the_likeliest(values: list[float]) -> None:
    logits = torch.tensor(values)
    assert logits[draw(logits, Sampling(temperature=0), rng())] == logits.max()


@given(values=logit_lists, k=st.integers(1, 12), seed=st.integers(0, 99))
def test_top_k_keeps_k(values: list[float], k: int, seed: int) -> None:
    logits = torch.tensor(values)
    drawn = draw(logits, Sampling(temperature=1, top_k=k), rng(seed))
    assert (logits > logits[drawn]).sum() < k


@given(values=logit_lists, p=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(
    values: list[float], p: float, seed: int
) -> None:
    logits = torch.tensor(values)
    drawn = draw(logits, Sampling(temperature=1, top_p=p), rng(seed))
    likelier = logits.softmax(-1)[logits > logits[drawn]].sum()
    assert likelier < p + 1e-5


@given(values=logit_lists, seed=st.integers(0, 99))
def test_the_forbidden_is_never_drawn(values: list[float], seed: int) -> None:
    logits = torch.tensor(values)
    logits[::2] = float("-inf")
    assert draw(logits, Sampling(temperature=1), rng(seed)) % 2 == 1


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


def test_an_empty_prompt_begins_a_document(parts: tuple[I3LM, Tokenizer]) -> None:
    model, tokenizer = parts
    pieces = list(generate(model, tokenizer, "", 30, Sampling(), 0))
    assert all(isinstance(piece, str) for piece in pieces)
