"""What a document is: plain text, or a conversation.

A format turns what a source gives into the bytes of a document, and those into tokens. The bytes
decide which documents are equal.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.sources import CHAT, TEXT, Skip, usable_text
from i3dist.data.chat import ANSWERS, ROLES, ChatIds, Message, encode_conversation
from i3dist.data.token_types import Stored, with_mask
from i3dist.data.tokenizer import Tokenizer

BLOCK = 1 << 20  # tokens that are looked at together


@dataclass(frozen=True)
class Format:
    """How documents are read and encoded."""

    name: str
    key: str
    """Of the object in a line of jsonl."""
    has_mask: bool
    usable: Callable[[object], bytes | Skip]
    """The bytes of the document that a source gives, or the reason to skip it."""
    text: Callable[[bytes], bytes]
    """The text in the bytes of a document, in UTF-8."""
    encode: Callable[[Tokenizer, bytes], Stored | Skip]
    """The tokens of a document as shards store them, [T], without <BOS> and <EOS>.

    T > 0: a document, or a message, of which a tokenizer that changes texts leaves nothing is
    skipped.
    """


def _encode_text(tokenizer: Tokenizer, document: bytes) -> Stored | Skip:
    ids = tokenizer.encode_utf8(document)
    return ids if len(ids) else Skip.EMPTY


def usable_conversation(raw: object) -> bytes | Skip:
    """The bytes of a list of messages, each with a role and a text; or the reason to skip it.

    A conversation has at least one answer, and no message is blank. `messages_of` reads the bytes:
    a line of JSON with the role and the length of each text, then the texts.
    """
    if raw is None:
        return Skip.NULL
    if isinstance(raw, Skip):
        return raw
    if not isinstance(raw, list):
        return Skip.NOT_MESSAGES
    if not raw:
        return Skip.EMPTY
    messages = []
    for message in raw:
        found = _usable_message(message)
        if isinstance(found, Skip):
            return found
        messages.append(found)
    if not any(message.role == ANSWERS for message in messages):
        return Skip.NO_ANSWER
    head = json.dumps([(message.role, len(message.content)) for message in messages])
    return b"".join((head.encode(), b"\n", *(message.content for message in messages)))


def _usable_message(raw: Any) -> Message | Skip:
    if not isinstance(raw, dict) or not {"role", "content"} <= raw.keys():
        return Skip.NOT_MESSAGES
    role, content = raw["role"], raw["content"]
    if not isinstance(role, str) or role not in ROLES:
        return Skip.UNKNOWN_ROLE
    text = usable_text(content) if isinstance(content, (str, bytes)) else Skip.NOT_TEXT
    if text is Skip.EMPTY:
        return Skip.EMPTY_MESSAGE
    return text if isinstance(text, Skip) else Message(role, text)


def messages_of(document: bytes) -> Iterator[Message]:
    """The messages in the bytes of a conversation."""
    start = document.index(b"\n") + 1
    for role, length in json.loads(document[:start]):
        yield Message(role, document[start : start + length])
        start += length


def _conversation_text(document: bytes) -> bytes:
    return b"\n".join(message.content for message in messages_of(document))


def _encode_conversation(tokenizer: Tokenizer, document: bytes) -> Stored | Skip:
    ids, learned = encode_conversation(tokenizer, messages_of(document))
    chat = ChatIds.of(tokenizer)
    for start in range(0, len(ids), BLOCK):  # a flag for each token at once would be large
        ends = start + np.flatnonzero(ids[start : start + BLOCK] == chat.end)
        if np.isin(ids[ends - 1], chat.roles).any():
            return Skip.EMPTY_MESSAGE
    return with_mask(ids, learned, copy=False)


FORMATS = {
    TEXT: Format(TEXT, "text", False, usable_text, bytes, _encode_text),
    CHAT: Format(
        CHAT, "messages", True, usable_conversation, _conversation_text, _encode_conversation
    ),
}
