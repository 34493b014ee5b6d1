"""Training on texts with words of megabytes: in linear time, and other texts notice nothing."""

import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from data_prep.tokenizer import LONGEST_WORD, train_tokenizer, without_long_words
from i3dist.data.tokenizer import Tokenizer

SHORT = 12
KINDS = [
    "é",
    "7",
    "²",
    "Ⅷ",
    "\x1c",
    "\x85",
    "\u200b",
    "!",
    "界",
    "_",
    " ",
    "\n",
    "a",
    "٣",
    "\u0301",
    "😀",
]
runs = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4 * SHORT)), max_size=8)


def cut(text: str) -> list[str]:
    """As for training, where words may have `SHORT` characters."""
    return list(without_long_words([text], SHORT))


def words(text: str) -> list[str]:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [text[slice(*span)] for _, span in splitter.pre_tokenize_str(text)]


@given(runs.map(lambda pairs: "".join(kind * count for kind, count in pairs)))
def test_only_words_that_are_too_long_are_cut(text: str) -> None:
    pieces = cut(text)
    assert "".join(pieces) == text
    assert all(len(word) <= SHORT + 1 for piece in pieces for word in words(piece))  # and a blank
    if all(len(word) <= SHORT for word in words(text)):
        assert pieces == [text]
    for before, after in pairwise(pieces):
        around = before[-1] + after[0]
        assert around.isspace() or len(words(around)) == 1


@pytest.mark.parametrize("kind", ["letters", "digits", "one letter", "blanks"])
def test_a_word_of_megabytes_takes_linear_time(kind: str) -> None:
    rng = random.Random(0)
    characters = {
        "letters": "abcdefghijklmnopqrstuvwxyz",
        "digits": "0123456789",
        "one letter": "a",
        "blanks": " ",
    }[kind]
    text = "".join(rng.choices(characters, k=800_000))
    start = time.process_time()
    tokenizer = Tokenizer(train_tokenizer([text], 300), Path("x"))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 10


def test_text_of_long_lines_is_not_cut() -> None:
    """Nor is text in a script without blanks."""
    for text in ("x=1;" * 5000, "世界、" * 9000, "a" * LONGEST_WORD, "- " * 9000):
        assert list(without_long_words([text])) == [text]
