"""Conversations as token ids: the model card's chat tokens around each message.

A message is ``<|im_start|> <|role|> text <|im_end|>``, where ``<|role|>`` is ``<|system|>``,
``<|user|>`` or ``<|assistant|>``. Its text is encoded by itself and never makes special ids. What
is learned is each answer: the text of the assistant, and the ``<|im_end|>`` that ends it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from i3dist.data.long_texts import Ids
from i3dist.data.tokenizer import Tokenizer

BEGIN, END = "<|im_start|>", "<|im_end|>"
ANSWERS = "assistant"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", ANSWERS)}
"""The token of each role."""


class Message(NamedTuple):
    """A turn of a conversation: one of `ROLES`, and a text in valid UTF-8."""

    role: str
    content: bytes


class ChatIds(NamedTuple):
    """The ids of the template's tokens."""

    begin: int
    end: int
    roles: tuple[int, ...]
    answers: int  # the one of the roles whose messages are learned

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatIds":
        """The ids of a tokenizer."""
        ids = tokenizer.special_ids
        roles = tuple(ids[token] for token in ROLES.values())
        return cls(ids[BEGIN], ids[END], roles, ids[ROLES[ANSWERS]])

    @property
    def all(self) -> tuple[int, ...]:
        """All of them."""
        return self.begin, self.end, *self.roles


def encode_conversation(
    tokenizer: Tokenizer, messages: Iterable[Message]
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """The ids [T] of a conversation, without <BOS> and <EOS>, and which of them are learned [T]."""
    chat = ChatIds.of(tokenizer)
    parts: list[Sequence[int] | Ids] = []
    counts, learned = [], []
    for role, content in messages:
        begin = chat.begin, tokenizer.special_ids[ROLES[role]]
        parts += [begin, tokenizer.encode_utf8(content), (chat.end,)]
        counts += [2, len(parts[-2]) + 1]
        learned += [False, role == ANSWERS]
    ids = np.concatenate(parts, dtype=np.uint32, casting="unsafe")
    del parts  # perhaps hundreds of megabytes
    return ids, np.repeat(learned, counts)


def transcript(tokenizer: Tokenizer, ids: Sequence[int] | NDArray[np.integer]) -> str:
    """The text of `ids` with the template's tokens by their names."""
    names = {tokenizer.special_ids[token]: token for token in (BEGIN, END, *ROLES.values())}
    ids = np.asarray(ids)
    places = np.flatnonzero(np.isin(ids, list(names))).tolist()
    text = tokenizer.decode(ids[: places[0] if places else len(ids)])
    for place, after in zip(places, [*places[1:], len(ids)], strict=True):
        text += names[int(ids[place])] + tokenizer.decode(ids[place + 1 : after])
    return text
