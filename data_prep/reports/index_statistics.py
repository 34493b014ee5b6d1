"""Statistics of a split: from its index alone, in one pass and bounded memory.

Every figure here is exact, except for domains where there are very many (`Domains`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.checks.index_check import ROWS_AT_A_TIME, open_index
from data_prep.checks.index_rows import NUMBERS, Ints, Rows
from data_prep.checks.stream import Stream

HISTORY = 8
"""Chunks of history that i3-4096ctx sees."""
# Documents of so many tokens or more, or chunks, are counted together.
LONGEST, MOST_CHUNKS = 1 << 20, 1 << 12
MOST_DOMAINS = 1 << 18


@dataclass
class Domains:
    """Tokens by domain. Once there are too many domains, the smaller half is put together."""

    tokens: dict[str, int] = field(default_factory=dict)
    merged: int = 0  # tokens of domains that were put together

    def add(self, names: pa.Array, lengths: pa.Array) -> None:
        """Add documents."""
        table = pa.table({"name": names, "tokens": lengths})
        sums = table.group_by("name").aggregate([("tokens", "sum")])
        for name, tokens in zip(*(c.to_pylist() for c in sums.columns), strict=True):
            key, value = (name, tokens) if isinstance(name, str) else (tokens, name)
            self.tokens[key] = self.tokens.get(key, 0) + value
        if len(self.tokens) > MOST_DOMAINS:
            order = sorted(self.tokens, key=self.tokens.__getitem__, reverse=True)
            for name in order[MOST_DOMAINS // 2 :]:
                self.merged += self.tokens.pop(name)

    def top(self, count: int) -> list[tuple[str, int]]:
        """The domains with most tokens."""
        return sorted(self.tokens.items(), key=lambda item: (-item[1], item[0]))[:count]


@dataclass
class Statistics:
    """Counts over the documents of a split; a document's tokens include <BOS> and <EOS>.

    Attributes:
        lengths: [LONGEST + 1] documents by tokens; the last counts all that are longer.
        chunks: [MOST_CHUNKS + 1] documents by the chunks that they lie in.
        history: [HISTORY + 1] tokens by the chunks of history before them; the last counts more.
        longest: tokens of the longest document.
    """

    lengths: Ints = field(default_factory=lambda: np.zeros(LONGEST + 1, np.int64))
    chunks: Ints = field(default_factory=lambda: np.zeros(MOST_CHUNKS + 1, np.int64))
    history: Ints = field(default_factory=lambda: np.zeros(HISTORY + 1, np.int64))
    domains: Domains = field(default_factory=Domains)
    longest: int = 0

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.lengths.sum())

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.history.sum())

    def quantile(self, share: float) -> int:
        """The length that `share` of the documents do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.documents))


@dataclass
class Documents:
    """Whole documents: the place of the first piece, and all tokens and chunks; columns [D]."""

    number: Ints
    shard: Ints
    start: Ints  # token of the shard
    tokens: Ints
    chunks: Ints
    url: pa.Array


def measure(stream: Stream) -> Statistics:
    """The statistics of a split."""
    statistics = Statistics()
    for rows, documents in scan(stream):
        statistics.history += history_of(rows, stream.chunk_length)
        lengths, chunks = documents.tokens, documents.chunks
        statistics.lengths += np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)
        counts = np.minimum(chunks, MOST_CHUNKS)
        statistics.chunks += np.bincount(counts, minlength=MOST_CHUNKS + 1)
        statistics.longest = max(statistics.longest, int(lengths.max(initial=0)))
        statistics.domains.add(domains_of(documents.url), pa.array(lengths))
    return statistics


def scan(stream: Stream) -> Iterator[tuple[Rows, Documents]]:
    """The index in batches: its rows, and the documents that end in the batch."""
    rest: pa.RecordBatch | None = None
    row = 0
    columns = [*NUMBERS, "url"]
    for batch in open_index(stream.folder).iter_batches(ROWS_AT_A_TIME, columns=columns):
        new = Rows.of(row, batch)
        row += len(batch)
        joined = batch if rest is None else pa.concat_batches([rest, batch])
        rows = Rows.of(0, joined)
        last = int(np.flatnonzero(rows.piece == 0)[-1]) if (rows.piece == 0).any() else 0
        rest = joined.slice(last)
        yield new, _documents(stream, rows.part(0, last), joined.column("url").slice(0, last))
    if rest is not None:
        rows = Rows.of(0, rest)
        yield Rows.none(row), _documents(stream, rows, rest.column("url"))


def _documents(stream: Stream, rows: Rows, urls: pa.Array) -> Documents:
    begins = np.flatnonzero(rows.piece == 0)
    chunks = (rows.offset + rows.length - 1) // stream.chunk_length + 1

    def sums(column: Ints) -> Ints:
        return np.add.reduceat(column, begins) if len(begins) else np.empty(0, np.int64)

    return Documents(
        rows.document[begins],
        rows.shard[begins],
        (rows.chunk * stream.chunk_length + rows.offset)[begins],
        sums(rows.length),
        sums(chunks),
        urls.take(pa.array(begins)),
    )


def history_of(rows: Rows, chunk_length: int) -> Ints:
    """Tokens by the chunks of history before them, [HISTORY + 1].

    The tokens in a piece's first chunk have none: their document begins there, or the shard does.
    Those in its next chunk have one, and so on.
    """
    first = np.minimum(rows.length, chunk_length - rows.offset)
    counts = [int(first.sum())]
    rest = rows.length - first
    for _ in range(1, HISTORY):
        counts.append(int(np.minimum(rest, chunk_length).sum()))
        rest = np.maximum(rest - chunk_length, 0)
    return np.array([*counts, int(rest.sum())])


def domains_of(urls: pa.Array) -> pa.Array:
    """The host of each URL without "www."; of other names what stands before "#" or "/"."""
    host = r"^[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^/@?#]*@)?(?:www\.)?(?P<name>[^/:?#]+)"
    name = r"^(?P<name>[^#/]+)"
    found = [pc.struct_field(pc.extract_regex(urls, pattern), "name") for pattern in (host, name)]
    return pc.coalesce(*found, pa.scalar("(no URL)"))


def geometric(counts: NDArray[np.int64], per_octave: int = 2) -> tuple[list[int], list[int]]:
    """Counts by value, put together in bins that grow by a constant factor: (edges, counts)."""
    edges = sorted({round(2 ** (n / per_octave)) for n in range(per_octave * 21 + 1)})
    edges = [edge for edge in edges if edge < len(counts)] + [len(counts)]
    sums = np.concatenate(([0], np.cumsum(counts)))
    bins = np.diff(sums[edges]).tolist()
    while bins and bins[-1] == 0:
        bins.pop()
    skip = next((n for n, count in enumerate(bins) if count), 0)
    return edges[skip : len(bins) + 1], bins[skip:]
