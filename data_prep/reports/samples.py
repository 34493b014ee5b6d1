"""What needs the text itself: a sample of a split's shards, and examples."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.checks.index_rows import Ints
from data_prep.checks.stream import Stream
from data_prep.reports.index_statistics import Statistics, scan
from data_prep.reports.lookup import SplitReader

SAMPLED_SHARDS = 32
EXAMPLES = 2  # of each length
SHOWN = 280  # characters at the beginning, and at the end
# Name, and the shares of documents between whose lengths the examples lie.
BANDS = (("short", 0.0, 0.1), ("median", 0.45, 0.55), ("long", 0.95, 1.0))


class ShardSample(NamedTuple):
    """What the sampled shards hold."""

    bytes_per_token: float  # UTF-8 bytes of text for each token of text
    learned: float | None  # share of all tokens but <PAD> that are learned; None without a mask
    shards: int
    of: int


class Example(NamedTuple):
    """A document, shortened to its beginning and end."""

    kind: str
    document: int
    id: str
    url: str
    tokens: int
    begin: str
    end: str


def sample(reader: SplitReader, seed: int) -> ShardSample:
    """Read at most `SAMPLED_SHARDS` shards. Special tokens are no text."""
    total = len(reader.manifest.shards)
    count = min(total, SAMPLED_SHARDS)
    chosen = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
    sizes = reader.tokenizer.token_bytes()
    size = tokens = learned = everything = 0
    for shard in chosen.tolist():
        mask = reader.read(shard).learned
        learned += 0 if mask is None else int(mask.sum())
        everything += reader.manifest.tokens_in(shard)
        counts = np.bincount(reader.shard(shard).reshape(-1), minlength=len(sizes))
        size += int(counts @ sizes)
        tokens += int(counts[sizes > 0].sum())
    has_mask = reader.manifest.token_type.has_mask
    share = learned / everything if has_mask else None
    return ShardSample(size / max(tokens, 1), share, count, total)


def examples(
    reader: SplitReader, stream: Stream, statistics: Statistics, seed: int
) -> list[Example]:
    """`EXAMPLES` documents of each band, drawn at random: those with the smallest hashes."""
    bounds = [(statistics.quantile(low), statistics.quantile(high)) for _, low, high in BANDS]
    drawn: list[list[tuple[int, int]]] = [[] for _ in BANDS]
    for _, documents in scan(stream):
        keys = _hashes(documents.number, seed)
        for kept, (low, high) in zip(drawn, bounds, strict=True):
            inside = np.flatnonzero((documents.tokens >= low) & (documents.tokens <= high))
            best = inside[np.argsort(keys[inside])[:EXAMPLES]]
            kept += zip(keys[best].tolist(), documents.number[best].tolist(), strict=True)
            kept.sort()
            del kept[EXAMPLES:]
    return [
        _example(reader, kind, number)
        for (kind, _, _), kept in zip(BANDS, drawn, strict=True)
        for _, number in kept
    ]


def _hashes(numbers: Ints, seed: int) -> NDArray[np.uint64]:
    """Splitmix64 of document numbers: an order at random that needs no memory."""
    x = numbers.astype(np.uint64) + np.uint64(seed % (1 << 64))
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _example(reader: SplitReader, kind: str, number: int) -> Example:
    (pieces,) = reader.documents(f"#{number}")
    # A token has one byte or more, so these hold enough characters in nearly all scripts.
    first, last = reader.tokens(pieces[0])[: 4 * SHOWN], reader.tokens(pieces[-1])[-4 * SHOWN :]
    tokens = sum(piece.length for piece in pieces)
    begin, end = reader.decode(first), reader.decode(last)
    if tokens <= len(first) and len(begin) <= 2 * SHOWN:
        end = ""
    else:
        begin, end = begin[:SHOWN], end[-SHOWN:]
    return Example(kind, number, pieces[0].id, pieces[0].url, tokens, begin, end)
