"""Trains the tokenizer on the first part of the source's own text."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.records import Skip, usable_text
from data_prep.sources import Part
from i3dist.errors import UserError
from i3dist.tokenizer import SPECIAL_TOKENS

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token: what a vocabulary holds before the first merge."""

LONGEST_WORD = 10_000
"""Characters that training takes for one word at most."""

# What the split pattern keeps together: letters, digits, white space, or other characters.
_LONG_RUN = re.compile(
    "|".join(
        rf"(?<!{kind}){kind}{{{LONGEST_WORD + 1},}}"
        for kind in (r"[^\W\d_]", r"\d", r"\s", r"(?:[^\w\s]|_)")
    )
)


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
    tokenizer.train_from_iterator(_without_long_words(texts), trainer)
    return tokenizer.to_str(pretty=True).encode()


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut where the split pattern would find a word longer than `LONGEST_WORD`.

    Training takes time with the square of a word's length.
    """
    for text in texts:
        start = 0
        for run in _LONG_RUN.finditer(text) if len(text) > LONGEST_WORD else ():
            for end in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
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
