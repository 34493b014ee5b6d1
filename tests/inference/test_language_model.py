"""`i3dist.load`: logits, scores and text equal those of the training forward, at any length."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import i3dist
from i3dist.config import Settings
from i3dist.data.shards import document_depth as loaders_depth
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.inference import forward
from i3dist.inference.generate import Sampling, generate
from i3dist.inference.language_model import LanguageModel
from i3dist.model.lm import I3LM
from tests.conftest import ROOT
from tests.known import TOKENIZER
from tests.model.conftest import build, each_variant
from tests.model.small import T, random_stream, seeds
from tests.model.streams import logits

V = 271


def language_model(**changes: object) -> LanguageModel:
    """The small model in fp64, with a tokenizer."""
    model = build(vocab_size=V, **changes).requires_grad_(False).eval()
    tokenizer = Tokenizer(TOKENIZER, Path("tokenizer.json"))
    return LanguageModel(model, Settings().with_values(**{"model.vocab_size": V}), tokenizer)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model()


@contextmanager
def computed(window: int, tokens: int) -> Iterator[None]:
    """Read with other sizes of what is computed at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "WINDOW", window)
        patch.setattr(forward, "TOKENS", tokens)
        yield


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-5, atol=1e-5)


@each_variant
@pytest.mark.parametrize("carry", [False, True])
@given(seed=seeds, length=st.integers(0, 5 * T), window=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_logits_are_those_of_the_training_forward_at_any_length(
    changes: dict[str, str], carry: bool, seed: int, length: int, window: int
) -> None:
    lm = language_model(state_carry=carry, **changes)
    streams = torch.cat([random_stream(seed + row) for row in range(3)])
    wanted = logits(lm.model, streams).flatten(1, 2)
    with computed(window, tokens=2 * T):  # so that not all rows are computed at once
        got = lm(streams.flatten(1)[:, :length])
    assert got.dtype == torch.float32
    close(got, wanted[:, :length])


@given(seed=seeds, length=st.integers(1, 6 * T), document=st.sampled_from([5, 30, 1000]))
@settings(max_examples=30, deadline=None)
def test_depth_is_the_loaders(seed: int, length: int, document: float) -> None:
    chunks = random_stream(seed, mean_document=document)[0]
    wanted = loaders_depth(chunks.numpy().astype(np.uint16), 2)
    got = forward.document_depth(chunks.flatten()[None, :length], 2, T)
    assert got[0].tolist() == wanted[: -(-length // T)].tolist()


def test_ids_may_be_lists_arrays_or_tensors_of_any_shape(lm: LanguageModel) -> None:
    stream = random_stream(0).flatten()[:20]
    one = lm(stream)
    assert one.shape == (20, V)
    for ids in (stream.tolist(), stream.numpy().astype(np.uint16), stream.int()):
        assert lm(ids).equal(one)
    many = lm(stream.view(2, 1, 10))
    assert many.shape == (2, 1, 10, V)
    close(many[0, 0], one[:10])


def test_padding_at_the_end_changes_nothing(lm: LanguageModel) -> None:
    stream = random_stream(1).flatten()[: 2 * T + 3]
    padded = torch.cat([stream, torch.full((T,), lm.tokenizer.pad_id)])
    close(lm(padded)[: len(stream)], lm(stream))


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ("text", "`encode` makes them of a text"),
        ([[1], [1, 2]], "in rows of one length; `encode` makes them"),
        ([0.5], "these are torch.float32"),
        (3, r"these are torch.int64 \[\]"),
        ([V], f"from 0 to {V - 1}.* these are from {V} to {V}"),
        ([-1, 3], "these are from -1 to 3"),
    ],
)
def test_what_are_no_ids_is_one_line(lm: LanguageModel, ids: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        lm(ids)  # type: ignore[arg-type]


def test_no_ids_are_ids(lm: LanguageModel) -> None:
    assert lm.decode([]) == "" and lm([]).shape == (0, V)


TEXTS = st.lists(st.text("ab \nü<BOS>", max_size=3 * T), max_size=5)


@given(texts=TEXTS)
@settings(max_examples=20, deadline=None)
def test_scores_are_log_softmax_of_the_logits(lm: LanguageModel, texts: list[str]) -> None:
    with computed(window=2, tokens=2 * T):
        scores = lm.score(texts)
    assert len(scores) == len(texts)
    for text, score in zip(texts, scores, strict=True):
        ids = lm.encode(text)
        assert ids[0] == lm.tokenizer.bos_id and ids[1:].tolist() == lm.tokenizer.encode(text)
        wanted = lm(ids)[:-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        close(score, wanted)
        close(lm.score(text), wanted)


def test_text_is_that_of_generate_alone_and_side_by_side(lm: LanguageModel) -> None:
    model = lm.model.float()
    prompts = ["ab", "", "ab ab ab ab ab"]
    text = "".join(generate(model, lm.tokenizer, "ab", 30, Sampling(0.7, 20, 0.9), 3, True))
    options = {"tokens": 30, "seed": 3, "ignore_eos": True}
    sampling = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    assert lm.generate("ab", **options, **sampling) == text
    assert lm.generate(prompts, **options, **sampling)[0] == text
    greedy = options | {"temperature": 0}
    wanted = [lm.generate(prompt, **greedy) for prompt in prompts]
    assert lm.generate(prompts, **greedy) == wanted
    pieces = list(lm.stream(prompts, **greedy))
    assert len(pieces) > len(prompts)
    for row, text in enumerate(wanted):
        assert "".join(piece for number, piece in pieces if number == row) == text


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"tokens": 2.5},
        {"seed": -1},
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"seed": 1.5},
        {"seed": None},
        {"temperature": "0.5"},
        {"top_k": 1.5},
        {"top_p": None},
    ],
)
def test_options_out_of_range_are_refused_at_once(lm: LanguageModel, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be"):
        lm.stream("ab", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("texts", [None, b"ab", 3, ["ab", 3], [["ab"]]])
def test_what_is_no_text_is_one_line(lm: LanguageModel, texts: Any) -> None:
    for call in (lm.score, lm.generate, lm.stream, lm.encode, lambda text: lm.chat().say(text)):
        with pytest.raises(UserError, match=r"text"):
            call(texts)


def test_texts_may_come_one_by_one(lm: LanguageModel) -> None:
    texts = ["ab", "", "ab ab"]
    assert lm.generate(iter(texts), tokens=3) == lm.generate(texts, tokens=3)  # type: ignore[call-overload]
    assert len(lm.score(iter(texts))) == 3  # type: ignore[call-overload]


def test_a_run_is_loaded_in_the_type_that_is_asked_for(whole: Path) -> None:
    model = i3dist.load(whole)
    assert isinstance(model.model, I3LM) and not model.model.training
    kinds = {name: i3dist.load(str(whole), dtype=name) for name in ("float32", "bfloat16")}
    kinds["torch"] = i3dist.load(whole / "checkpoints", "cpu", torch.bfloat16)
    ids = model.encode("def main(argv=None):\n" * 60)
    wanted = kinds["float32"](ids)
    for name, other in kinds.items():
        assert other.model.head.weight.dtype == (
            torch.float32 if name == "float32" else torch.bfloat16
        )
        assert (other(ids) - wanted).abs().mean() < 0.02
        assert other(ids).dtype == torch.float32
    assert model.decode(ids) == "def main(argv=None):\n" * 60
    assert "parameters" in repr(model)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"path": "nowhere"}, "^nowhere is not there: name a run's folder"),
        ({"path": ""}, "the path is empty"),
        ({"device": "tpu"}, "device 'tpu' should be auto, cpu, cuda"),
        ({"dtype": torch.float16}, "dtype=float16 should be auto, float32 or bfloat16"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    whole: Path, words: dict[str, object], says: str
) -> None:
    with pytest.raises(i3dist.UserError, match=says):
        i3dist.load(**{"path": whole, **words})  # type: ignore[arg-type]


def test_importing_i3dist_loads_nothing() -> None:
    script = """
import sys, i3dist
before = {name.partition(".")[0] for name in sys.modules}
assert i3dist.__version__ and "load" in dir(i3dist), dir(i3dist)
assert not hasattr(i3dist, "nothing")
assert not before & {"torch", "numpy", "pydantic", "yaml"}, before
i3dist.UserError
assert "torch" not in sys.modules
i3dist.load
assert "torch" in sys.modules and "deepspeed" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
