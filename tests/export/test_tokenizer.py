"""AutoTokenizer of the export against i3dist's tokenizer. About 2 s."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from i3dist.data.chat import ROLES, Message, encode_conversation
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.export.conftest import BOS, EOS, WORDS, Exported

texts = st.text(max_size=40) | st.lists(
    st.sampled_from([*WORDS.split(), " ", "\n", "<", "|", "é", "日本"]), max_size=12
).map("".join)
messages = st.lists(st.tuples(st.sampled_from(list(ROLES)), texts), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def theirs(one: Exported) -> Any:
    return AutoTokenizer.from_pretrained(one.folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def ours(one: Exported) -> Tokenizer:
    return Tokenizer.load(one.folder / "tokenizer.json")


@given(text=texts)
def test_a_text_is_bos_and_its_ids_and_decodes_to_itself(
    theirs: Any, ours: Tokenizer, text: str
) -> None:
    ids = theirs(text).input_ids
    assert ids == [BOS, *ours.encode(text)]
    assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs(text, add_special_tokens=False).input_ids == ids[1:]


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_specials_in_a_text_are_parsed_unless_they_are_to_be_split(
    theirs: Any, ours: Tokenizer, special: str
) -> None:
    text = f"the {special} cat"
    number = ours.special_ids[special]
    assert theirs(text).input_ids == [BOS, *ours.encode("the "), number, *ours.encode(" cat")]
    assert theirs(text, split_special_tokens=True).input_ids == [BOS, *ours.encode(text)]
    assert number in theirs.all_special_ids


def test_its_specials_are_named(theirs: Any) -> None:
    assert (theirs.bos_token, theirs.eos_token) == ("<BOS>", "<EOS>")
    assert (theirs.pad_token, theirs.unk_token) == ("<PAD>", "<UNK>")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (BOS, EOS)
    assert len(theirs) == theirs.vocab_size


@given(turns=messages)
def test_the_chat_template_is_i3dists(
    theirs: Any, ours: Tokenizer, turns: list[tuple[str, str]]
) -> None:
    ids, learned = encode_conversation(ours, [Message(role, t.encode()) for role, t in turns])
    chat = [{"role": role, "content": text} for role, text in turns]
    found = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == [BOS, *ids]
    assert found["assistant_masks"] == [0, *learned]
    asked = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    begin, answer = (ours.special_ids[token] for token in ("<|im_start|>", "<|assistant|>"))
    assert asked["input_ids"] == [BOS, *ids, begin, answer]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tool", "content": "x"}, "unknown role tool: use system, user, assistant"),
        ({"role": "user"}, "the content of a message should be text"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "should be text"),
    ],
)
def test_what_is_no_message_is_refused(theirs: Any, message: dict[str, Any], says: str) -> None:
    with pytest.raises(TemplateError, match=says):
        theirs.apply_chat_template([message])
