"""Trains the tokenizer on a sample of the source's own text."""

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import regex
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.formats import FORMATS, Format
from data_prep.sources import TEXT, Part, Skip
from i3dist.data.token_types import LARGEST_VOCABULARY
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from i3dist.errors import UserError

DEFAULT_VOCABULARY = 32_000
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token: the vocabulary before the first merge."""
DEFAULT_SAMPLE_MB = 64
"""Megabytes of text that the tokenizer is trained on."""

LONGEST_WORD = 10_000
"""Characters of the longest word in training."""

# Kinds of characters; the split pattern keeps a run of one kind together.
_KINDS = (r"\p{L}", r"\p{N}", r"\p{White_Space}", r"[^\p{L}\p{N}\p{White_Space}]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE and return its `tokenizer.json`.

    Special tokens take the first ids, in the order of `SPECIAL_TOKENS`. The same texts give the
    same bytes: the trainer counts pairs in parallel, but breaks ties by id. A vocabulary smaller
    than `vocab_size`, for lack of text, is reported.
    """
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(without_long_words(texts), trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        print(f"the text is too small for {vocab_size} vocabulary entries: there are {size}")
    return tokenizer.to_str(pretty=True).encode()


def without_long_words(texts: Iterable[str], longest: int = LONGEST_WORD) -> Iterator[str]:
    """The texts, cut where the split pattern would find a word of more than `longest` characters.

    The time of training grows with the square of a word's length.
    """
    # A longer word covers a whole window of `half` characters that starts at a multiple of `half`.
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


def sample_texts(
    parts: Sequence[Part],
    source: str,
    megabytes: int,
    *,
    evenly: bool = True,
    documents: Format = FORMATS[TEXT],
) -> Iterator[str]:
    """About so many megabytes of usable texts, an equal share from the start of each part.

    There are at most as many parts as megabytes, evenly spaced, because a part may be read as a
    whole for its first text. What a part lacks is taken from those after it. With `evenly` false
    the texts are the first ones of the source, as in older versions of this tool.

    Raises:
        UserError: there are none.
    """
    wanted = megabytes * 1_000_000
    skipped: Counter[str] = Counter()
    taken = 0
    chosen = shares_of(parts, megabytes) if evenly else [(part, 1) for part in parts]
    left = sum(shares for _, shares in chosen)
    for part, shares in chosen:
        goal = taken + -(-(wanted - taken) * shares // left) if evenly else wanted
        left -= shares
        for text in _usable_texts(part, documents, skipped):
            yield text.decode()
            taken += len(text)
            if taken >= goal:
                break
        if taken >= wanted:
            return
    if not taken and len(chosen) < len(parts):
        yield from sample_texts(parts, source, megabytes, evenly=False, documents=documents)
    elif not taken:
        raise no_usable_document(source, skipped)


def shares_of(parts: Sequence[Part], count: int) -> list[tuple[Part, int]]:
    """At most `count` parts of the sample, and how many equal shares of it each has.

    Of a mixture a source has shares by its size and weight.
    """
    if not any(part.share for part in parts):
        return [(part, 1) for part in evenly_spaced(parts, count)]
    sizes = [part.size * (part.share.weight if part.share else 1) or 1 for part in parts]
    ends = list(itertools.accumulate(sizes))
    marks = (ends[-1] * (2 * number + 1) / (2 * count) for number in range(count))
    hits = Counter(bisect.bisect(ends, mark) for mark in marks)
    return [(parts[place], shares) for place, shares in sorted(hits.items())]


def evenly_spaced(parts: Sequence[Part], count: int) -> Sequence[Part]:
    """So many of the parts, from the first on; all if there are fewer."""
    if len(parts) <= count:
        return parts
    return [parts[number * len(parts) // count] for number in range(count)]


def _usable_texts(part: Part, documents: Format, skipped: Counter[str]) -> Iterator[bytes]:
    for record in part.records():
        document = documents.usable(record.text)
        if isinstance(document, Skip):
            skipped[document.value] += 1
        else:
            yield documents.text(document)


def no_usable_document(source: str, skipped: Counter[str]) -> UserError:
    """The error for a source without text; it counts by reason what was skipped."""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    found = f"it holds {counts}" if counts else "it is empty"
    reasons = {Skip.WHERE.value, Skip.SHORT.value, Skip.LONG.value}
    other = ", or choose less strictly" if reasons & skipped.keys() else ""
    return UserError(f"{source} has no usable document ({found}): name another --source{other}")


def check_vocabulary(tokenizer: Tokenizer, wanted: int | None) -> None:
    """Check that a given tokenizer has `wanted` entries, and no more than a shard can tell apart.

    Raises:
        UserError: it does not.
    """
    if wanted is not None and tokenizer.vocab_size != wanted:
        raise UserError(
            f"{tokenizer.path} has a vocabulary of {tokenizer.vocab_size}, not of --vocab-size "
            f"{wanted}: omit --vocab-size, or name another --tokenizer"
        )
    if tokenizer.vocab_size > LARGEST_VOCABULARY:
        raise UserError(
            f"{tokenizer.path} has a vocabulary of {tokenizer.vocab_size}, and a token in a shard "
            f"can be one of {LARGEST_VOCABULARY} at most: name another --tokenizer"
        )
