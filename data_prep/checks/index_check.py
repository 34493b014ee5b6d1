"""Checks index.parquet: its form, its numbers row by row, its ids and URLs.

Whether the rows agree with the shards is checked with the shards (`shard_check`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
# How Parquet stores each column.
_PHYSICAL = {pa.int64(): "INT64", pa.int32(): "INT32", pa.string(): "BYTE_ARRAY"}
_STORED = {column.name: _PHYSICAL[column.type] for column in INDEX_SCHEMA}


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
        self.has_checksums = True  # as far as it was read
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
        self.row_groups = file.metadata.num_row_groups
        self._batches = self._read(file)

    def _read(self, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        """The columns that are numbers; notes where their bounds are wrong."""
        for number in range(self.row_groups):
            group = _RowGroup(self.stream, file, number)
            yield from group.batches(NUMBERS)
            self.damages.extend(group.wrong_bounds(NUMBERS))
            self.has_checksums &= group.has_checksums

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


class _RowGroup:
    """Reads columns of a row group, and checks what the footer states of them.

    pyarrow (25.0) ends the process when it is asked for metadata of a column that contradict
    themselves, or for bounds of a column that has another type there than in the schema. Reading
    refuses the former with an error. So a column is read first, and its type is compared.

    Attributes:
        has_checksums: whether the pages of the columns that were read have checksums.
    """

    def __init__(self, stream: Stream, file: pq.ParquetFile, number: int) -> None:
        self.has_checksums = True
        self._stream, self._file, self._number = stream, file, number
        self._bounds = Bounds()
        self._checked: dict[str, Any] = {}  # metadata of the columns whose form is right

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns.

        Raises:
            ValueError: they are not in the form of the format.
        """
        batches = self._file.iter_batches(
            ROWS_AT_A_TIME, [self._number], columns=list(columns), use_threads=False
        )
        rows = 0
        for batch in batches:
            if not rows:
                self._check_form(columns)
            batch.validate(full=True)
            self._bounds.add(batch)
            yield batch
            rows += len(batch)
        # pyarrow gives as many rows as the shortest column has.
        if rows != (stated := self._file.metadata.row_group(self._number).num_rows):
            raise ValueError(f"{rows} of {stated} rows are there")

    def _check_form(self, columns: Sequence[str]) -> None:
        meta = self._file.metadata.row_group(self._number)
        found = {name: meta.column(INDEX_SCHEMA.get_field_index(name)) for name in columns}
        if any(column.physical_type != _STORED[name] for name, column in found.items()):
            raise ValueError("its columns have other types than the format's")
        if any(column.num_values != meta.num_rows for column in found.values()):
            raise ValueError("its columns differ in length")
        if any(column.compression != "ZSTD" for column in found.values()):
            raise ValueError("it is not zstd throughout")
        with open(self._stream.folder / INDEX_NAME, "rb") as raw:
            self.has_checksums = all(has_checksum(raw, column) for column in found.values())
        self._checked = found

    def wrong_bounds(self, columns: Sequence[str]) -> Iterator[Damage]:
        """Where the footer states bounds for columns that are not those of what was read."""
        for name in columns:
            if name in self._checked and self._bounds.contradicts(self._checked[name]):
                problem = f"states a least and a largest {name} that are not those of its rows"
                yield Damage(self._stream.file(INDEX_NAME), f"row group {self._number}", problem)


class TextReport(NamedTuple):
    """What was found in ids and URLs; `first` and `last` are (piece, id, url) of the end rows."""

    damages: list[Damage]
    has_checksums: bool = True
    row: int = 0  # number of the first
    first: tuple[int, str, str] | None = None
    last: tuple[int, str, str] | None = None


def check_texts(stream: Stream, number: int) -> TextReport:
    """Check ids and URLs of row group `number`.

    They are present, UTF-8, and alike in all pieces of a document, and within the bounds that the
    row group states for them.
    """
    damages: list[Damage] = []
    first = last = None
    start = 0
    has_checksums = True
    try:
        file = open_index(stream.folder)
        start = row = sum(file.metadata.row_group(g).num_rows for g in range(number))
        group = _RowGroup(stream, file, number)
        for batch in group.batches(["piece", *TEXTS]):
            damages.extend(_text_damages(stream, row, batch))
            if len(batch):
                ends = [_texts_of(batch, at) for at in (0, len(batch) - 1)]
                if last is not None:
                    damages.extend(join_texts(stream, row, last, ends[0]))
                first, last = first or ends[0], ends[1]
            row += len(batch)
        damages.extend(group.wrong_bounds(TEXTS))
        has_checksums = group.has_checksums
    except UNREADABLE as error:
        damages.append(unreadable(stream, error, f"row group {number}"))
    return TextReport(damages, has_checksums, start, first, last)


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
