"""Generation: what may be sampled, when it stops, that rows do not touch, and that seeds decide."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from i3dist.config import ModelSettings
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.inference import generate as module
from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.decoder import Decoder
from i3dist.inference.generate import generate, stream
from i3dist.inference.sampling import Sampling, sample, uniform
from i3dist.inference.token_stream import TokenStream
from i3dist.model.lm import I3LM
from tests.model.conftest import SMALL

PROMPTS = ["", 'class Header(str):\n    """A string."""\n' * 3, "import <EOS>"]
TOKENS = 40  # of each row: more than three chunks


@pytest.fixture(scope="module")
def parts(data: Path) -> tuple[I3LM, Tokenizer]:
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    torch.manual_seed(0)
    settings = ModelSettings.model_validate(SMALL | {"vocab_size": tokenizer.vocab_size})
    model = I3LM(settings, tokenizer.bos_id).eval().requires_grad_(False)
    model.head.weight *= 8  # far from even, and <EOS> is likely now and then
    model.head.weight[tokenizer.eos_id] *= 2
    return model, tokenizer


def text(parts: tuple[I3LM, Tokenizer], seed: int = 0, tokens: int = 25, **more: bool) -> str:
    model, tokenizer = parts
    return "".join(generate(model, tokenizer, "def ", tokens, Sampling(1.0), seed, **more))


def texts(
    parts: tuple[I3LM, Tokenizer], prompts: list[str], sampling: Sampling, seed: int, **more: bool
) -> list[str]:
    """Each row's text."""
    whole = [""] * len(prompts)
    for row, piece in stream(*parts, prompts, TOKENS, sampling, seed, **more):
        assert piece, "nothing is yielded for nothing"
        whole[row] += piece
    return whole


@torch.no_grad()
def naive_text(
    parts: tuple[I3LM, Tokenizer], prompt: str, sampling: Sampling, seed: int, ignore_eos: bool
) -> str:
    """One row alone, by the simple decoder."""
    model, tokenizer = parts
    decoder, text = Decoder(model), [[]]
    special = [i for i in tokenizer.special_ids.values() if i != tokenizer.eos_id]
    fed, steps = [tokenizer.bos_id, *tokenizer.encode(prompt)], 0
    for _ in range(TOKENS):
        logits = decoder.feed(torch.tensor(fed))
        logits[special] = float("-inf")
        number = uniform(torch.tensor([seed]), torch.tensor(steps))
        fed, steps = sample(logits[None], sampling, number).tolist(), steps + 1
        if fed == [tokenizer.eos_id]:
            if not ignore_eos:
                break
            fed, steps = [*fed, tokenizer.bos_id], steps + 1
            text.append([])
        else:
            text[-1] += fed
    return "\n\n".join(tokenizer.decode(part) for part in text)


@pytest.mark.parametrize(
    ("sampling", "ignore_eos"),
    [(Sampling(), True), (Sampling(0), True), (Sampling(1.5, top_k=20, top_p=0.9), False)],
)
def test_each_rows_text_is_that_of_its_prompt_alone(
    parts: tuple[I3LM, Tokenizer], sampling: Sampling, ignore_eos: bool
) -> None:
    together = texts(parts, PROMPTS, sampling, 5, ignore_eos=ignore_eos)
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == naive_text(parts, prompt, sampling, 5 + row, ignore_eos)
    (alone,) = texts(parts, PROMPTS[1:2], sampling, 6, ignore_eos=ignore_eos)
    assert alone == together[1]


def test_equal_prompts_get_different_texts(parts: tuple[I3LM, Tokenizer]) -> None:
    assert len(set(texts(parts, ["def "] * 3, Sampling(1.0), 0, ignore_eos=True))) == 3


def test_the_seed_decides(parts: tuple[I3LM, Tokenizer]) -> None:
    assert text(parts) == text(parts)
    assert text(parts, seed=1) != text(parts)
    text(parts, seed=2**63 - 1)


