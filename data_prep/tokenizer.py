"""Trains the tokenizer on the first part of the source's own text."""

from collections import Counter
from collections.abc import Iterable, Iterator

import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.records import Skip, usable_text
from data_prep.sources import Part
from i3dist.data.tokenizer import SPECIAL_TOKENS
from i3dist.errors import UserError

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token: what a vocabulary holds before the first merge."""

LONGEST_WORD = 10_000
"""Characters that training takes for one word at most."""

# Characters that the split pattern keeps together.
_KINDS = (r"\p{L}", r"\p{N}", r"\p{White_Space}", r"[^\p{L}\p{N}\p{White_Space}]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE and return its `tokenizer.json`.

    Special tokens take the first ids, in the order of `SPECIAL_TOKENS`. Same texts, same bytes:
    the trainer counts pairs in parallel, but breaks ties by id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(without_long_words(texts), trainer)
    return tokenizer.to_str(pretty=True).encode()


def without_long_words(texts: Iterable[str], longest: int = LONGEST_WORD) -> Iterator[str]:
    """The texts, cut where the split pattern would find a word of more than `longest` characters.

    Training takes time with the square of a word's length.
    """
    # Such a word fills a window of half its length at some multiple of that length.
    half = longest // 2
    window = regex.compile("|".join(rf"{kind}{{{half}}}" for kind in _KINDS))
    word = regex.compile("|".join(rf"(?<!{kind}){kind}{{{longest + 1},}}" for kind in _KINDS))
    for text in texts:
        start = 0
        if any(window.match(text, place) for place in range(0, len(text) - half + 1, half)):
            for found in word.finditer(text):
                for end in range(found.start() + longest, found.end(), longest):
                    yield text[start:end]
                    start = end
        yield text[start:]


def sample_texts(parts: Iterable[Part], source: str, limit: int) -> Iterator[str]:
    """Usable texts from the start of the source, about `limit` bytes; none at all is an error."""
    skipped: Counter[str] = Counter()
    taken = 0
    for part in parts:
        for record in part.records():
            text = usable_text(record.text)
            if isinstance(text, Skip):
                skipped[text.value] += 1
                continue
            yield text
            taken += len(text.encode())
            if taken >= limit:
                return
    if not taken:
        raise no_usable_document(source, skipped)


def no_usable_document(source: str, skipped: Counter[str]) -> UserError:
    """The error for a source without text, with the count of what it does hold."""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    found = f"it holds {counts}" if counts else "it is empty"
    return UserError(f"{source} has no usable document ({found}): name another --source")
