"""Which conversations are usable, and why others are skipped."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.formats import FORMATS, messages_of, usable_conversation
from data_prep.sources import Skip

QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CASES: list[tuple[object, Skip]] = [
    (None, Skip.NULL),
    ([], Skip.EMPTY),
    ("text", Skip.NOT_MESSAGES),
    ({"role": "user", "content": "a"}, Skip.NOT_MESSAGES),
    ([QUESTION, "b"], Skip.NOT_MESSAGES),
    ([QUESTION, {"content": "b"}], Skip.NOT_MESSAGES),
    ([QUESTION, {"role": "assistant"}], Skip.NOT_MESSAGES),
    ([QUESTION, {"role": "gpt", "content": "b"}], Skip.UNKNOWN_ROLE),
    ([QUESTION, {"role": None, "content": "b"}], Skip.UNKNOWN_ROLE),
    ([QUESTION, {"role": ["user"], "content": "b"}], Skip.UNKNOWN_ROLE),
    ([QUESTION, {"role": "assistant", "content": None}], Skip.NOT_TEXT),
    ([QUESTION, {"role": "assistant", "content": [{"text": "b"}]}], Skip.NOT_TEXT),
    ([QUESTION, {"role": "assistant", "content": " \n"}], Skip.EMPTY_MESSAGE),
    ([{"role": "system", "content": ""}, QUESTION, ANSWER], Skip.EMPTY_MESSAGE),
    ([QUESTION, {"role": "assistant", "content": "\ud800"}], Skip.UNDECODABLE),
    ([QUESTION], Skip.NO_ANSWER),
    ([{"role": "system", "content": "a"}, QUESTION], Skip.NO_ANSWER),
]


@pytest.mark.parametrize(("raw", "reason"), CASES)
def test_what_is_no_usable_conversation_is_skipped_with_its_reason(
    raw: object, reason: Skip
) -> None:
    assert usable_conversation(raw) is reason


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(json_values)
def test_nothing_in_json_raises(raw: Any) -> None:
    found = usable_conversation(raw)
    if isinstance(found, bytes):
        told = [(message["role"], message["content"]) for message in raw]
        assert [(role, content.decode()) for role, content in messages_of(found)] == told


@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text().filter(str.strip)),
        min_size=1,
    )
)
def test_conversations_are_equal_where_their_messages_are(turns: list[tuple[str, str]]) -> None:
    """Other keys of a message make no difference; the role does."""
    turns = [*turns, ("assistant", "b")]
    plain = [{"role": role, "content": content} for role, content in turns]
    noted = [{"content": content, "role": role, "weight": 1} for role, content in turns]
    found = usable_conversation(plain)
    assert isinstance(found, bytes) and found == usable_conversation(noted)
    assert FORMATS["chat"].text(found).decode() == "\n".join(content for _, content in turns)
    other = {"system": "user", "user": "system", "assistant": "user"}[turns[0][0]]
    assert found != usable_conversation([{**plain[0], "role": other}, *plain[1:]])
