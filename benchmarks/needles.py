"""Trials of benchmarks/needle.py: a made-up fact stands in a text, and is asked for later.

Notation: B trials, V candidates, W words of a value, K chunks before the query's, T tokens, C
history chunks.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from i3dist.data.corpus import Split
from i3dist.data.shards import read_shard
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError

Tokens = NDArray[np.int64]

TEMPLATES = (  # before the key, and between it and the value
    (" The secret word of the", " is"),
    (" In the book of the", " it is written:"),
    (" Everyone who has seen the", " calls it"),
    (" The password of the", " has always been"),
)
KEY_WORDS = 2
WORD = r" [a-z]{4,}"
LEAST_WORDS, MOST_WORDS = 8, 2000  # of the vocabulary


class Batch(NamedTuple):
    """Trials with their needles at one distance."""

    context: Tokens  # [B, K, T], the chunks before the query's
    query: Tokens  # [B, V, T], the query's chunk with each of the candidates
    last: Tokens  # [B], position in the query's chunk of the query's last token
    values: Tokens  # [B, V, W], the candidates, the true one first
    other: Tokens  # [B, C, T], of another document, without a needle


@dataclass(frozen=True)
class Trial:
    """One needle with its haystack and candidates. Texts begin with <BOS>."""

    haystack: Tokens  # [K + 1, T]
    other: Tokens  # [C, T]
    offset: int  # of the query in the last chunk
    query: Tokens  # the needle's tokens before the value
    values: Tokens  # [V, W], the true one first
    end: Tokens  # the needle's tokens after the value

    def text(self, distance: int) -> Tokens:
        """[K + 1, T] with the needle and the query, each in place of what stood there.

        Args:
            distance: tokens from the needle's first to the query's first.
        """
        text = self.haystack.flatten()
        needle = np.concatenate([self.query, self.values[0], self.end])
        asked = text.size - self.haystack.shape[1] + self.offset
        text[asked - distance :][: needle.size] = needle
        text[asked:][: self.query.size] = self.query
        return text.reshape(self.haystack.shape)

    def queries(self, text: Tokens) -> Tokens:
        """The last chunk of a text [K + 1, T] with each of the candidates: [V, T]."""
        chunks = np.repeat(text[-1:], len(self.values), axis=0)
        begin = self.offset + self.query.size
        chunks[:, begin : begin + self.values.shape[1]] = self.values
        return chunks


def lay_out(trials: Sequence[Trial], distance: int) -> Batch:
    """Put the needles of trials at one distance, in tokens."""
    texts = [trial.text(distance) for trial in trials]
    return Batch(
        np.stack([text[:-1] for text in texts]),
        np.stack([trial.queries(text) for trial, text in zip(trials, texts, strict=True)]),
        np.array([trial.offset + trial.query.size - 1 for trial in trials]),
        np.stack([trial.values for trial in trials]),
        np.stack([trial.other for trial in trials]),
    )


@dataclass(frozen=True)
class Sizes:
    """Sizes of the test."""

    trials: int
    candidates: int  # V
    words: int  # W
    before: int  # K
    length: int  # T
    chunks: int  # C
    seed: int


def sample(documents: Sequence[Tokens], tokenizer: Tokenizer, sizes: Sizes) -> list[Trial]:
    """Random trials. Wrong candidates are the values of other trials.

    Raises:
        UserError: too few documents are long enough, or there are too few words or trials.
    """
    if sizes.trials < sizes.candidates:
        raise UserError(
            f"--trials {sizes.trials} should be at least --candidates {sizes.candidates}: wrong "
            "candidates are the values of other trials"
        )
    rng = np.random.default_rng(sizes.seed)
    words = common_words(tokenizer)
    values = _distinct(rng, words, sizes)
    texts = _texts(rng, documents, tokenizer.bos_id, sizes)
    end = np.array(tokenizer.encode("."))
    trials = []
    for number, (haystack, other) in enumerate(texts):
        query = _query(rng, words, tokenizer)
        room = sizes.length - query.size - sizes.words - end.size
        if room < 1:
            raise UserError(f"a chunk of {sizes.length} tokens has no room for a needle")
        offset = int(rng.integers(1, room + 1))
        others = np.delete(np.arange(sizes.trials), number)
        wrong = rng.choice(others, sizes.candidates - 1, replace=False)
        trials.append(Trial(haystack, other, offset, query, values[[number, *wrong]], end))
    return trials


def common_words(tokenizer: Tokenizer) -> Tokens:
    """Tokens that are words in small letters, by their ids: byte-pair merges of frequent pairs come
    first.

    Raises:
        UserError: there are too few.
    """
    texts = ((number, tokenizer.decode([number])) for number in range(tokenizer.vocab_size))
    words = [number for number, text in texts if re.fullmatch(WORD, text)][:MOST_WORDS]
    if len(words) < LEAST_WORDS:
        raise UserError(
            f"{tokenizer.path} has {len(words)} words of small letters, and needles need "
            f"{LEAST_WORDS}: test a model with a larger vocabulary"
        )
    return np.array(words)


def read_documents(split: Split) -> Iterator[Tokens]:
    """The documents of a split, without special tokens."""
    manifest = split.manifest
    numbers = range(len(manifest.shards))
    shards = [read_shard(split.folder, manifest, number).tokens.ravel() for number in numbers]
    stream = np.concatenate(shards).astype(np.int64)
    for part in np.split(stream, np.flatnonzero(stream == manifest.bos_id)):
        yield part[~np.isin(part, (manifest.bos_id, manifest.eos_id, manifest.pad_id))]


def _query(rng: np.random.Generator, words: Tokens, tokenizer: Tokenizer) -> Tokens:
    """The beginning of a needle, up to its value."""
    before, after = TEMPLATES[rng.integers(len(TEMPLATES))]
    key = rng.choice(words, KEY_WORDS, replace=False)
    return np.array([*tokenizer.encode(before), *key, *tokenizer.encode(after)])


def _distinct(rng: np.random.Generator, words: Tokens, sizes: Sizes) -> Tokens:
    """Random values [trials, W], all different."""
    if len(words) ** sizes.words < 2 * sizes.trials:
        raise UserError(f"--words {sizes.words} of {len(words)} make too few values: take more")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < sizes.trials:
        found[tuple(rng.choice(words, sizes.words).tolist())] = None
    return np.array(list(found))


def _texts(
    rng: np.random.Generator, documents: Sequence[Tokens], bos_id: int, sizes: Sizes
) -> Iterator[tuple[Tokens, Tokens]]:
    """A haystack and a text of another document for each trial; documents are used in turn."""
    # The <BOS> of a text takes a place.
    needed, reach = ((chunks * sizes.length - 1) for chunks in (sizes.before + 1, sizes.chunks))
    long = [number for number, document in enumerate(documents) if document.size >= needed]
    others = [number for number, document in enumerate(documents) if document.size >= reach]
    if not long or len(others) < 2:
        raise UserError(
            f"the haystacks need a document of {needed:,} tokens and another of {reach:,}; of the "
            f"{len(documents):,} documents {len(long):,} have the first length and {len(others):,} "
            "the second: give longer ones, or smaller --distances"
        )
    order = rng.permutation(long)
    for number in range(sizes.trials):
        own = order[number % len(order)]
        other = rng.choice([n for n in others if n != own])
        pieces = ((documents[own], needed), (documents[other], reach))
        starts = [int(rng.integers(0, text.size - size + 1)) for text, size in pieces]
        yield tuple(
            np.concatenate([[bos_id], text[start : start + size]]).reshape(-1, sizes.length)
            for (text, size), start in zip(pieces, starts, strict=True)
        )
