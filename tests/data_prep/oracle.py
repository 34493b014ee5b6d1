"""A naive packer: one document after the other. What `data_prep` writes is compared with it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.pack import INDEX_NAME, INDEX_SCHEMA, Framing, write_shard
from i3dist.data.manifest import Manifest, Shard
from i3dist.data.token_types import Stored

IndexRow = tuple[int, int, str, str, int, int, int, int]
"""Values in the order of `INDEX_SCHEMA`."""

ROWS_AT_A_TIME = 1 << 16


class RowWriter:
    """Writes `index.parquet` from rows."""

    def __init__(self, folder: Path) -> None:
        self._file = pa.OSFile(os.fsencode(folder / INDEX_NAME), "wb")
        self._writer = pq.ParquetWriter(
            self._file,
            INDEX_SCHEMA,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=["piece", "shard", "chunk", "offset", "length"],
            column_encoding={"document": "DELTA_BINARY_PACKED"},
        )
        self._rows: list[IndexRow] = []

    def add(self, row: IndexRow) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS_AT_A_TIME:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(INDEX_SCHEMA)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA))
        self._rows.clear()


@dataclass
class Packer:
    """Takes documents in stream order and writes the shards and the index of one split."""

    folder: Path
    framing: Framing
    shards: list[Shard] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        framing = self.framing
        self._index = RowWriter(self.folder)
        size = framing.chunks_per_shard * framing.chunk_length
        self._shard = np.empty(size, framing.token_type.dtype)
        self._filled = 0

    def add(self, identifier: str, url: str, ids: Stored | Sequence[int]) -> None:
        """Append one document, whose tokens, as stored, have no <BOS> and <EOS> yet."""
        framing = self.framing
        rest = np.concatenate(([framing.bos_id], ids, [framing.eos_id]))
        rest = rest.astype(framing.token_type.dtype)
        self.tokens += len(rest)
        piece = 0
        while len(rest):
            length = min(len(rest), len(self._shard) - self._filled)
            chunk, offset = divmod(self._filled, framing.chunk_length)
            place = (len(self.shards), chunk, offset)
            self._index.add((self.documents, piece, identifier, url, *place, length))
            self._append(rest[:length])
            rest = rest[length:]
            piece += 1
        self.documents += 1

    def close(self) -> None:
        """Fill the last chunk with <PAD>, and write the last shard and the index."""
        if self._filled:
            chunks = -(-self._filled // self.framing.chunk_length)
            end = chunks * self.framing.chunk_length
            self._shard[self._filled : end] = self.framing.pad_id
            self._write(self._shard[:end])
        self._index.close()

    def manifest(self, **origin: Any) -> Manifest:
        """The manifest of the closed split; `origin` holds the fields that say what it is of."""
        return Manifest(
            version=self.framing.token_type.version,
            documents=self.documents,
            tokens=self.tokens,
            chunks=sum(shard.chunks for shard in self.shards),
            shards=tuple(self.shards),
            **vars(self.framing),
            **origin,
        )

    def _append(self, ids: Stored) -> None:
        self._shard[self._filled : self._filled + len(ids)] = ids
        self._filled += len(ids)
        if self._filled == len(self._shard):
            self._write(self._shard)
            self._filled = 0

    def _write(self, stream: Stored) -> None:
        chunks = stream.reshape(-1, self.framing.chunk_length)
        self.shards.append(write_shard(self.folder, len(self.shards), chunks))
