"""What a run will make and take, estimated from a sample of the source."""

import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.choice import ALL, Choice
from data_prep.formats import FORMATS, Format
from data_prep.merge import MAX_RUNS
from data_prep.options import CORES
from data_prep.output_settings import OutputSettings
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

_PLACES, _FEWEST_PARTS = 32, 3  # of the source that are looked at; at least so many parts
_SECONDS = 6.0
_BYTES_PER_PART = 1 << 18  # tokenized in any case
_GOLDEN = (5**0.5 - 1) / 2
_LEAST_ERROR = 0.02
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
    error: float | None = None
    """By what share tokens are off at most, in 19 of 20 cases; None if that is not known."""
    is_whole: bool = True
    """Whether each part that was looked at was read as a whole."""


@dataclass
class _Look:
    """What was seen of a part in a few seconds."""

    part: Part
    is_whole: bool = True
    text: int = 0
    documents: int = 0
    excluded: int = 0
    """Documents that do not meet --where."""
    tokenized: int = 0
    """Bytes of text that were tokenized, and the documents, and what the choice keeps of these."""
    tokenized_documents: int = 0
    kept_documents: int = 0
    tokens: int = 0
    tokenizing: float = 0.0
    elapsed: float = 0.0

    def read(
        self, documents: Format, tokenizer: Tokenizer | None, choice: Choice, seconds: float
    ) -> None:
        """Read the part for so many seconds, half of which tokenize texts from all over it."""
        start = time.monotonic()
        for record in self.part.records():
            document = documents.usable(record.text)
            if not isinstance(document, Skip):
                self.text += len(document)
                self.documents += 1
                reading = time.monotonic() - start - self.tokenizing
                if tokenizer and (self.tokenizing < reading or self.tokenized < _BYTES_PER_PART):
                    self._tokenize(document, documents, tokenizer, choice)
            elif document is Skip.WHERE:
                self.excluded += 1
            if time.monotonic() - start > seconds:
                self.is_whole = False
                break
        self.elapsed = time.monotonic() - start

    def _tokenize(
        self, document: bytes, documents: Format, tokenizer: Tokenizer, choice: Choice
    ) -> None:
        start = time.monotonic()
        found = documents.encode(tokenizer, document)
        count = 0 if isinstance(found, Skip) else len(found)
        self.tokenizing += time.monotonic() - start
        self.tokenized += len(document)
        self.tokenized_documents += 1
        if count and not choice.skip(self.part, count):
            self.kept_documents += 1
            self.tokens += count

    def of_source(self, total: float) -> list[float]:
        """Tokens, documents and seconds of a source of `total` bytes like this."""
        if not self.documents:
            return [0.0, 0.0, 0.0]
        size: float = self.part.size
        if not self.is_whole:
            # Text is taken to be all that there is, and excluded texts to be as long as others.
            size = min(size, self.text * (self.documents + self.excluded) / self.documents)
        scale = total / size
        if not self.tokenized:
            return [scale * self.text / BYTES_PER_TOKEN, scale * self.documents, 0.0]
        kept = self.kept_documents / self.tokenized_documents
        share = self.text / self.tokenized
        seconds = self.elapsed - self.tokenizing + self.tokenizing * share
        return [scale * self.tokens * share, scale * self.documents * kept, scale * seconds]


def measure(
    parts: Sequence[Part],
    tokenizer: Tokenizer | None,
    documents: Format = FORMATS[TEXT],
    choice: Choice = ALL,
) -> Sample | None:
    """Estimate a source from some of its parts.

    None where parts do not know their sizes, or the sample has no text.
    """
    ends = list(accumulate(part.size * (part.share.weight if part.share else 1) for part in parts))
    if not ends or not ends[-1]:
        return None
    start = time.monotonic()
    looks: list[_Look] = []
    hits: list[int] = []
    for number, count in _places(ends):
        if len(looks) >= _FEWEST_PARTS and time.monotonic() - start > _SECONDS:
            break
        looks.append(_Look(parts[number]))
        looks[-1].read(documents, tokenizer, choice, _SECONDS / min(len(parts), _FEWEST_PARTS))
        hits.append(count)
    if not any(look.documents for look in looks):
        return None
    found = np.array([look.of_source(ends[-1]) for look in looks])
    tokens, kept, seconds = np.average(found, axis=0, weights=hits).tolist()
    is_whole = all(look.is_whole for look in looks)
    if not tokenizer:
        return Sample(len(parts), tokens, kept, None, is_whole=is_whole)
    error = None
    if is_whole and len(looks) == len(parts):
        error = _LEAST_ERROR
    elif is_whole and len(looks) > 1 and tokens:
        error = _LEAST_ERROR + _error(found[:, 0], np.array(hits))
    return Sample(len(parts), tokens, kept, seconds, error, is_whole)


def _places(ends: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Which parts to look at, and how many of `_PLACES` even places of the source lie in each.

    `ends` are the sums of the parts' sizes. However many are looked at, they are spread evenly.
    """
    marks = (ends[-1] * (2 * number + 1) / (2 * _PLACES) for number in range(_PLACES))
    hits = sorted(Counter(bisect(ends, mark) for mark in marks).items())
    yield from (hits[n] for n in sorted(range(len(hits)), key=lambda n: n * _GOLDEN % 1))


def _error(found: NDArray[np.float64], hits: NDArray[np.int64]) -> float:
    """The error of a mean, as a share of it, that is exceeded in one of 20 cases, about."""
    mean = np.average(found, weights=hits)
    variance = np.average((found - mean) ** 2, weights=hits) / (len(found) - 1)
    student = 2 + 9 / (len(found) - 1) ** 2  # about the quantile of Student's distribution
    return float(student * np.sqrt(variance) / mean)


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
    error: float | None = None
    """See `Sample`."""
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
            error=sample.error,
            notes=tuple(_notes(sample, settings)),
        )

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk while the run works; several nodes hold merged runs until the end."""
        copies = 2 if self.nodes > 1 and _is_merged(self.tokens) else 1
        return self.output_bytes + copies * self.run_bytes

    def lines(self, folder: Path, free: int) -> list[str]:
        """What to tell; `free` bytes are free where `folder` will be."""
        error = "" if self.error is None else f" (± {self.error:.0%})"
        made = f"about {_short(self.tokens)} tokens{error}, {self.shards:,} shards of "
        made += f"{self.chunks_per_shard:,} chunks, {_short(self.output_bytes)}B"
        disk = f"about {_short(self.disk_bytes)}B of disk while it works; "
        disk += f"{_short(free)}B are free at {folder}"
        return [made, disk, self._took(), *self.notes]

    @property
    def _trusted(self) -> float:
        return min(_TRUSTED, 1 - min(self.error or 0, 1))

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
        if self.shards * self._trusted > most_shards:
            raise UserError(
                f"about {self.shards:,} shards, more than {most_shards:,}: raise --chunks-per-shard"
            )
        if self.disk_bytes * self._trusted > free:
            raise UserError(
                f"about {_short(self.disk_bytes)}B of disk are needed at {folder}, and "
                f"{_short(free)}B are free: free some, or choose another --out"
            )


def _notes(sample: Sample, settings: OutputSettings) -> Iterator[str]:
    """What the estimate leaves out."""
    if not sample.is_whole:
        yield (
            "parts of the sample could not be read to their end in time: if their text is "
            "compressed or repetitive, there are more tokens than this"
        )
    if not sample.tokens:
        yield "none of the documents in the sample is kept"
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
