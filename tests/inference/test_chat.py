"""Chat: turn by turn the same ids as from the whole conversation at once, and all is read once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.config import Settings
from i3dist.data.chat import ROLES
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from i3dist.errors import UserError
from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.chat import Chat
from i3dist.inference.decoder import Decoder
from i3dist.inference.language_model import LanguageModel
from i3dist.inference.sampling import Sampling, sample, uniform
from tests.known import TOKENIZER
from tests.model.conftest import build
from tests.model.small import T

TOKENS = 7  # of an answer at most: two turns are longer than a chunk
STACKS = [
    {"layers": "2xrwkv,2xdual-attention"},
    {"layers": "2xrwkv,2xattention", "compressor": "literal", "state_carry": True},
]


def language_model(**changes: object) -> LanguageModel:
    """The small model in fp64; it ends an answer now and then."""
    tokenizer = Tokenizer(TOKENIZER, Path("tokenizer.json"))
    size = tokenizer.vocab_size
    model = build(vocab_size=size, **changes).requires_grad_(False).eval()
    model.head.weight[tokenizer.special_ids["<|im_end|>"]] *= 3
    return LanguageModel(model, Settings().with_values(**{"model.vocab_size": size}), tokenizer)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model()


def begun(lm: LanguageModel, sampling: Sampling, seed: int = 0) -> Chat:
    return Chat(lm.model, lm.tokenizer, [], TOKENS, sampling, seed)


def message(lm: LanguageModel, role: str, text: str) -> list[int]:
    """A message by the template, written out."""
    ids = lm.tokenizer.special_ids
    return [
        ids["<|im_start|>"],
        ids[f"<|{role}|>"],
        *lm.tokenizer.encode(text),
        ids["<|im_end|>"],
    ]


def naive_answer(lm: LanguageModel, before: list[int], sampling: Sampling, seed: int) -> list[int]:
    """The ids of an answer, each from the whole conversation [L] before it, by the oracle."""
    special = lm.tokenizer.special_ids
    end, ids = special["<|im_end|>"], [*before, special["<|im_start|>"], special["<|assistant|>"]]
    first = len(ids)
    while len(ids) < first + TOKENS and ids[-1] != end:
        logits = Decoder(lm.model).feed(torch.tensor(ids))
        logits[[i for i in special.values() if i != end]] = float("-inf")
        number = uniform(torch.tensor([seed]), torch.tensor(len(ids)))
        ids += sample(logits[None], sampling, number).tolist()
    return ids[len(before) :] + [end] * (ids[-1] != end)


@contextmanager
def tokens_read() -> Iterator[list[int]]:
    """How many tokens each call of any embedding reads."""
    read: list[int] = []

    def count(module: torch.nn.Module, given: tuple[torch.Tensor], _: object) -> None:
        if isinstance(module, torch.nn.Embedding):
            read.append(given[0].numel())

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield read
    finally:
        handle.remove()


texts = st.lists(
    st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text("abü ", min_size=1, max_size=3 * T)).filter(
        str.strip
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("changes", STACKS, ids=lambda x: x["layers"])
@given(texts=texts, seed=st.integers(0, 2**62), temperature=st.sampled_from([0.0, 1.0]))
@settings(max_examples=4, deadline=None)
def test_turn_by_turn_is_the_whole_conversation_at_once(
    changes: dict[str, object], texts: list[str], seed: int, temperature: float
) -> None:
    """The same ids, special ones from the template alone; and every token is read once."""
    lm, sampling = language_model(**changes), Sampling(temperature)
    chat, wanted = begun(lm, sampling, seed), [lm.tokenizer.bos_id]
    with tokens_read() as read:
        for text in texts:
            pieces = list(chat.say(text))
            assert all(pieces)
            assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    for text in texts:
        wanted += message(lm, "user", text)
        wanted += naive_answer(lm, wanted, sampling, seed)
    assert chat.ids == wanted
    # What ends the last answer is read by the next turn.
    assert sum(read) in (len(wanted) - 1, len(wanted) - 2)


def test_a_conversation_goes_on_from_its_messages(lm: LanguageModel) -> None:
    said = [{"role": role, "content": f"{role} ab"} for role in ROLES]
    chat = lm.chat(said, tokens=TOKENS, seed=3)
    first = [lm.tokenizer.bos_id]
    for turn in said:
        first += message(lm, turn["role"], turn["content"])
    assert chat.messages == said and chat.ids == first
    list(chat.say("b"))
    first += message(lm, "user", "b")
    assert chat.ids == first + naive_answer(lm, first, Sampling(), 3)


def test_an_answer_can_be_stopped(lm: LanguageModel) -> None:
    """By `stop`, or by saying something else; what was yielded is what was said."""
    chat = begun(lm, Sampling(1.0), seed=1)
    for stop in (chat.stop, lambda: None):
        piece = next(chat.say("ab"))
        stop()
        before = chat.ids.copy()
        assert chat.messages[-1]["content"] == piece
    list(chat.say("a"))
    end = lm.tokenizer.special_ids["<|im_end|>"]
    wanted = [*before, end, *message(lm, "user", "a")]
    assert chat.ids == wanted + naive_answer(lm, wanted, Sampling(1.0), 1)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_an_answer_that_is_interrupted_anywhere_leaves_a_conversation(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder has then read nobody knows what."""
    chat, forward = begun(lm, Sampling(1.0), seed=1), BatchDecoder.forward

    def interrupted(decoder: BatchDecoder, tokens: torch.Tensor) -> torch.Tensor:
        forward(decoder, tokens)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BatchDecoder, "forward", interrupted)
        list(chat.say("ab"))
    wanted = [*chat.ids, *message(lm, "user", "a")]
    list(chat.say("a"))
    assert chat.ids == wanted + naive_answer(lm, wanted, Sampling(1.0), 1)


