"""The stream of a split: shards cut from it, and the index of what lies where.

The stream of a split is `<BOS> document <EOS> <BOS> document <EOS> ...`, cut every `chunk_length`
tokens; the last chunk alone is filled with <PAD>. A shard is a contiguous piece of the stream.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep.runs import int64_array
from i3dist.data.archive import shard_bytes
from i3dist.data.manifest import Shard, shard_name
from i3dist.data.token_types import TOKEN_TYPES, UINT16, Stored, TokenType

INDEX_NAME = "index.parquet"
INDEX_SCHEMA = pa.schema(
    [
        ("document", pa.int64()),
        ("piece", pa.int32()),
        ("id", pa.string()),
        ("url", pa.string()),
        ("shard", pa.int32()),
        ("chunk", pa.int32()),
        ("offset", pa.int32()),
        ("length", pa.int64()),
    ]
)
_ROWS_AT_A_TIME = 1 << 16
# Columns whose values repeat, which get dictionaries. Those of the others, nearly all of whose
# values differ, would be larger and slower to read.
_REPEATING = ["piece", "shard", "chunk", "offset", "length"]

FEWEST_CHUNKS, MOST_CHUNKS = 16, 2048
SHARDS_WANTED = 512
"""Shards that a corpus is cut into where it is large enough, so that every lane has some."""


@dataclass(frozen=True)
class Framing:
    """How a stream is cut, and the ids around each document: these names are the manifest's."""

    chunk_length: int
    chunks_per_shard: int
    bos_id: int
    eos_id: int
    pad_id: int
    dtype: str = UINT16.name

    @property
    def token_type(self) -> TokenType:
        """How tokens are stored."""
        return TOKEN_TYPES[self.dtype]

    @property
    def shard_tokens(self) -> int:
        """Tokens of a full shard."""
        return self.chunk_length * self.chunks_per_shard

    def shards_before(self, token: int) -> int:
        """Number of shards that begin before token number `token` of the stream."""
        return -(-token // self.shard_tokens)


def chunks_per_shard(tokens: int, chunk_length: int) -> int:
    """The default for so many tokens: the largest power of two that gives `SHARDS_WANTED` shards.

    It lies between `FEWEST_CHUNKS` and `MOST_CHUNKS`.
    """
    chunks = tokens // (chunk_length * SHARDS_WANTED)
    return max(FEWEST_CHUNKS, min(MOST_CHUNKS, 1 << max(0, chunks.bit_length() - 1)))


def index_rows(
    first_document: int, bounds: NDArray[np.int64], ids: pa.Array, urls: pa.Array, framing: Framing
) -> pa.Table:
    """The rows of the index for N consecutive documents, a row for each piece.

    Args:
        first_document: number of the first document in the stream.
        bounds: int64 [N + 1], places in the stream where documents begin; the last one ends there.
        ids: N strings.
        urls: N strings.
        framing: the sizes of chunks and shards.
    """
    size = framing.shard_tokens
    first, last = bounds[:-1] // size, (bounds[1:] - 1) // size
    pieces = last - first + 1
    row = np.repeat(np.arange(len(pieces)), pieces)  # of the document that a piece belongs to
    piece = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    shard = first[row] + piece
    begin = np.maximum(bounds[row], shard * size)
    end = np.minimum(bounds[row + 1], (shard + 1) * size)
    chunk, offset = np.divmod(begin - shard * size, framing.chunk_length)
    if len(row) > len(pieces):
        ids, urls = ids.take(int64_array(row)), urls.take(int64_array(row))
    numbers = (first_document + row, piece, shard, chunk, offset, end - begin)
    names = [name for name in INDEX_SCHEMA.names if name not in ("id", "url")]
    columns = dict(zip(names, map(int64_array, numbers), strict=True)) | {"id": ids, "url": urls}
    arrays = [columns[f.name].cast(f.type) for f in INDEX_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA)


class IndexWriter:
    """Writes `index.parquet`: one row per piece of a document, in the order of the stream.

    Its bytes do not depend on how the rows are shared out over the calls of `add`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / INDEX_NAME
        self._file = pa.OSFile(os.fsencode(self.path), "wb")
        self._writer = pq.ParquetWriter(
            self._file,
            INDEX_SCHEMA,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=_REPEATING,
            column_encoding={"document": "DELTA_BINARY_PACKED"},
        )
        self._rows = pa.Table.from_batches([], INDEX_SCHEMA)

    def add(self, rows: pa.Table) -> None:
        """Add rows."""
        self._rows = pa.concat_tables([self._rows, rows])
        while len(self._rows) >= _ROWS_AT_A_TIME:
            self._write(self._rows.slice(0, _ROWS_AT_A_TIME))
            self._rows = self._rows.slice(_ROWS_AT_A_TIME)

    def close(self) -> None:
        """Write the remaining rows and the footer of the file."""
        self._write(self._rows)
        self._writer.close()
        self._file.close()

    def _write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows.combine_chunks())


@dataclass
class ShardWriter:
    """Writes the shards of one stretch of a split's stream.

    The stretch is `start` to `stop`: from the first token of a shard to that of another, or to the
    end of the stream.
    """

    folder: Path
    framing: Framing
    start: int
    stop: int
    shards: dict[int, Shard] = field(default_factory=dict)
    """The finished shards by their numbers."""

    def __post_init__(self) -> None:
        size = min(self.framing.shard_tokens, self.stop - self.start + self.framing.chunk_length)
        self._shard = np.empty(max(0, size), self.framing.token_type.dtype)
        self._filled = 0
        self._number = self.start // self.framing.shard_tokens

    @property
    def position(self) -> int:
        """Place in the stream of the next token that it takes."""
        return self._number * self.framing.shard_tokens + self._filled

    @property
    def is_done(self) -> bool:
        """Whether all shards are written."""
        return self.position >= self.stop

    def add(self, tokens: Stored) -> None:
        """Append the next tokens of the stream; the last ones complete the last shard."""
        while len(tokens):
            room = self.framing.shard_tokens - self._filled
            part, tokens = tokens[:room], tokens[room:]
            self._shard[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == self.framing.shard_tokens or self.position == self.stop:
                self._write()

    def _write(self) -> None:
        chunks = -(-self._filled // self.framing.chunk_length)
        stream = self._shard[: chunks * self.framing.chunk_length]
        stream[self._filled :] = self.framing.pad_id
        shaped = stream.reshape(-1, self.framing.chunk_length)
        self.shards[self._number] = write_shard(self.folder, self._number, shaped)
        self._number += 1
        self._filled = 0


def write_shard(folder: Path, number: int, chunks: Stored) -> Shard:
    """Write `chunks`, shape [chunks, chunk_length], as shard `number` into `folder`."""
    data = shard_bytes(number, chunks)
    name = shard_name(number)
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name=name, chunks=len(chunks), size=len(data), sha256=digest)
