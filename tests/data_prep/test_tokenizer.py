"""Training: on an even sample, and on words of megabytes in linear time."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from data_prep.sources import Part, Record
from data_prep.tokenizer import LONGEST_WORD, sample_texts, train_tokenizer, without_long_words
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError

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


SIZE = 20_000
PER_MB = 50
"""Texts of `SIZE` bytes in a megabyte."""


@dataclass(frozen=True)
class Texts(Part):
    """So many texts, all of the part's name; a name of blanks makes no usable text."""

    name: str
    count: int

    def records(self) -> Iterator[Record]:
        for number in range(self.count):
            yield Record(f"{self.name}#{number}", "", "", self.name * SIZE)


def sampled(parts: list[Texts], megabytes: int, evenly: bool = True) -> dict[str, int]:
    """How many texts of each part the sample has."""
    texts = sample_texts(parts, "source", megabytes, evenly=evenly)
    return dict(Counter(text[0] for text in texts))


def test_a_sample_has_an_equal_share_of_each_part() -> None:
    parts = [Texts(name, 10 * PER_MB) for name in "abcd"]
    assert sampled(parts, 4) == dict.fromkeys("abcd", PER_MB)
    assert sampled(parts, 20) == dict.fromkeys("abcd", 5 * PER_MB)
    assert sampled(parts, 4, evenly=False) == {"a": 4 * PER_MB}


def test_a_sample_is_all_there_is_where_that_is_less() -> None:
    parts = [Texts(name, count) for name, count in zip("abcd", (3, 0, 1, 9), strict=True)]
    assert sampled(parts, 64) == sampled(parts, 64, evenly=False) == {"a": 3, "c": 1, "d": 9}


def test_later_parts_make_up_for_a_short_one() -> None:
    counts = (10 * PER_MB, 10, 10 * PER_MB, 10 * PER_MB)
    parts = [Texts(name, count) for name, count in zip("abcd", counts, strict=True)]
    found = sampled(parts, 4)
    assert found == {"a": PER_MB, "b": 10, "c": PER_MB + 20, "d": PER_MB + 20}
    assert sum(found.values()) == 4 * PER_MB


def test_a_sample_reads_no_more_parts_than_megabytes() -> None:
    parts = [Texts(name, 10 * PER_MB) for name in "abcdefghij"]
    assert sampled(parts, 5) == dict.fromkeys("acegi", PER_MB)
    assert sampled(parts, 1) == {"a": PER_MB}


def test_a_text_outside_the_sampled_parts_is_found() -> None:
    parts = [Texts(" ", 2), Texts(" ", 2), Texts("x", 2), Texts(" ", 2)]
    assert sampled(parts, 2) == {"x": 2}
    with pytest.raises(UserError, match=r"source has no usable document \(it holds 4 empty\)"):
        sampled(parts[:2], 1)
