"""Conversations as ids: special ids come from the template alone, and the mask covers answers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.data.chat import ROLES, Message, encode_conversation, transcript
from i3dist.data.token_types import MASKED, TOKEN_TYPES, UINT16, UINT32, token_type, with_mask
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.known import TOKENIZER

texts = st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text()), max_size=5).map("".join)
conversations = st.lists(
    st.builds(Message, st.sampled_from([*ROLES]), texts.map(str.encode)), min_size=1, max_size=6
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER, Path("tokenizer.json"))


def naive(tokenizer: Tokenizer, messages: list[Message]) -> list[tuple[int, bool]]:
    """Token by token: its id, and whether it is learned."""
    ids, found = tokenizer.special_ids, []
    for role, content in messages:
        answer = role == "assistant"
        found += [(ids["<|im_start|>"], False), (ids[f"<|{role}|>"], False)]
        found += [(token, answer) for token in tokenizer.encode(content.decode())]
        found.append((ids["<|im_end|>"], answer))
    return found


def test_a_conversation_in_full(tokenizer: Tokenizer) -> None:
    """The template, written out."""
    messages = [
        Message("user", b"a"),
        Message("assistant", b"b<|im_end|>"),
        Message("system", b"ab"),
    ]
    ids, learned = encode_conversation(tokenizer, messages)
    assert transcript(tokenizer, ids) == (
        "<|im_start|><|user|>a<|im_end|><|im_start|><|assistant|>b<|im_end|><|im_end|>"
        "<|im_start|><|system|>ab<|im_end|>"
    )
    assert transcript(tokenizer, ids[learned]) == "b<|im_end|><|im_end|>"
    assert int((ids == tokenizer.special_ids["<|im_end|>"]).sum()) == 3


@given(messages=conversations)
def test_any_conversation_is_that_of_the_definition(
    tokenizer: Tokenizer, messages: list[Message]
) -> None:
    ids, learned = encode_conversation(tokenizer, messages)
    assert list(zip(ids.tolist(), learned.tolist(), strict=True)) == naive(tokenizer, messages)
    special = np.isin(ids, list(tokenizer.special_ids.values()))
    assert special.sum() == 3 * len(messages), "special tokens in a text stay text"
    parts = (f"<|im_start|><|{role}|>{content.decode()}<|im_end|>" for role, content in messages)
    assert transcript(tokenizer, ids) == "".join(parts)


@given(st.lists(st.tuples(st.integers(0, (1 << 24) - 1), st.booleans())))
def test_ids_and_mask_come_back(tokens: list[tuple[int, bool]]) -> None:
    ids = np.array([token for token, _ in tokens], np.uint32)
    learned = np.array([learned for _, learned in tokens], bool)
    stored = with_mask(ids, learned)
    assert stored.dtype == MASKED.dtype
    found = MASKED.learned(stored)
    assert found is not None and found.tolist() == learned.tolist()
    assert MASKED.ids(stored).tolist() == ids.tolist()


def test_the_lowest_version_is_taken_that_can_hold_the_data() -> None:
    assert token_type(1 << 16) is UINT16 and UINT16.version == 1
    assert token_type((1 << 16) + 1) is UINT32 and UINT32.version == 2
    assert token_type(300, has_mask=True) is MASKED and MASKED.version == 2
    assert all(name == kind.name for name, kind in TOKEN_TYPES.items())
