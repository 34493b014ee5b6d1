"""Checks conversations in a shard: the order of the template's tokens, and the mask.

The mask follows from these tokens: what stands after ``<|assistant|>`` up to the next
``<|im_end|>`` is learned, and nothing else.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.stream import Stream
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


class Marks(NamedTuple):
    """What a shard tells of its mask and conversations.

    `positions` and `ids` are those of special tokens before the padding, and `changes` the
    positions whose mask differs from that of the token before. Before a shard nothing is learned.
    """

    positions: Ints
    ids: Stored
    changes: Ints
    end: int  # number of tokens before the padding


def disorder(stream: Stream, marks: Marks) -> Ints:
    """Positions of special tokens that may not follow the special token before them."""
    assert stream.chat
    kinds = np.full(len(marks.ids), _ROLE)
    for kind, number in (
        (_BOS, stream.bos_id),
        (_EOS, stream.eos_id),
        (_BEGIN, stream.chat.begin),
        (_END, stream.chat.end),
    ):
        kinds[marks.ids == number] = kind
    wanted = _MAY_FOLLOW[kinds[:-1], kinds[1:]]
    found = np.where(np.diff(marks.positions) == 1, _DIRECTLY, _AFTER_TEXT)
    return marks.positions[1:][found != wanted]


def wrong_mask(stream: Stream, marks: Marks) -> Ints:
    """Positions where the mask changes and should not, or does not and should."""
    return np.setxor1d(marks.changes, np.fromiter(_expected_changes(stream, marks), np.int64))


def ends_in_answer(stream: Stream, marks: Marks) -> bool:
    """Whether the first token of the next shard is to be learned."""
    assert stream.chat
    if not len(marks.ids):
        return begins_in_answer(marks)
    return bool(marks.ids[-1] == stream.chat.answers)


def begins_in_answer(marks: Marks) -> bool:
    """Whether the first token of the shard is learned."""
    return bool(len(marks.changes) and marks.changes[0] == 0)


def _expected_changes(stream: Stream, marks: Marks) -> Iterator[int]:
    assert stream.chat
    is_answer = marks.ids == stream.chat.answers
    before = np.concatenate(([begins_in_answer(marks)], is_answer))[: len(marks.ids)]
    if begins_in_answer(marks):
        yield 0
    for after in (marks.positions[is_answer], marks.positions[before]):
        yield from (position + 1 for position in after.tolist() if position + 1 < marks.end)
