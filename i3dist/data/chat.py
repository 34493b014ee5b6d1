"""Conversations as token ids: the model card's chat tokens around each message.

A message is ``<|im_start|> <|role|> text <|im_end|>``, where ``<|role|>`` is ``<|system|>``,
``<|user|>`` or ``<|assistant|>``. Its text is encoded by itself and never makes special ids. What
is learned is each answer: the text of the assistant, and the ``<|im_end|>`` that ends it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from i3dist.data.long_texts import Ids
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.files import regular, write_result

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
        del content  # perhaps hundreds of megabytes
    return _joined(parts), np.repeat(learned, counts)


def _joined(parts: list[Sequence[int] | Ids]) -> NDArray[np.uint32]:
    """The parts one after the other, [T]. Each is let go when it is copied."""
    ids = np.empty(sum(map(len, parts)), np.uint32)
    start = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        ids[start : start + len(part)] = part
        start += len(part)
    return ids


def message_of(turn: object) -> Message:
    """The message in a turn such as ``{"role": "user", "content": "..."}``.

    Raises:
        UserError: it is no such object, or its text is not valid Unicode.
    """
    match turn:
        case {"role": str(role), "content": str(content)} if role in ROLES:
            try:
                return Message(role, content.encode())
            except UnicodeEncodeError:
                raise UserError("a message is not valid Unicode: it has a lone surrogate") from None
    roles = ", ".join(ROLES)
    raise UserError(f"a message should have a role ({roles}) and a content, both text")


def read_conversation(path: Path) -> list[dict[str, str]]:
    """The turns in a file of one conversation, as `write_conversation` writes it.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        (line,) = filter(str.strip, regular(path).read_text("utf-8").split("\n"))
        messages = [message_of(turn) for turn in json.loads(line)["messages"]]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(
            f"{path} is no conversation: it should be one line of JSON with `messages`"
        ) from None
    return [{"role": role, "content": content.decode()} for role, content in messages]


def write_conversation(path: Path, turns: Sequence[dict[str, str]]) -> None:
    """Write turns as a line of jsonl, which `data_prep/shard.py --format chat` reads too.

    Raises:
        UserError: the file cannot be written; an earlier one is untouched.
    """
    line = json.dumps({"messages": turns}, ensure_ascii=False)
    write_result(path, f"{line}\n".encode())


def transcript(tokenizer: Tokenizer, ids: Sequence[int] | NDArray[np.integer]) -> str:
    """The text of `ids` with the template's tokens by their names."""
    names = {tokenizer.special_ids[token]: token for token in (BEGIN, END, *ROLES.values())}
    ids = np.asarray(ids)
    places = np.flatnonzero(np.isin(ids, list(names))).tolist()
    text = tokenizer.decode(ids[: places[0] if places else len(ids)])
    for place, after in zip(places, [*places[1:], len(ids)], strict=True):
        text += names[int(ids[place])] + tokenizer.decode(ids[place + 1 : after])
    return text
