"""A global shuffle in bounded memory: an external sort by hash.

Pass 1 (`Spiller`, in any number of processes) tokenizes a part of the source and writes *runs*:
Arrow files of documents sorted by a key, which is a hash of seed, position and text. Pass 2
(`in_order`) divides the range of keys into buckets, gathers each bucket from all runs, and sorts
it. So the order depends only on the seed and the source. Memory holds one run per process in pass
1, and one bucket in pass 2. 10 billion tokens take 20 GB of runs and about 300 buckets.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from data_prep.evidence import Piece, Saved
from data_prep.sources import Part, Record, Skip, usable_text
from i3dist.data.tokenizer import Tokenizer
from i3dist.files import write_whole, written_aside

HASH_END = 1 << 62
"""Hashes are smaller than this, so that they and the bounds of buckets fit into int64."""

RUN_TOKENS = 1 << 25
BUCKET_TOKENS = 1 << 25
_RUN_DOCUMENTS = 1 << 18
_SCHEMA = pa.schema(
    [
        ("high", pa.int64()),
        ("low", pa.int64()),
        ("split", pa.int64()),
        ("id", pa.string()),
        ("url", pa.string()),
        ("tokens", pa.large_list(pa.uint16())),
    ]
)


class Hashes(NamedTuple):
    """A document's key (`high`, `low`) decides its place, and `split` decides its split."""

    high: int
    low: int
    split: int


class Document(NamedTuple):
    """A tokenized document, without <BOS> and <EOS>."""

    hashes: Hashes
    id: str
    url: str
    tokens: NDArray[np.uint16]


class PartSummary(Saved):
    """The result of pass 1 for a part; `tokens` does not count <BOS> and <EOS>.

    `pieces` are the pieces of files that were read; a part that is not made of files has none.
    """

    runs: tuple[str, ...]
    documents: int
    tokens: int
    skipped: dict[str, int]
    smallest_split: int
    largest_split: int
    pieces: tuple[Piece, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read a summary; None if it is missing or damaged."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def hashes(text: bytes, position: str, seed: int) -> Hashes:
    """Hash a document. Equal texts get an equal `split`, so duplicates stay in one split."""
    salt = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=16, key=salt).digest()
    key = hashlib.blake2b(digest + position.encode(), digest_size=16, key=salt).digest()
    high, low, split = (int.from_bytes(b) % HASH_END for b in (key[:8], key[8:], digest[:8]))
    return Hashes(high, low, split)


def _table(run: Sequence[Document]) -> pa.Table:
    """The run sorted by key, as one chunk."""
    found, ids, urls, tokens = zip(*sorted(run, key=attrgetter("hashes")), strict=True)
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(tokens)))
    columns = [pa.array(column) for column in (*zip(*found, strict=True), ids, urls)]
    return pa.Table.from_arrays([*columns, lists], schema=_SCHEMA)


class _Records:
    """The records of a part, and once they are read, the pieces of files that they came from."""

    def __init__(self, part: Part) -> None:
        self._records: Any = part.records()
        self.pieces: tuple[Piece, ...] = ()

    def __iter__(self) -> Iterator[Record]:
        self.pieces = (yield from self._records) or ()


@dataclass(frozen=True)
class Spiller:
    """Pass 1: writes the runs of a part into `folder`, and calls `report` with counts of tokens."""

    tokenizer: Tokenizer
    folder: Path
    seed: int
    report: Callable[[int], None]

    def spill(self, part: Part, number: int) -> PartSummary:
        """Tokenize part `number` into runs, and write its summary last."""
        skipped: Counter[str] = Counter()
        names: list[str] = []
        documents = tokens = 0
        smallest, largest = HASH_END, -1
        records = _Records(part)
        for run in self._runs(records, skipped):
            names.append(f"part-{number:06d}-run-{len(names):06d}.arrow")
            _write_run(run, self.folder / names[-1])
            documents += len(run)
            tokens += sum(len(document.tokens) for document in run)
            found = [document.hashes.split for document in run]
            smallest, largest = min(smallest, *found), max(largest, *found)
        summary = PartSummary(
            runs=tuple(names),
            documents=documents,
            tokens=tokens,
            skipped=dict(skipped),
            smallest_split=smallest,
            largest_split=largest,
            pieces=records.pieces,
        )
        write_whole(summary_path(self.folder, number), summary.model_dump_json().encode())
        return summary

    def _runs(self, records: Iterable[Record], skipped: Counter[str]) -> Iterator[list[Document]]:
        run: list[Document] = []
        size = 0
        for record in records:
            text = usable_text(record.text)
            if isinstance(text, Skip):
                skipped[text.value] += 1
                continue
            tokens = self.tokenizer.encode_utf8(text).astype(np.uint16, copy=False)
            self.report(len(tokens))
            found = hashes(text, record.position, self.seed)
            run.append(Document(found, record.id, record.url, tokens))
            size += len(tokens)
            if size >= RUN_TOKENS or len(run) >= _RUN_DOCUMENTS:
                yield run
                run, size = [], 0
        if run:
            yield run


def summary_path(folder: Path, number: int) -> Path:
    """Path of the summary of part `number`, which exists once the part is finished."""
    return folder / f"part-{number:06d}.json"


def in_order(
    runs: Sequence[Path], tokens: int, splits: range
) -> Iterator[tuple[str, str, NDArray[np.uint16]]]:
    """(id, url, tokens) of all documents of `runs` whose split hash lies in `splits`, by key.

    `tokens` is about the number of tokens in the runs. It decides the number of buckets.
    """
    buckets = max(1, -(-tokens // BUCKET_TOKENS))
    for bucket in range(buckets):
        bounds = [HASH_END * b // buckets for b in (bucket, bucket + 1)]
        tables = [_rows(run, bounds, splits) for run in runs]
        yield from _sorted(pa.concat_tables(tables).combine_chunks())


def _rows(run: Path, bounds: list[int], splits: range) -> pa.Table:
    with pa.memory_map(os.fsencode(run)) as file:
        table = pa.ipc.open_file(file).read_all()
        first, last = np.searchsorted(table["high"].to_numpy(), bounds)
        rows = table.slice(first, last - first)
        split = rows["split"].to_numpy()
        return rows.filter(pa.array((split >= splits.start) & (split < splits.stop)))


def _sorted(table: pa.Table) -> Iterator[tuple[str, str, NDArray[np.uint16]]]:
    if not len(table):
        return
    order = np.lexsort((table["low"].to_numpy(), table["high"].to_numpy()))
    tokens = table["tokens"].chunk(0)
    offsets, values = tokens.offsets.to_numpy(), tokens.values.to_numpy()
    ids, urls = table["id"], table["url"]
    for row in order:
        ends = offsets[row], offsets[row + 1]
        yield ids[row].as_py(), urls[row].as_py(), values[slice(*ends)]


def _write_run(run: Sequence[Document], path: Path) -> None:
    with (
        written_aside(path) as partial,
        pa.OSFile(os.fsencode(partial), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
    ):
        writer.write_table(_table(run))
