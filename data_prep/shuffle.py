"""Pass 1 of a global shuffle in bounded memory: an external sort by hash.

`Spiller`, in any number of processes, tokenizes a part of the source and writes *runs*: Arrow files
of documents sorted by a key, which is a hash of seed, position and text. Pass 2 divides the keys
into ranges, gathers each range from all runs, and packs it (`data_prep/ranges.py`). So the order
depends only on the seed and the source. Memory holds one run per process. A run's tokens are framed
(`<BOS> document <EOS>`): they are a piece of the stream as it stands. 10 billion tokens take about
21 GB of runs.
"""

import hashlib
import itertools
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.choice import ALL, Choice
from data_prep.evidence import Piece, Saved
from data_prep.formats import FORMATS, Format
from data_prep.sources import TEXT, Part, Record, Share, Skip
from data_prep.text_hash import text_hash, write_hashes
from i3dist.data.token_types import UINT16, Stored
from i3dist.data.tokenizer import Tokenizer
from i3dist.files import write_whole, written_aside
from i3dist.heap import keep_no_large_blocks

HASH_END = 1 << 62
"""Hashes are smaller than this, so that they and the bounds of ranges fit into int64."""

HALF = HASH_END // 2
"""Where sources decide which documents are for validation, those have split hashes below this."""

RUN_TOKENS = 1 << 25
_RUN_DOCUMENTS = 1 << 18
_MOST_IN_MEMORY = 1 << 28
"""Bytes of a run's tokens that are framed in memory. Only a large document makes a larger run."""
_DTYPE = b"dtype"
RUN_SCHEMA = pa.schema(
    [
        ("high", pa.int64()),
        ("low", pa.int64()),
        ("split", pa.int64()),
        ("id", pa.string()),
        ("url", pa.string()),
        # As shards store them. A list would do as well, but pyarrow (25.0) takes bytes three times
        # as fast.
        ("tokens", pa.large_binary()),
    ]
)
"""Of a run whose tokens are uint16; that of others names their type in its metadata."""


class Document(NamedTuple):
    """A tokenized document, without <BOS> and <EOS>, and its `hashes`.

    Its tokens are as shards store them. `text_hash` and `place`, its number in the part, serve to
    find duplicates.
    """

    hashes: bytes
    id: str
    url: str
    tokens: Stored
    text_hash: bytes = b""
    place: int = 0


class PartSummary(Saved):
    """The result of pass 1 for a part; `tokens` does not count <BOS> and <EOS>.

    `pieces` are the pieces of files that were read; a part that is not made of files has none.
    `sizes` are those of the runs in bytes; older versions kept none.
    """

    runs: tuple[str, ...]
    documents: int
    tokens: int
    skipped: dict[str, int]
    smallest_split: int
    largest_split: int
    pieces: tuple[Piece, ...] = ()
    usable: int = 0
    """Documents that were read and not skipped, whether they were taken, and how often, or not."""
    identity: str = ""
    """The part's."""
    sizes: tuple[int, ...] = ()

    def is_whole(self, folder: Path) -> bool:
        """Whether the runs are there, each of its size."""
        try:
            found = [(folder / name).stat().st_size for name in self.runs]
        except FileNotFoundError:
            return False
        return not self.sizes or found == list(self.sizes)


def hashes(text: bytes, position: str, seed: int) -> bytes:
    """The three hashes of a document, 8 bytes each; `hash_columns` makes numbers of them.

    The first two are its key, which decides its place. The third decides its split. Equal texts
    have equal third hashes, so duplicates stay in one split.
    """
    salt = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=16, key=salt).digest()
    key = hashlib.blake2b(digest + position.encode(), digest_size=16, key=salt).digest()
    return key + digest[:8]


def copies(
    text: bytes, position: str, seed: int, share: Share | None, same: bytes = b""
) -> list[bytes]:
    """The hashes of each copy of a document that is taken: one without a `share`.

    Whether a document is taken once more than the whole part of the weight says follows from a
    hash that depends on nothing else, so that it says nothing about the document's place. Where
    duplicates are left out, it is one of their `same` hash: all of them are taken, or none. So the
    first stays, and the weight is the share of the texts that stay.
    """
    if share is None:
        return [hashes(text, position, seed)]
    place = f"{share.source}\0{position}" if share.source else position
    first = hashes(text, place, seed)
    drawn_by = hashes(same, str(share.source), seed) if same else first
    drawn = hashlib.blake2b(drawn_by, digest_size=8, person=b"share").digest()
    count = int(share.weight) + (int.from_bytes(drawn) < share.weight % 1 * 2**64)
    more = (hashes(text, f"{place}\0{number}", seed) for number in range(1, count))
    return [first, *more] if count else []


