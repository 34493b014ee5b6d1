"""What a run will make and take, estimated from a sample of the source."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from data_prep.choice import ALL, Choice
from data_prep.formats import FORMATS, Format
from data_prep.merge import MAX_RUNS
from data_prep.options import CORES
from data_prep.output import OutputSettings
from data_prep.pack import chunks_per_shard
from data_prep.ranges import useful_workers
from data_prep.sources import TEXT, Part, Skip
from i3dist.data.manifest import archive_size
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError

FORECAST_BYTES = 1 << 26
"""Smaller sources are made sooner than estimated."""

BYTES_PER_TOKEN = 4.0
"""Where there is no tokenizer yet."""

_PARTS, _SECONDS_PER_PART, _BYTES_PER_PART = 3, 2.0, 1 << 20
_PACK_RATE, _MERGE_RATE = 40e6, 100e6  # tokens per second of a process, docs/performance.md
_INDEX_RATE = 2e6  # documents per second, of the one process that writes the index
_RUN_TOKENS = 15e6  # where parts are large
_BYTES_PER_DOCUMENT = 150  # of a run and of the index: hashes, id, url
_BYTES_PER_HASH = 52  # of --deduplicate: beside the run, and sorted
_TRUSTED = 0.8  # the share of an estimate that is surely needed


@dataclass(frozen=True)
class Sample:
    """What a source holds, about; `seconds` are of one process, None where nothing was measured."""

    parts: int
    tokens: float
    documents: float
    seconds: float | None


@dataclass
class _Measured:
    """Sums over the parts of a sample."""

    format: Format
    parts: int = 0
    size: int = 0
    text: int = 0
    documents: int = 0
    tokenized: int = 0
    """Bytes of text that were tokenized, and the documents, and what the choice keeps of these."""
    tokenized_documents: int = 0
    kept_documents: int = 0
    tokens: int = 0
    reading: float = 0.0
    tokenizing: float = 0.0

    def add(self, part: Part, tokenizer: Tokenizer | None, choice: Choice) -> None:
        """Read a part for some seconds, and tokenize its first texts."""
        start, spent, text_bytes, documents, excluded = time.monotonic(), 0.0, 0, 0, 0
        is_whole = True
        for document in self._documents(part):
            begin = time.monotonic()
            if document is None:
                excluded += 1
            else:
                text_bytes += len(document)
                documents += 1
                if tokenizer and self.tokenized < (self.parts + 1) * _BYTES_PER_PART:
                    self._tokenize(document, part, tokenizer, choice)
            now = time.monotonic()
            spent += now - begin
            if now - start > _SECONDS_PER_PART:
                is_whole = False
                break
        self.parts += 1
        self.reading += time.monotonic() - start - spent
        self.tokenizing += spent
        self.text += text_bytes
        self.documents += documents
        # Of a part that takes too long, text is taken to be all that there is, and excluded texts
        # to be as long as others.
        in_time = text_bytes * (documents + excluded) // documents if documents else part.size
        self.size += part.size if is_whole else in_time

    def _tokenize(self, text: bytes, part: Part, tokenizer: Tokenizer, choice: Choice) -> None:
        count = len(self.format.encode(tokenizer, text))
        self.tokenized += len(text)
        self.tokenized_documents += 1
        if not choice.skip(part, count):
            self.kept_documents += 1
            self.tokens += count

    def _documents(self, part: Part) -> Iterator[bytes | None]:
        """The usable documents of a part; None for one that --where excludes."""
        for record in part.records():
            document = self.format.usable(record.text)
            if not isinstance(document, Skip):
                yield document
            elif document is Skip.WHERE:
                yield None


def measure(
    parts: Sequence[Part],
    tokenizer: Tokenizer | None,
    documents: Format = FORMATS[TEXT],
    choice: Choice = ALL,
) -> Sample | None:
    """Estimate a source from a few of its parts.

    None where parts do not know their sizes, or the sample has no text.
    """
    total = sum(part.size * (part.share.weight if part.share else 1) for part in parts)
    if not total:
        return None
    count = min(_PARTS, len(parts))
    found = _Measured(documents)
    for number in range(count):
        found.add(parts[len(parts) * (2 * number + 1) // (2 * count)], tokenizer, choice)
    if not found.text or not found.size:
        return None
    scale = total / found.size
    if not found.tokenized:
        tokens = found.text * scale / BYTES_PER_TOKEN
        return Sample(len(parts), tokens, found.documents * scale, None)
    tokens = found.text * scale * found.tokens / found.tokenized
    seconds = scale * (found.reading + found.tokenizing * found.text / found.tokenized)
    kept = found.documents * scale * found.kept_documents / found.tokenized_documents
    return Sample(len(parts), tokens, kept, seconds)


class Times(NamedTuple):
    """Seconds that the steps of a run take, about."""

    tokenizing: float
    packing: float
    finishing: float

    @classmethod
    def of(cls, sample: Sample, tokens: int, processes: int, nodes: int) -> Self | None:
        """The times with so many processes on each node; None if the sample was not tokenized."""
        if sample.seconds is None:
            return None
        packers = nodes * useful_workers(tokens // nodes, processes)
        packing = tokens / _PACK_RATE
        if _is_merged(tokens):
            packing += tokens / _MERGE_RATE
        return cls(
            sample.seconds / (processes * nodes),
            packing / packers,
            sample.documents / _INDEX_RATE,
        )

    @property
    def all(self) -> float:
        """Of all steps."""
        return sum(self)


@dataclass(frozen=True)
class Forecast:
    """What a run makes and takes, about."""

    tokens: int
    shards: int
    chunks_per_shard: int
    output_bytes: int
    run_bytes: int
    nodes: int
    processes: int
    """Of each node."""
    times: Times | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, sample: Sample, settings: OutputSettings, workers: int, nodes: int = 1) -> Self:
        """The forecast for these settings and this many workers on each of so many nodes."""
        tokens = round(sample.tokens + 2 * sample.documents)
        labels = round(sample.documents * _BYTES_PER_DOCUMENT)
        hashed = round(sample.documents * _BYTES_PER_HASH) if settings.deduplicate else 0
        chunks = settings.chunks_per_shard or chunks_per_shard(tokens, settings.chunk_length)
        shards = -(-tokens // (chunks * settings.chunk_length))
        token_bytes = settings.token_type(settings.vocab_size).dtype.itemsize
        processes = max(1, min(workers, CORES, -(-sample.parts // nodes)))
        return cls(
            tokens=tokens,
            shards=shards,
            chunks_per_shard=chunks,
            output_bytes=tokens
            * archive_size(chunks, settings.chunk_length, token_bytes)
            // (chunks * settings.chunk_length)
            + labels,
            run_bytes=tokens * token_bytes + labels + hashed,
            nodes=nodes,
            processes=processes,
            times=Times.of(sample, tokens, processes, nodes),
            notes=tuple(_notes(sample, settings)),
        )

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk while the run works; several nodes hold merged runs until the end."""
        copies = 2 if self.nodes > 1 and _is_merged(self.tokens) else 1
        return self.output_bytes + copies * self.run_bytes

    def lines(self, folder: Path, free: int) -> list[str]:
        """What to tell; `free` bytes are free where `folder` will be."""
        made = f"about {_short(self.tokens)} tokens, {self.shards:,} shards of "
        made += f"{self.chunks_per_shard:,} chunks, {_short(self.output_bytes)}B"
        disk = f"about {_short(self.disk_bytes)}B of disk while it works; "
        disk += f"{_short(free)}B are free at {folder}"
        return [made, disk, self._took(), *self.notes]

    def _took(self) -> str:
        times = self.times
        if times is None:
            return f"{BYTES_PER_TOKEN:.0f} bytes a token assumed: there is no tokenizer to measure"
        processes = f"{self.processes} process" + "es" * (self.processes > 1)
        if self.nodes == 1:
            took = f"about {_duration(times.all)} in {processes}"
        else:
            took = f"about {_duration(times.tokenizing)} to tokenize and "
            took += f"{_duration(times.packing)} to pack on {self.nodes:,} machines with "
            took += f"{processes} each, and {_duration(times.finishing)} to finish"
        return f"{took}, as a sample was tokenized"

    def check(self, folder: Path, free: int, most_shards: int) -> None:
        """Refuse what surely exceeds a limit or the disk.

        Raises:
            UserError: it does.
        """
        if self.shards * _TRUSTED > most_shards:
            raise UserError(
                f"about {self.shards:,} shards, more than {most_shards:,}: raise --chunks-per-shard"
            )
        if self.disk_bytes * _TRUSTED > free:
            raise UserError(
                f"about {_short(self.disk_bytes)}B of disk are needed at {folder}, and "
                f"{_short(free)}B are free: free some, or choose another --out"
            )


def _notes(sample: Sample, settings: OutputSettings) -> Iterator[str]:
    """What the estimate leaves out."""
    if settings.deduplicate:
        yield "duplicates are counted in: how many there are is not known beforehand"
    if sample.seconds is None and (settings.min_tokens or settings.max_tokens):
        yield "documents that are too short or too long are counted in: there is no tokenizer yet"


def _is_merged(tokens: int) -> bool:
    """Whether so many tokens are in so many runs that these are merged before they are packed."""
    return tokens > MAX_RUNS * _RUN_TOKENS


def _short(number: float) -> str:
    """A number with one decimal place and k, M, G or T."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} T"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
