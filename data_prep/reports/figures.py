"""The figures of a report, ready for a table or a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from data_prep.checks.stream import Stream
from data_prep.dropped import rows
from data_prep.progress import source_row
from data_prep.reports.index_statistics import HISTORY, Statistics, geometric, measure
from data_prep.reports.lookup import SplitReader
from data_prep.reports.samples import Example, ShardSample, examples, sample

TOP_DOMAINS = 20
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Figures:
    """Everything that a report of one split says."""

    reader: SplitReader
    statistics: Statistics
    sample: ShardSample
    examples: Sequence[Example]

    @classmethod
    def of(cls, folder: Path, split: str, seed: int) -> "Figures":
        """Read a split.

        Raises:
            UserError: it cannot be read.
        """
        reader = SplitReader(folder, split)
        stream = Stream.of(reader.folder, reader.manifest, reader.tokenizer)
        statistics = measure(stream)
        drawn = examples(reader, stream, statistics, seed)
        return cls(reader, statistics, sample(reader, seed), drawn)

    def totals(self) -> list[tuple[str, str, str]]:
        """How much the split holds: names, values, notes."""
        manifest, sample = self.reader.manifest, self.sample
        size = sum(shard.size for shard in manifest.shards) / 1e6
        part = f"sample of {sample.shards:,} of {sample.of:,} shards"
        if sample.shards == sample.of:
            part = "of all shards"
        learned = []
        if sample.learned is not None:
            learned = [("learned", f"{sample.learned:.1%}", f"of the tokens, {part}")]
        return [
            ("documents", f"{manifest.documents:,}", ""),
            ("tokens", f"{manifest.tokens:,}", ""),
            ("chunks", f"{manifest.chunks:,}", f"of {manifest.chunk_length:,} tokens"),
            ("shards", f"{len(manifest.shards):,}", f"{size:,.1f} MB"),
            ("vocabulary", f"{manifest.vocab_size:,}", "entries"),
            ("bytes per token", f"{sample.bytes_per_token:.3f}", part),
            *learned,
        ]

    def sources(self) -> list[tuple[str, str, str, str, str]] | None:
        """Rows below `SOURCE_HEADINGS`, of all splits together; None if there is one source."""
        found = self.reader.manifest.sources
        return None if found is None else [source_row(source) for source in found]

    def dropped(self) -> list[tuple[str, str, int]] | None:
        """What was left out before packing: (source, reason, documents); None if not recorded."""
        found = self.reader.manifest.dropped
        return None if found is None else rows(found)

    def dropped_in_words(self) -> str:
        """How much `dropped` is."""
        left_out = sum(count for _, _, count in self.dropped() or ())
        return f"{left_out:,} documents were left out. Splits of the same sources share this count."

    def lengths(self) -> list[tuple[str, str]]:
        """Quantiles of documents' lengths."""
        s = self.statistics
        rows = [(f"{share:.0%} have at most", f"{s.quantile(share):,}") for share in QUANTILES]
        mean = s.tokens / max(s.documents, 1)
        return [("mean", f"{mean:,.1f}"), *rows, ("longest", f"{s.longest:,}")]

    def chunks(self) -> list[tuple[str, int]]:
        """Documents by the number of chunks that they lie in."""
        edges, counts = geometric(self.statistics.chunks, per_octave=1)
        labels = [f"{a:,}" if b == a + 1 else f"{a:,} to {b - 1:,}" for a, b in pairwise(edges)]
        return list(zip(labels, counts, strict=True))

    def history(self) -> list[tuple[str, float]]:
        """Share of tokens by the number of chunks of history before them."""
        total = max(self.statistics.tokens, 1)
        labels = [*map(str, range(HISTORY)), f"{HISTORY} or more"]
        shares = (self.statistics.history / total).tolist()
        return list(zip(labels, shares, strict=True))

    def history_in_words(self) -> str:
        """What the shares of `history` mean."""
        none = self.history()[0][1]
        return (
            f"{1 - none:.1%} of the tokens have at least one earlier chunk of their own document "
            "in the same shard before their chunk: only these can gain from compressed history. "
            f"The other {none:.1%} stand in a document's, or a shard's, first chunk."
        )

    def domains(self) -> list[tuple[str, int, float]]:
        """The domains with most tokens: (name, tokens, share)."""
        total = max(self.statistics.tokens, 1)
        top = self.statistics.domains.top(TOP_DOMAINS)
        return [(name, tokens, tokens / total) for name, tokens in top]

    def domains_in_words(self) -> str:
        """How complete `domains` is."""
        found = self.statistics.domains
        if found.merged:
            return (
                "There are too many domains to count each: rare ones were put together on the "
                "way, so a figure may be too low."
            )
        number = len(found.tokens)
        counted = "There is 1 domain." if number == 1 else f"There are {number:,} domains."
        return f"{counted} Where a document has no URL, the first part of its name stands for it."
