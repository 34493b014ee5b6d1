"""Encodes long texts in pieces, with the ids of the whole. So memory does not follow their length.

GPT-2's pattern splits a text into words, and each word is encoded by itself. Most pieces end where
a word ends. But a word may be as long as the text (a line of dashes, a genome), so pieces also end
within words. Ids there are right for this reason.

A word's tokens are merged pair by pair, the pair of lowest rank first, then the leftmost. So
tokens are those of a word if and only if each two neighbors are those of their own bytes: the first
merge that differs would join two neighbors, whose bytes alone are merged in the same order. A piece
that begins within a word therefore begins some tokens before the cut. If it gives the first of
them again, each two neighbors have been neighbors in a piece.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

Ids = NDArray[np.unsignedinteger]
Encode = Callable[[bytes], Ids]
"""Ids [T] of a text in valid UTF-8: uint16 where all ids of the vocabulary fit, else uint32."""

PIECE_BYTES = 1 << 20
WINDOW_BYTES = 1 << 10
_LONGEST_CONTRACTION = len("'ll")


def encodes_in_pieces(spec: Mapping[str, Any], encode: Encode) -> Encode:
    """An encoder with the ids of `encode` that gives it pieces of about 1 MiB.

    `spec` is the content of the `tokenizer.json`. If its pattern is not GPT-2's, texts stay whole.
    """
    return InPieces(spec, encode) if _splits_as_gpt2(spec) else encode


class _DiffersError(Exception):
    """A piece that begins within a word does not give the tokens before it again."""


class InPieces:
    """An encoder for GPT-2's pattern that gives another one pieces of a text."""

    def __init__(self, spec: Mapping[str, Any], encode: Encode) -> None:
        """`spec` is the content of the `tokenizer.json` whose ids `encode` gives."""
        self.encode = encode
        self._cuts_words = _merges_plainly(spec["model"])
        vocab = spec["model"]["vocab"]
        self._bytes = np.zeros(max(vocab.values()) + 1, np.int64)
        self._bytes[list(vocab.values())] = [len(token) for token in vocab]  # a byte a character
        self._words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str

    def __call__(self, text: bytes) -> Ids:
        """Ids of a text, [T]."""
        if len(text) <= PIECE_BYTES:
            return self.encode(text)
        if self._cuts_words:
            with suppress(_DiffersError):
                return self._in_pieces(text, cuts_words=True)
        return self._in_pieces(text, cuts_words=False)

    def _in_pieces(self, text: bytes, cuts_words: bool) -> Ids:
        """Ids of a text, [T]."""
        ids = bytearray()  # grows in place, while `np.concatenate` would hold everything twice
        start = begin = 0  # of the piece, and of the tokens before it that it gives again
        again: Ids = np.empty(0, np.uint16)
        while start < len(text):
            stop, in_word = self._cut(text, start + PIECE_BYTES, cuts_words)
            found = self.encode(text[begin:stop])
            if len(again) and found[0] != again[0]:
                raise _DiffersError
            del ids[len(ids) - again.nbytes :]
            ids += found.data
            start, again = stop, found[len(found) :]
            if in_word:
                again = self._last_tokens(text, stop, found)
            begin = start - int(self._bytes[again].sum())
        return np.frombuffer(ids, found.dtype)

    def _cut(self, text: bytes, place: int, cuts_words: bool) -> tuple[int, bool]:
        """The first good place to cut after `place`, and whether it lies within a word."""
        for near in range(place, len(text) - WINDOW_BYTES, WINDOW_BYTES):
            start, middle, stop = (
                _character(text, near + size) for size in (0, WINDOW_BYTES // 2, WINDOW_BYTES)
            )
            window = text[start:stop].decode()
            words = self._words(window)
            if len(words) == 1 and cuts_words:
                return middle, True
            # A short word at an end of the window may be a piece of a contraction, or seem one.
            # How white space is split depends on what follows it, so nothing is cut behind it.
            first = 1 + (len(words[0][0]) <= _LONGEST_CONTRACTION)
            last = len(words) - (len(words[-1][0]) <= _LONGEST_CONTRACTION)
            for count, (_, (place, _)) in enumerate(words[first:last], first):
                if not window[place - 1].isspace():
                    return start + sum(len(word) for word, _ in words[:count]), False
        return len(text), False

    def _last_tokens(self, text: bytes, stop: int, ids: Ids) -> Ids:
        """The last of the tokens before `stop`, which are near, and begin with a character."""
        ids = ids[-WINDOW_BYTES // 4 :]
        sizes = np.cumsum(self._bytes[ids][::-1])
        for count in range(int(np.searchsorted(sizes, WINDOW_BYTES // 4)), 0, -1):
            place = stop - int(sizes[count - 1])
            if _character(text, place) == place:
                return ids[len(ids) - count :]
        raise _DiffersError


def _character(text: bytes, place: int) -> int:
    """The first place from `place` on where a character begins, or the end of the text."""
    while place < len(text) and 0x80 <= text[place] < 0xC0:
        place += 1
    return min(place, len(text))


def _splits_as_gpt2(spec: Mapping[str, Any]) -> bool:
    """Whether the text is split by GPT-2's pattern and nothing else."""
    splitter = spec["pre_tokenizer"] or {}
    return (
        splitter.get("type") == "ByteLevel"
        and splitter["use_regex"]
        and not splitter["add_prefix_space"]
        and spec["normalizer"] is None
        and all(token["special"] for token in spec["added_tokens"])
    )


def _merges_plainly(model: Mapping[str, Any]) -> bool:
    """Whether words are encoded by merging pairs of tokens and nothing else."""
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return not any(model.get(name) for name in others)
