"""Checks index.parquet: its form, its numbers row by row, its ids and URLs.

Whether the rows agree with the shards is checked with the shards (`shard_check`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.checks.bounds import Bounds
from data_prep.checks.damage import Damage
from data_prep.checks.index_rows import NUMBERS, Ints, Rows, integers, row_damage
from data_prep.checks.page_header import has_checksum
from data_prep.checks.stream import Stream
from data_prep.pack import INDEX_NAME, INDEX_SCHEMA
from data_prep.runs import int64_array
from i3dist.files import regular

ROWS_AT_A_TIME = 1 << 16
# What pyarrow raises for a damaged file.
UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)
TEXTS = ["id", "url"]


def open_index(folder: Path) -> pq.ParquetFile:
    """Open the index of a split. Where its pages have checksums, reading verifies them."""
    path = regular(folder / INDEX_NAME)
    return pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)


def unreadable(stream: Stream, error: BaseException, place: str = "") -> Damage:
    """The damage of an index that pyarrow refuses to read."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return Damage(stream.file(INDEX_NAME), place, f"cannot be read ({reason})")


class IndexCheck:
    """Reads the numbers of an index once, in order; notes damages as it goes."""

    def __init__(self, stream: Stream, documents: int) -> None:
        """Open the index of a split that has so many documents."""
        self.stream = stream
        self.documents = documents
        self.damages: list[Damage] = []
        self.row_groups = 0
        self.has_checksums = True
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._rest = Rows.none(0)
        self._last_document, self._last_piece = -1, 0
        self._shard = 0  # that the last row before `_rest` belongs to
        self._shards = np.empty(0, np.int64)  # that the rows of `_rest` belong to
        try:
            self._open()
        except FileNotFoundError:
            pass  # the check of the folder says so
        except UNREADABLE as error:
            self._give_up(error)

    def _open(self) -> None:
        file = open_index(self.stream.folder)
        if not file.schema_arrow.equals(INDEX_SCHEMA):
            raise ValueError("its columns are not those of the format")
        meta = file.metadata
        self.row_groups = meta.num_row_groups
        columns = [
            meta.row_group(group).column(column)
            for group in range(meta.num_row_groups)
            for column in range(meta.num_columns)
        ]
        rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        # pyarrow would give as many rows as the shortest column has.
        if any(c.num_values != rows[n // meta.num_columns] for n, c in enumerate(columns)):
            raise ValueError("its columns differ in length")
        if any(column.compression != "ZSTD" for column in columns):
            self.damages.append(Damage(self.stream.file(INDEX_NAME), "", "is not zstd throughout"))
        with open(self.stream.folder / INDEX_NAME, "rb") as raw:
            self.has_checksums = all(has_checksum(raw, column) for column in columns)
        self._batches = self._read(file)

    def _read(self, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        """The columns that are numbers; notes where their bounds are wrong."""
        for group in range(self.row_groups):
            bounds = Bounds()
            for batch in file.iter_batches(
                ROWS_AT_A_TIME, [group], columns=list(NUMBERS), use_threads=False
            ):
                bounds.add(batch)
                yield batch
            self.damages.extend(_wrong_bounds(self.stream, group, bounds, file))

    @property
    def is_readable(self) -> bool:
        """Whether no batch has failed so far."""
        return self._batches is not None

    def take(self, stop: int) -> tuple[Rows, Ints] | None:
        """The next rows, of shards below `stop`, and the shard of each; None once unreadable."""
        parts = []
        while True:
            count = int(np.searchsorted(self._shards, stop))
            parts.append((self._rest.part(0, count), self._shards[:count]))
            self._rest = self._rest.part(count, self._rest.total)
            self._shards = self._shards[count:]
            if self._rest.total or not self._read_more():
                break
        if self._batches is None:
            return None
        rows, shards = zip(*parts, strict=True)
        return Rows.joined(rows), np.concatenate(shards)

    def _read_more(self) -> bool:
        """Read the next rows, when none are left; False if there are no more, or on a failure."""
        try:
            batch = next(self._batches, None) if self._batches else None
            if batch is None:
                return False
            self._rest = Rows.of(self._rest.first, batch)
            self._check_numbers(self._rest)
            self._shards = self._owners(self._rest)
        except UNREADABLE as error:
            self._give_up(error)
            return False
        return True

    def finish(self) -> None:
        """Check the end: no rows may be left, and the documents add up."""
        if not self.is_readable:
            return
        if self._last_document + 1 != self.documents:
            problem = f"ends with document {self._last_document}, not {self.documents - 1}"
            self.damages.append(Damage(self.stream.file(INDEX_NAME), "", problem))

    def _give_up(self, error: BaseException) -> None:
        self._batches = None
        self.damages.append(unreadable(self.stream, error))

    def _check_numbers(self, rows: Rows) -> None:
        """Check that documents and pieces count up."""
        documents = np.concatenate(([self._last_document], rows.document))
        pieces = np.concatenate(([self._last_piece], rows.piece))
        new = rows.piece == 0
        wrong = np.diff(documents) != new
        continued = np.flatnonzero(~new)
        wrong[continued] |= pieces[continued + 1] != pieces[continued] + 1
        if rows.total and self._last_document < 0:
            wrong[0] |= not new[0]
        for row in np.flatnonzero(wrong).tolist():
            self.damages.append(
                row_damage(
                    self.stream,
                    rows.first + row,
                    f"document {documents[row + 1]}, piece {pieces[row + 1]} does not follow "
                    f"document {documents[row]}, piece {pieces[row]}",
                )
            )
        self._last_document, self._last_piece = int(documents[-1]), int(pieces[-1])

    def _owners(self, rows: Rows) -> Ints:
        """The shard whose rows each row stands among, ascending: a lone wrong number is passed."""
        stated = rows.shard
        step = np.diff(stated, prepend=self._shard)
        follows = (step == 0) | (step == 1)
        fits = follows | np.append(follows[1:], False)
        fits &= (stated >= 0) & (stated < self.stream.shards)
        owners = np.maximum.accumulate(np.where(fits, stated, self._shard))
        owners = np.maximum(owners, self._shard)
        self._shard = int(owners[-1]) if len(owners) else self._shard
        return owners


class TextReport(NamedTuple):
    """What was found in ids and URLs; `first` and `last` are (piece, id, url) of the end rows."""

    damages: list[Damage]
    row: int = 0  # number of the first
    first: tuple[int, str, str] | None = None
    last: tuple[int, str, str] | None = None


def check_texts(stream: Stream, group: int) -> TextReport:
    """Check ids and URLs of a row group: present, UTF-8, and alike in all pieces of a document.

    The bounds that the row group states for them are checked as well.
    """
    damages: list[Damage] = []
    first = last = None
    start = 0
    try:
        file = open_index(stream.folder)
        start = row = sum(file.metadata.row_group(g).num_rows for g in range(group))
        bounds = Bounds()
        for batch in file.iter_batches(
            ROWS_AT_A_TIME, [group], columns=["piece", *TEXTS], use_threads=False
        ):
            try:
                batch.validate(full=True)
            except UNREADABLE as error:
                damages.append(unreadable(stream, error, f"rows from {row}"))
                break
            bounds.add(batch.select(TEXTS))
            damages.extend(_text_damages(stream, row, batch))
            if len(batch):
                ends = [_texts_of(batch, at) for at in (0, len(batch) - 1)]
                if last is not None:
                    damages.extend(join_texts(stream, row, last, ends[0]))
                first, last = first or ends[0], ends[1]
            row += len(batch)
        damages.extend(_wrong_bounds(stream, group, bounds, file))
    except UNREADABLE as error:
        damages.append(unreadable(stream, error, f"row group {group}"))
    return TextReport(damages, start, first, last)


def _wrong_bounds(
    stream: Stream, group: int, bounds: Bounds, file: pq.ParquetFile
) -> Iterator[Damage]:
    for name in bounds.contradicted(file.metadata.row_group(group)):
        problem = f"states a least and a largest {name} that are not those of its rows"
        yield Damage(stream.file(INDEX_NAME), f"row group {group}", problem)


def join_texts(
    stream: Stream, row: int, before: tuple[int, str, str], after: tuple[int, str, str]
) -> Iterator[Damage]:
    """The damage if a row continues a document and has another id or URL than the row before."""
    if (after[0] or 0) > 0 and before[1:] != after[1:]:
        yield row_damage(stream, row, "has another id or URL than the piece before it")


def _text_damages(stream: Stream, first: int, batch: pa.RecordBatch) -> Iterator[Damage]:
    for name in TEXTS:
        if batch.column(name).null_count:
            for row, value in enumerate(batch.column(name).to_pylist()):
                if value is None:
                    yield row_damage(stream, first + row, f"has no {name}")
    continued = np.flatnonzero(integers(batch.column("piece"))[1:] > 0) + 1
    # Row 0 is compared with the batch before.
    texts = batch.select(TEXTS)
    if texts.take(int64_array(continued - 1)).equals(texts.take(int64_array(continued))):
        return
    for row in continued.tolist():
        before, after = _texts_of(batch, row - 1), _texts_of(batch, row)
        yield from join_texts(stream, first + row, before, after)


def _texts_of(batch: pa.RecordBatch, row: int) -> tuple[int, str, str]:
    piece, identifier, url = (batch.column(name)[row].as_py() for name in ("piece", *TEXTS))
    return piece, identifier, url