@contextmanager
def changed(model: I3LM) -> Iterator[I3LM]:
    """A model that may be changed, and is as before afterwards."""
    before = {name: part.clone() for name, part in model.state_dict().items()}
    try:
        yield model
    finally:
        model.load_state_dict(before)


def test_it_stops_at_the_end_of_the_document_unless_told(parts: tuple[I3LM, Tokenizer]) -> None:
    model, tokenizer = parts
    with changed(model):
        # A final norm of constant output makes <EOS> certain.
        model.norm_out.weight.zero_()
        model.norm_out.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[tokenizer.eos_id] = 10.0
        assert text(parts) == ""
        assert text(parts, ignore_eos=True, tokens=3) == "\n\n" * 3


def test_no_special_token_but_the_end_is_sampled(parts: tuple[I3LM, Tokenizer]) -> None:
    model, tokenizer = parts
    specials = [i for i in tokenizer.special_ids.values() if i != tokenizer.eos_id]
    with changed(model):
        model.norm_out.weight.zero_()
        model.norm_out.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[specials] = 10.0
        model.head.weight[tokenizer.encode("x")] = 9.0
        assert text(parts, tokens=9) == "x" * 9


def test_logits_that_are_not_finite_are_one_line(parts: tuple[I3LM, Tokenizer]) -> None:
    with changed(parts[0]) as model:
        model.norm_out.bias[0] = float("nan")
        with pytest.raises(UserError, match="not finite"):
            text(parts)


def test_one_bad_row_is_found(parts: tuple[I3LM, Tokenizer]) -> None:
    model, tokenizer = parts
    with changed(model):
        model.embedding.weight[tokenizer.encode("?")] = float("inf")
        with pytest.raises(UserError, match="not finite"):
            texts(parts, ["a", "?"], Sampling(), 0)


@pytest.mark.parametrize("ahead", [0, 4])
def test_the_first_token_waits_for_no_step(parts: tuple[I3LM, Tokenizer], ahead: int) -> None:
    """A GPU, whose `ahead` is not 0, runs further ahead with each token; tokens are the same."""
    decoder = BatchDecoder(parts[0], [torch.tensor([2, 5])])
    stream = TokenStream(decoder, Sampling(0), 0, eos_id=3)
    stream.ahead = ahead
    tokens, steps = [], []
    with mock.patch.object(stream, "advance", wraps=stream.advance) as advance:
        for _ in range(8):
            tokens += stream.next()
            steps.append(advance.call_count)
    assert steps == [number + min(number, ahead) for number in range(8)]
    alone = TokenStream(BatchDecoder(parts[0], [torch.tensor([2, 5])]), Sampling(0), 0, eos_id=3)
    assert tokens == [alone.next()[0] for _ in range(8)]


def test_no_prompt_is_no_text(parts: tuple[I3LM, Tokenizer]) -> None:
    assert texts(parts, [], Sampling(), 0) == []


@pytest.mark.parametrize("taken", [TOKENS, 1], ids=["all", "given up"])
def test_memory_is_free_at_the_end_without_the_collector(
    parts: tuple[I3LM, Tokenizer], monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """A decoder has a copy of the weights."""
    alive: weakref.WeakSet[BatchDecoder] = weakref.WeakSet()

    class Watched(BatchDecoder):
        def __init__(self, model: I3LM, prompts: list[torch.Tensor], compiled: bool):
            super().__init__(model, prompts, compiled)
            alive.add(self)

    monkeypatch.setattr(module, "BatchDecoder", Watched)
    gc.disable()
    try:
        text = generate(*parts, PROMPTS[1], TOKENS, Sampling(1.0), 0, ignore_eos=True)
        for _, _ in zip(range(taken), text, strict=False):
            assert len(alive) == 1
        del text
        assert not alive
    finally:
        gc.enable()
