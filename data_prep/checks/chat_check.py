"""Checks conversations in a shard: the order of the template's tokens, and the mask.

The mask follows from these tokens: what stands after ``<|assistant|>`` up to the next
``<|im_end|>`` is learned, and nothing else.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.checks.stream import Stream
from i3dist.data.token_types import Stored

Ints = NDArray[np.int64]
# Kinds of special tokens, and for each pair of kinds whether the second may follow the first:
# directly, after text, or not at all.
_BOS, _EOS, _BEGIN, _END, _ROLE = range(5)
_DIRECTLY, _AFTER_TEXT = 1, 2
_MAY_FOLLOW = np.zeros((5, 5), np.int8)
for _pair in ((_BOS, _BEGIN), (_BEGIN, _ROLE), (_END, _BEGIN), (_END, _EOS), (_EOS, _BOS)):
    _MAY_FOLLOW[_pair] = _DIRECTLY
_MAY_FOLLOW[_ROLE, _END] = _AFTER_TEXT


WRONG_ORDER = "a token of the chat template stands in the wrong place"
WRONG_MASK = "the mask of learned tokens does not follow the answers"


class Marks(NamedTuple):
    """What a shard tells of its mask and conversations.

    `positions` and `ids` are those of special tokens before the padding, and `changes` the
    positions whose mask differs from that of the token before. Before a shard nothing is learned.
    """

    positions: Ints
    ids: Stored
    changes: Ints
    end: int  # number of tokens before the padding

    @property
    def begins_in_answer(self) -> bool:
        """Whether the first token is learned."""
        return bool(len(self.changes) and self.changes[0] == 0)


class ChatEnds(NamedTuple):
    """How a shard begins and ends, to join it with its neighbors.

    `first` and `last` are its first and last special token: the id, and whether it is the first
    or last token of all. None without special tokens.
    """

    begins_in_answer: bool
    ends_in_answer: bool  # the first token of the next shard is to be learned
    first: tuple[int, bool] | None
    last: tuple[int, bool] | None

    @classmethod
    def of(cls, stream: Stream, marks: Marks) -> "ChatEnds":
        """The ends of a shard."""
        assert stream.chat
        begins = marks.begins_in_answer
        if not len(marks.ids):
            return cls(begins, begins, None, None)
        first, last = marks.ids[[0, -1]].tolist()
        start, stop = marks.positions[[0, -1]].tolist()
        ends = last == stream.chat.answers
        return cls(begins, ends, (first, start == 0), (last, stop == marks.end - 1))

    @classmethod
    def before_all(cls, stream: Stream) -> "ChatEnds":
        """What the first shard follows: the end of a document."""
        return cls(False, False, None, (stream.eos_id, True))


def join(stream: Stream, before: ChatEnds, after: ChatEnds) -> tuple[list[str], ChatEnds]:
    """The problems where two shards meet, and the ends of both together."""
    problems = []
    if before.ends_in_answer != after.begins_in_answer:
        problems.append(WRONG_MASK)
    if after.first is None:
        return problems, after._replace(last=before.last and (before.last[0], False))
    if before.last:
        pair = np.array([before.last[0], after.first[0]])
        if not _in_order(stream, pair, np.array([before.last[1] and after.first[1]]))[0]:
            problems.append(WRONG_ORDER)
    return problems, after


def disorder(stream: Stream, marks: Marks) -> Ints:
    """Positions of special tokens that may not follow the special token before them."""
    return marks.positions[1:][~_in_order(stream, marks.ids, np.diff(marks.positions) == 1)]


def _in_order(stream: Stream, ids: NDArray[Any], directly: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For each special token [N] but the first, whether it may follow the one before it.

    Args:
        stream: the split.
        ids: [N].
        directly: [N - 1], whether nothing stands between the two.
    """
    assert stream.chat
    kinds = np.full(len(ids), _ROLE)
    for kind, number in (
        (_BOS, stream.bos_id),
        (_EOS, stream.eos_id),
        (_BEGIN, stream.chat.begin),
        (_END, stream.chat.end),
    ):
        kinds[ids == number] = kind
    return _MAY_FOLLOW[kinds[:-1], kinds[1:]] == np.where(directly, _DIRECTLY, _AFTER_TEXT)


def wrong_mask(stream: Stream, marks: Marks) -> Ints:
    """Positions where the mask changes and should not, or does not and should."""
    assert stream.chat
    is_answer = marks.ids == stream.chat.answers
    ends_answer = np.concatenate(([marks.begins_in_answer], is_answer[:-1]))[: len(marks.ids)]
    expected = np.concatenate((marks.positions[is_answer], marks.positions[ends_answer])) + 1
    expected = expected[expected < marks.end]
    return np.setxor1d(marks.changes[int(marks.begins_in_answer) :], expected)