def in_half(found: bytes, is_validation: bool) -> bytes:
    """The results of `hashes` with a split below `HALF`, or from there on."""
    split = int.from_bytes(found[16:]) % HALF
    return found[:16] + (split if is_validation else HALF + split).to_bytes(8)


def hash_columns(found: Sequence[bytes]) -> NDArray[np.int64]:
    """The results of `hashes` as numbers below `HASH_END`: int64 [3, N] (high, low, split)."""
    numbers = np.frombuffer(b"".join(found), ">u8").reshape(-1, 3).T
    return (numbers & np.uint64(HASH_END - 1)).astype(np.int64)


def run_schema(dtype: np.dtype[np.unsignedinteger]) -> pa.Schema:
    """The schema of a run whose tokens have this type."""
    return RUN_SCHEMA if dtype == UINT16.dtype else RUN_SCHEMA.with_metadata({_DTYPE: dtype.str})


def token_dtype(schema: pa.Schema) -> np.dtype[np.unsignedinteger]:
    """The type of the tokens in a run of this schema."""
    metadata = schema.metadata or {}
    return np.dtype(metadata.get(_DTYPE, UINT16.dtype.str.encode()).decode())


def sorted_by_key(run: Sequence[Document]) -> list[Document]:
    """The documents of a run in the order of their keys."""
    columns = hash_columns([document.hashes for document in run])
    return [run[place] for place in np.lexsort(columns[::-1])]


def run_table(run: Sequence[Document], bos_id: int, eos_id: int, folder: Path) -> pa.Table:
    """The documents of a run, framed and sorted by key, as one chunk.

    Many tokens are kept in a file in the folder, which has no name.
    """
    columns = hash_columns([document.hashes for document in run])
    order = np.lexsort(columns[::-1])
    documents = [run[place] for place in order]
    dtype = run[0].tokens.dtype
    bos, eos = (np.array([token], dtype) for token in (bos_id, eos_id))
    sizes = ((len(document.tokens) + 2) * dtype.itemsize for document in documents)
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    framed = list(
        itertools.chain.from_iterable((bos, document.tokens, eos) for document in documents)
    )
    in_memory = offsets[-1] <= _MOST_IN_MEMORY
    tokens = np.concatenate(framed) if in_memory else _in_file(framed, folder)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(tokens)]
    arrays = [
        *map(pa.array, columns[:, order]),
        pa.array([document.id for document in documents], pa.string()),
        pa.array([document.url for document in documents], pa.string()),
        pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(run), buffers),
    ]
    return pa.Table.from_arrays(arrays, schema=run_schema(dtype))


@dataclass
class _Tally:
    """Documents of a part: the number `skipped`, by reason, and that of all others."""

    skipped: Counter[str] = field(default_factory=Counter)
    usable: int = 0


class _Written(NamedTuple):
    """A run on disk. `tokens` does not count <BOS> and <EOS>; `size` is in bytes."""

    name: str
    documents: int
    tokens: int
    smallest_split: int
    largest_split: int
    size: int


class _Usable(NamedTuple):
    """A record without what its source gave beside the text, and its number in the part."""

    place: int
    position: str
    id: str
    url: str
    text: bytes | Skip