def test_no_special_token_but_the_end_is_sampled() -> None:
    lm = language_model()
    special = lm.tokenizer.special_ids
    head, norm = lm.model.head.weight, lm.model.norm_out
    norm.weight.zero_()
    norm.bias.fill_(1.0)
    head.zero_()
    head[list(special.values())] = 10.0
    head[special["<|im_end|>"]] = 0.0
    head[lm.tokenizer.encode("x")] = 9.0
    chat = begun(lm, Sampling(0.01))
    assert "".join(chat.say("a")) == "x" * TOKENS
    head[special["<|im_end|>"]] = 9.5
    chat = begun(lm, Sampling(0.01))
    assert list(chat.say("a")) == [] and chat.messages[-1]["content"] == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": 0}, "tokens=0 must be 1 or more"),
        ({"tokens": 2.5}, r"tokens=2\.5 must be 1 or more, a whole number"),
        ({"seed": -1}, "seed=-1 must be from 0"),
        ({"temperature": -1.0}, "temperature -1.0 must be 0, or"),
        ({"messages": ["hello"]}, "a message should have a role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "system, user, assistant"),
        ({"messages": [{"role": "user", "content": "\udcff"}]}, "not valid Unicode"),
    ],
)
def test_what_cannot_be_is_one_line(
    lm: LanguageModel, options: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        lm.chat(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", " \n", "\udcff"])
def test_what_cannot_be_said_changes_nothing(lm: LanguageModel, text: str) -> None:
    chat = begun(lm, Sampling(0))
    with pytest.raises(UserError, match=r"nothing in the message|not valid Unicode"):
        chat.say(text)
    assert chat.messages == [] and chat.ids == [lm.tokenizer.bos_id]


def test_logits_that_are_not_finite_are_one_line() -> None:
    lm = language_model()
    lm.model.norm_out.bias[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        list(begun(lm, Sampling(0)).say("a"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_the_same() -> None:
    """Turns begin where a recording has left the decoder, and a chunk is closed now and then."""
    lms = language_model(), language_model()
    lms[0].model.float()
    lms[1].model.float().cuda()
    chats = [begun(lm, Sampling(0)) for lm in lms]
    for chat in chats:
        for text in ("ab " * 3, "b", "a" * 2 * T, "ab"):
            list(chat.say(text))
    assert chats[0].ids == chats[1].ids
