"""Encodes long texts in pieces, with the ids of the whole. So memory does not follow their length.

A pattern splits a text into words, and each word is encoded by itself. Most pieces end where a word
ends. But a word may be as long as the text (a genome), so pieces also end within words. Ids there
are right for this reason.

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
import regex
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

Ids = NDArray[np.unsignedinteger]
Encode = Callable[[bytes], Ids]
"""Ids [T] of a text in valid UTF-8: uint16 where all ids of the vocabulary fit, else uint32."""

PIECE_BYTES = 1 << 20
WINDOW_BYTES = 1 << 10

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NO_LETTERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_NO_LETTERS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Letters and punctuation of which every library has long known what they are.
_LETTER = r"(?:(?=[\0-\u052f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])\p{L})"
_PUNCTUATION = r"\u3000-\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
_ANY_CASE = regex.compile(f"{_LETTER}+")
_SMALL_ONLY = regex.compile("[a-z]+")
_OR_DIGITS = regex.compile(f"{_LETTER}+|[0-9]+")
_SMALL_OR_DIGITS = regex.compile("[a-z]+|[0-9]+")

PATTERNS = {
    # Llama 3, cl100k as `transformers` writes it
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_NO_LETTERS}": _ANY_CASE,
    # Qwen2, Qwen3
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_NO_LETTERS}": _OR_DIGITS,
    # Qwen3.5
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": _OR_DIGITS,
    # cl100k as tiktoken writes it
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s+": _ANY_CASE,
    # o200k
    rf"{_CAPITALS}*{_SMALL}+{_CONTRACTION}?|{_CAPITALS}+{_SMALL}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_O200K_NO_LETTERS}": _SMALL_ONLY,
    # Mistral's Tekken, Nemotron
    rf"{_CAPITALS}*{_SMALL}+|{_CAPITALS}+{_SMALL}*|\p{{N}}|{_O200K_NO_LETTERS}": _SMALL_OR_DIGITS,
}
r"""Known patterns, and the text that may be cut anywhere within if much of it is in a row.

Where a run of these letters is cut, both parts are split as before. `\p{L}+` takes a run as a whole
wherever it begins, and so does o200k's pattern with small letters: what precedes them does not
decide where their word ends. It does with others: "a世B" is "a世" and "B", but "世Bb" is one word.
Digits are named where each of them is a word.
"""

_BETWEEN = regex.compile(
    r"[^\s\0-\x1f\x7f-\x9f](?= )"
    rf"|{_LETTER}(?=[\0-&(-@\[-`{{-\x7f{_PUNCTUATION}])"
    r"|[0-9](?=[\0-/:-\x7f])"
)
r"""What stands before a place between two words, by GPT-2's pattern and all of `PATTERNS`.

No word holds a space behind a character that is no white space; nor, behind a letter, anything but
letters, marks, and the ' of a contraction; nor anything but digits behind a digit. So a word ends
there, and the next one begins: nothing looks back. The words before stay what they are without the
text behind, as it could not go on any of them, and `(?!\S)` and `$` are asked behind white space
only. No other characters are named here, because libraries of other versions of Unicode may take
them for others.
"""


def encodes_in_pieces(spec: Mapping[str, Any], encode: Encode) -> Encode:
    """An encoder with the ids of `encode` that gives it pieces of about 1 MiB.

    `spec` is the content of the `tokenizer.json`. Texts stay whole if its pattern is neither
    GPT-2's nor one of `PATTERNS`, or if the tokenizer does more than to split and to merge.
    """
    if spec["normalizer"] or not all(token["special"] for token in spec["added_tokens"]):
        return encode
    splitter = spec["pre_tokenizer"] or {}
    if _is_byte_level(splitter, splits=True):
        return InPieces(spec, encode, _is_gpt2_word)
    letters = PATTERNS.get(_pattern(splitter))
    return InPieces(spec, encode, letters.fullmatch) if letters else encode


class _DiffersError(Exception):
    """A piece that begins within a word does not give the tokens before it again."""


class InPieces:
    """An encoder that gives another one pieces of a text."""

    def __init__(
        self, spec: Mapping[str, Any], encode: Encode, in_word: Callable[[str], object]
    ) -> None:
        """`spec` is the content of the `tokenizer.json` whose ids `encode` gives.

        `in_word` tells whether a text of `WINDOW_BYTES` may be cut in its middle, within a word.
        """
        self.encode = encode
        self._in_word = in_word
        self._cuts_words = _merges_plainly(spec["model"])
        vocab = spec["model"]["vocab"]
        self._bytes = np.zeros(max(vocab.values()) + 1, np.int64)
        self._bytes[list(vocab.values())] = [len(token) for token in vocab]  # a byte a character

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
            if found := _BETWEEN.search(window):
                return start + len(window[: found.end()].encode()), False
            if cuts_words and self._in_word(window):
                return middle, True
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


def _is_byte_level(splitter: Mapping[str, Any], splits: bool) -> bool:
    """Whether it makes characters of bytes, and nothing else, or splits by GPT-2's pattern."""
    return (
        splitter.get("type") == "ByteLevel"
        and splitter["use_regex"] == splits
        and not splitter["add_prefix_space"]
    )


def _pattern(splitter: Mapping[str, Any]) -> str:
    """The pattern of a splitter that takes its matches for words; empty if it does more."""
    match splitter:
        case {"type": "Sequence", "pretokenizers": [{"type": "Split"} as split, rest]}:
            kept = split["behavior"], split["invert"]
            if kept in (("Isolated", False), ("Removed", True)) and _is_byte_level(rest, False):
                return str(split["pattern"].get("Regex", ""))
    return ""


def _is_gpt2_word(window: str) -> bool:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(window)
    return len(words) == 1


def _merges_plainly(model: Mapping[str, Any]) -> bool:
    """Whether words as long as half a window are encoded by merging pairs and nothing else."""
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    # With `ignore_merges` a word that is a token becomes that token.
    longest = max(map(len, model["vocab"])) if model.get("ignore_merges") else 0
    return longest < WINDOW_BYTES // 4 and not any(model.get(name) for name in others)