@dataclass(frozen=True)
class Spiller:
    """Pass 1: writes the runs of a part into `folder`, and calls `report` with counts of tokens."""

    tokenizer: Tokenizer
    folder: Path
    seed: int
    report: Callable[[int], None]
    format: Format = FORMATS[TEXT]
    choice: Choice = ALL

    def spill(self, part: Part, number: int) -> PartSummary:
        """Tokenize part `number` into runs, and write its summary last."""
        keep_no_large_blocks()
        tally = _Tally()
        pieces: list[Piece] = []
        runs = self._runs(part, _records(part, pieces), tally)
        # `map` keeps no run while the next one is made, as a variable would.
        written = list(map(partial(self._write, number), itertools.count(), runs))
        summary = PartSummary(
            runs=tuple(run.name for run in written),
            documents=sum(run.documents for run in written),
            tokens=sum(run.tokens for run in written),
            skipped=dict(tally.skipped),
            smallest_split=min((run.smallest_split for run in written), default=HASH_END),
            largest_split=max((run.largest_split for run in written), default=-1),
            pieces=tuple(pieces),
            usable=tally.usable,
            identity=part.identity,
            sizes=tuple(run.size for run in written),
        )
        write_whole(summary_path(self.folder, number), summary.model_dump_json().encode())
        return summary

    def _write(self, part: int, number: int, run: list[Document]) -> _Written:
        """Write run `number` of a part."""
        path = self.folder / f"part-{part:06d}-run-{number:06d}.arrow"
        if self.choice.deduplicate:
            run[:] = sorted_by_key(run)
            write_hashes([d.text_hash for d in run], [d.place for d in run], path)
        table = run_table(run, self.tokenizer.bos_id, self.tokenizer.eos_id, self.folder)
        documents, tokens = len(run), sum(len(document.tokens) for document in run)
        run.clear()  # the table has its tokens, which may be many
        write_run(table, path)
        splits = table["split"].to_numpy()
        bounds = int(splits.min()), int(splits.max())
        return _Written(path.name, documents, tokens, *bounds, path.stat().st_size)

    def _copies(self, part: Part, text: bytes, position: str, same: bytes) -> list[bytes]:
        """The hashes of each copy of a document that is taken."""
        found = copies(text, position, self.seed, part.share, same)
        if part.is_validation is None:
            return found
        return [in_half(each, part.is_validation) for each in found]

    def _runs(
        self, part: Part, records: Iterable[Record], tally: _Tally
    ) -> Iterator[list[Document]]:
        run: list[Document] = []
        size = 0
        # `map` keeps no text while the tokens are in use, as a variable would.
        usable = map(self._usable, itertools.count(), records)
        for documents in map(partial(self._documents, part, tally), usable):
            run += documents
            size += sum(len(document.tokens) for document in documents)
            del documents
            if size >= RUN_TOKENS or len(run) >= _RUN_DOCUMENTS:
                yield run
                run, size = [], 0
        if run:
            yield run

    def _usable(self, place: int, record: Record) -> _Usable:
        return _Usable(
            place, record.position, record.id, record.url, self.format.usable(record.text)
        )

    def _documents(self, part: Part, tally: _Tally, usable: _Usable) -> list[Document]:
        """The tokenized copies of a document; none if it is not taken."""
        place, position, identifier, url, text = usable
        if isinstance(text, Skip):
            tally.skipped[text.value] += 1
            return []
        same = text_hash(text) if self.choice.deduplicate else b""
        found = self._copies(part, text, position, same)
        if not found and not self.choice.by_length:
            tally.usable += 1
            return []
        tokens = self.format.encode(self.tokenizer, text)
        if isinstance(tokens, Skip):
            tally.skipped[tokens.value] += 1
            return []
        self.report(len(tokens) * len(found))
        if skip := self.choice.skip(part, len(tokens)):
            tally.skipped[skip.value] += 1
            return []
        tally.usable += 1
        return [Document(each, identifier, url, tokens, same, place) for each in found]


def _records(part: Part, pieces: list[Piece]) -> Iterator[Record]:
    """The records of a part; at the end the pieces of files that were read join `pieces`."""
    read: Any = part.records()
    pieces.extend((yield from read) or ())


def summary_path(folder: Path, number: int) -> Path:
    """Path of the summary of part `number`, which exists once the part is finished."""
    return folder / f"part-{number:06d}.json"


def _in_file(parts: Iterable[Stored], folder: Path) -> mmap.mmap:
    """Their bytes, in a file that goes with the result."""
    with TemporaryFile(dir=folder) as file:
        file.writelines(part.data for part in parts)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def write_run(table: pa.Table, path: Path) -> None:
    """Write a run atomically, as one record batch."""
    with (
        written_aside(path) as partial,
        pa.OSFile(os.fsencode(partial), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_batch(table.to_batches()[0])
