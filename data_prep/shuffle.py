"""Pass 1 of a global shuffle in bounded memory: an external sort by hash.

`Spiller`, in any number of processes, tokenizes a part of the source and writes *runs*: Arrow files
of documents sorted by a key, which is a hash of seed, position and text. Pass 2 divides the keys
into ranges, gathers each range from all runs, and packs it (`data_prep/ranges.py`). So the order
depends only on the seed and the source. Memory holds one run per process. A run's tokens are framed
(`<BOS> document <EOS>`): they are a piece of the stream as it stands. 10 billion tokens take about
21 GB of runs.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.choice import ALL, Choice
from data_prep.evidence import Piece, Saved
from data_prep.sources import Part, Record, Skip, usable_text
from data_prep.text_hash import text_hash, write_hashes
from i3dist.data.tokenizer import Tokenizer
from i3dist.files import write_whole, written_aside

HASH_END = 1 << 62
"""Hashes are smaller than this, so that they and the bounds of ranges fit into int64."""

HALF = HASH_END // 2
"""Where sources decide which documents are for validation, those have split hashes below this."""

RUN_TOKENS = 1 << 25
_RUN_DOCUMENTS = 1 << 18
RUN_SCHEMA = pa.schema(
    [
        ("high", pa.int64()),
        ("low", pa.int64()),
        ("split", pa.int64()),
        ("id", pa.string()),
        ("url", pa.string()),
        # uint16. A list would do as well, but pyarrow (25.0) takes bytes three times as fast.
        ("tokens", pa.large_binary()),
    ]
)


class Document(NamedTuple):
    """A tokenized document, without <BOS> and <EOS>, and its `hashes`.

    `text_hash` and `place`, its number in the part, serve to find duplicates.
    """

    hashes: bytes
    id: str
    url: str
    tokens: NDArray[np.uint16]
    text_hash: bytes = b""
    place: int = 0


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


def hashes(text: bytes, position: str, seed: int) -> bytes:
    """The three hashes of a document, 8 bytes each; `hash_columns` makes numbers of them.

    The first two are its key, which decides its place. The third decides its split. Equal texts
    have equal third hashes, so duplicates stay in one split.
    """
    salt = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=16, key=salt).digest()
    key = hashlib.blake2b(digest + position.encode(), digest_size=16, key=salt).digest()
    return key + digest[:8]


def in_half(found: bytes, is_validation: bool) -> bytes:
    """The results of `hashes` with a split below `HALF`, or from there on."""
    split = int.from_bytes(found[16:]) % HALF
    return found[:16] + (split if is_validation else HALF + split).to_bytes(8)


def hash_columns(found: Sequence[bytes]) -> NDArray[np.int64]:
    """The results of `hashes` as numbers below `HASH_END`: int64 [3, N] (high, low, split)."""
    numbers = np.frombuffer(b"".join(found), ">u8").reshape(-1, 3).T
    return (numbers & np.uint64(HASH_END - 1)).astype(np.int64)


def sorted_by_key(run: Sequence[Document]) -> list[Document]:
    """The documents of a run in the order of their keys."""
    columns = hash_columns([document.hashes for document in run])
    return [run[place] for place in np.lexsort(columns[::-1])]


def run_table(run: Sequence[Document], bos_id: int, eos_id: int) -> pa.Table:
    """The documents of a run, framed and sorted by key, as one chunk."""
    columns = hash_columns([document.hashes for document in run])
    order = np.lexsort(columns[::-1])
    documents = [run[place] for place in order]
    offsets = np.cumsum([0, *(len(document.tokens) + 2 for document in documents)], dtype=np.int64)
    bounds = offsets.tolist()
    values = np.empty(bounds[-1], np.uint16)
    for start, stop, document in zip(bounds, bounds[1:], documents, strict=False):
        values[start + 1 : stop - 1] = document.tokens
    values[offsets[:-1]], values[offsets[1:] - 1] = bos_id, eos_id
    arrays = [
        *map(pa.array, columns[:, order]),
        pa.array([document.id for document in documents], pa.string()),
        pa.array([document.url for document in documents], pa.string()),
        pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(run), [None, pa.py_buffer(2 * offsets), pa.py_buffer(values)]
        ),
    ]
    return pa.Table.from_arrays(arrays, schema=RUN_SCHEMA)


@dataclass(frozen=True)
class Spiller:
    """Pass 1: writes the runs of a part into `folder`, and calls `report` with counts of tokens."""

    tokenizer: Tokenizer
    folder: Path
    seed: int
    report: Callable[[int], None]
    choice: Choice = ALL

    def spill(self, part: Part, number: int) -> PartSummary:
        """Tokenize part `number` into runs, and write its summary last."""
        skipped: Counter[str] = Counter()
        names: list[str] = []
        documents = tokens = 0
        smallest, largest = HASH_END, -1
        pieces: list[Piece] = []
        for run in self._runs(part, _records(part, pieces), skipped):
            names.append(f"part-{number:06d}-run-{len(names):06d}.arrow")
            if self.choice.deduplicate:
                run = sorted_by_key(run)
                found, places = [d.text_hash for d in run], [d.place for d in run]
                write_hashes(found, places, self.folder / names[-1])
            table = run_table(run, self.tokenizer.bos_id, self.tokenizer.eos_id)
            write_run(table, self.folder / names[-1])
            documents += len(run)
            tokens += sum(len(document.tokens) for document in run)
            splits = table["split"].to_numpy()
            smallest, largest = min(smallest, int(splits.min())), max(largest, int(splits.max()))
        summary = PartSummary(
            runs=tuple(names),
            documents=documents,
            tokens=tokens,
            skipped=dict(skipped),
            smallest_split=smallest,
            largest_split=largest,
            pieces=tuple(pieces),
        )
        write_whole(summary_path(self.folder, number), summary.model_dump_json().encode())
        return summary

    def _runs(
        self, part: Part, records: Iterable[Record], skipped: Counter[str]
    ) -> Iterator[list[Document]]:
        run: list[Document] = []
        size = 0
        for place, record in enumerate(records):
            text = usable_text(record.text)
            if isinstance(text, Skip):
                skipped[text.value] += 1
                continue
            tokens = self.tokenizer.encode_utf8(text).astype(np.uint16, copy=False)
            self.report(len(tokens))
            if skip := self.choice.skip(part, len(tokens)):
                skipped[skip.value] += 1
                continue
            found = hashes(text, record.position, self.seed)
            if part.is_validation is not None:
                found = in_half(found, part.is_validation)
            same = text_hash(text) if self.choice.deduplicate else b""
            run.append(Document(found, record.id, record.url, tokens, same, place))
            size += len(tokens)
            if size >= RUN_TOKENS or len(run) >= _RUN_DOCUMENTS:
                yield run
                run, size = [], 0
        if run:
            yield run


def _records(part: Part, pieces: list[Piece]) -> Iterator[Record]:
    """The records of a part; at the end the pieces of files that were read join `pieces`."""
    read: Any = part.records()
    pieces.extend((yield from read) or ())


def summary_path(folder: Path, number: int) -> Path:
    """Path of the summary of part `number`, which exists once the part is finished."""
    return folder / f"part-{number:06d}.json"


def write_run(table: pa.Table, path: Path) -> None:
    """Write a run atomically, as one record batch."""
    with (
        written_aside(path) as partial,
        pa.OSFile(os.fsencode(partial), "wb") as file,
        pa.ipc.new_file(file, RUN_SCHEMA) as writer,
    ):
        writer.write_batch(table.to_batches()[0])
