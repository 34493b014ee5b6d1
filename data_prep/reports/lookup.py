"""Finds documents and chunks in a split: what lies where, and its text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep.checks.index_check import UNREADABLE
from data_prep.output import TOKENIZER_NAME
from data_prep.pack import INDEX_NAME
from i3dist.data.chat import transcript
from i3dist.data.manifest import Manifest
from i3dist.data.shards import ShardTokens, read_shard
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.files import regular

Tokens = NDArray[np.unsignedinteger]


class Piece(NamedTuple):
    """A row of index.parquet."""

    document: int
    piece: int
    id: str
    url: str
    shard: int
    chunk: int
    offset: int
    length: int


class Part(NamedTuple):
    """What a chunk holds of a document: its tokens `start` to `stop`, the second not included."""

    piece: Piece
    start: int
    stop: int
    before: int  # tokens of the document before this part, <BOS> included
    text: str


@contextmanager
def reading_index(split: Path) -> Iterator[Path]:
    """The index of a split; a `UserError` if it is missing or cannot be read.

    An error that names another file goes on as it is.
    """
    path = split / INDEX_NAME
    try:
        yield path
    except UNREADABLE as error:
        named = getattr(error, "filename", None)
        if named is not None and str(named) != str(path):
            raise
        if named is not None and isinstance(error, FileNotFoundError):
            raise UserError(f"{path} is missing: it says where documents lie; restore it") from None
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} cannot be read ({reason}): restore it") from None


class SplitReader:
    """Reads one split of an output; each shard is verified when it is read."""

    def __init__(self, folder: Path, split: str) -> None:
        """Open a split.

        Raises:
            UserError: its manifest or the tokenizer cannot be read, or they do not fit.
        """
        self.folder = folder / split
        self.manifest = Manifest.load(self.folder)
        self.tokenizer = Tokenizer.load(folder / TOKENIZER_NAME)
        if self.tokenizer.sha256 != self.manifest.tokenizer_sha256:
            raise UserError(
                f"{self.tokenizer.path} is not the tokenizer that made {self.folder}: restore it"
            )
        self.read = lru_cache(maxsize=8)(self._read)
        """A shard."""

    def _read(self, shard: int) -> ShardTokens:
        return read_shard(self.folder, self.manifest, shard)

    def shard(self, shard: int) -> Tokens:
        """The ids of a shard, [N, T]."""
        return self.read(shard).tokens

    def learned(self, shard: int, chunk: int) -> int | None:
        """How many tokens of a chunk are learned; None where all are."""
        learned = self.read(shard).learned
        return None if learned is None else int(learned[chunk].sum())

    def decode(self, ids: Tokens) -> str:
        """The text of `ids`; in conversations with the names of the chat tokens."""
        if self.manifest.token_type.has_mask:
            return transcript(self.tokenizer, ids)
        return self.tokenizer.decode(ids)

    def chunk(self, shard: int, chunk: int) -> Tokens:
        """The ids of a chunk, [T].

        Raises:
            UserError: there is no such chunk, or the shard is damaged.
        """
        shards = self.manifest.shards
        if not 0 <= shard < len(shards):
            raise UserError(f"{self.folder} has no shard {shard}: the last is {len(shards) - 1}")
        if not 0 <= chunk < shards[shard].chunks:
            last = shards[shard].chunks - 1
            raise UserError(f"{shards[shard].name} has no chunk {chunk}: the last is {last}")
        return self.shard(shard)[chunk]

    def parts(self, shard: int, chunk: int) -> list[Part]:
        """What a chunk holds, in order; padding is left out."""
        tokens, length = self.chunk(shard, chunk), self.manifest.chunk_length
        first = chunk * length
        parts = []
        for piece in self._pieces([("shard", "=", shard), ("chunk", "<=", chunk)]):
            begin = piece.chunk * length + piece.offset
            start, stop = max(begin - first, 0), min(begin + piece.length - first, length)
            if start < stop:
                before = self._before(piece) + first + start - begin
                text = self.decode(tokens[start:stop])
                parts.append(Part(piece, start, stop, before, text))
        return parts

    def documents(self, identifier: str) -> list[list[Piece]]:
        """The pieces of each document of this id, or of number N for "#N".

        Raises:
            UserError: there is none.
        """
        column, value = "id", identifier
        number = identifier.removeprefix("#")
        found = self._pieces([("id", "=", identifier)])
        if not found and identifier.startswith("#") and number.isdecimal():
            found = self._pieces([("document", "=", min(int(number), (1 << 63) - 1))])
            column, value = "number", number
        if not found:
            raise UserError(
                f"{self.folder} has no document with the {column} {value!r}: give the id of its "
                "source, or #N for document number N, and --split for the other split"
            )
        return [list(group) for _, group in groupby(found, key=lambda piece: piece.document)]

    def tokens(self, piece: Piece) -> Tokens:
        """The ids of a piece, with <BOS> and <EOS>."""
        start = piece.chunk * self.manifest.chunk_length + piece.offset
        return self.shard(piece.shard).reshape(-1)[start : start + piece.length]

    def text(self, pieces: Sequence[Piece]) -> str:
        """The text of a document."""
        return self.decode(np.concatenate([self.tokens(piece) for piece in pieces]))

    def _before(self, piece: Piece) -> int:
        """Tokens of a document in the pieces before this one."""
        if not piece.piece:
            return 0
        rows = self._pieces([("document", "=", piece.document), ("piece", "<", piece.piece)])
        return sum(row.length for row in rows)

    def _pieces(self, filters: list[tuple[str, str, Any]]) -> list[Piece]:
        with reading_index(self.folder) as path:
            table = pq.read_table(regular(path), filters=filters, columns=list(Piece._fields))
            return [Piece(**row) for row in table.to_pylist()]
