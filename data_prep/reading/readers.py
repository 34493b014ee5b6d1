"""Readers of parquet, jsonl and txt. A broken file is a `UserError` that names file and place."""

import itertools
import lzma
import os
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep.evidence import Piece, State, sha256_between, state_of
from data_prep.reading import json_lines
from data_prep.reading.json_lines import Line
from data_prep.reading.line_ranges import LineRecord
from data_prep.reading.row_filter import give_back, kept_lines, kept_rows
from data_prep.reading.streams import PACKINGS, HashedFile, encoding_of, read_lines, read_text
from data_prep.reading.where import STRINGS, Where
from data_prep.sources import Record, Skip, clean_file_name
from i3dist.cli.paths import as_unicode
from i3dist.errors import UserError
from i3dist.files import regular

PARQUET = ".parquet"
TEXT = "text"
"""The column, or the key, that holds documents where no other is named."""
_PLAIN_LINES = (".jsonl", ".ndjson")
JSON_LINES = tuple(kind + packing for kind in _PLAIN_LINES for packing in PACKINGS)
SUFFIXES = (PARQUET, *JSON_LINES, *(".txt" + packing for packing in PACKINGS))
SUFFIXES_IN_WORDS = f"{PARQUET}, .jsonl, .ndjson or .txt (all but {PARQUET} also with " + (
    f"{', '.join(PACKINGS[1:-1])} or {PACKINGS[-1]} after it)"
)
_LABELS = ("id", "url")
_ROWS_AT_A_TIME = 128
_LARGE = 1 << 25
"""Bytes of a batch for which memory is worth more than time: the row group is read again after it,
but at most `_MOST_AGAIN` times."""
_MOST_AGAIN = 8
_GENTLY: Any = {"pre_buffer": False, "buffer_size": 1 << 21}
"""Options of pyarrow under which it holds 2 MB of a column, not all of a row group."""
_ALONE: Any = {"use_threads": False}

_BINARY = (pa.binary(), pa.large_binary(), pa.binary_view())
_NO_VALUE = ValueError, OverflowError, LookupError, pa.ArrowException


@dataclass(frozen=True)
class TextFile:
    """A file of a source.

    `name` is its path below the source's root, and `number` its place in the order of names. The
    url of a txt file is `scheme` and `name`. `column` is the column, or the key, that holds
    documents. Rows of which `where` is not true are left out.
    """

    name: str
    number: int
    scheme: str = field(default="", kw_only=True)
    column: str = field(default=TEXT, kw_only=True)
    where: Where | None = field(default=None, kw_only=True)

    def unfiltered(self) -> Self:
        """The file with all its rows."""
        return replace(self, where=None)

    @property
    def place(self) -> str:
        """What messages call it."""
        raise NotImplementedError

    @property
    def file_name(self) -> str:
        """A name that ends as its content asks for."""
        return self.name

    def is_a(self, *suffixes: str) -> bool:
        """Whether the name ends in one of these, in upper or lower case."""
        return self.file_name.lower().endswith(suffixes)


@dataclass(frozen=True)
class SourceFile(TextFile):
    """A file on disk, and the state that it must have when it is read."""

    path: Path
    state: State

    @property
    def place(self) -> str:
        """Its path."""
        return str(self.path)


@dataclass(frozen=True)
class Span:
    """What is read of a file in one go: all of it, a row group of parquet, or some lines of jsonl.

    `size` estimates the bytes of text. `start` and `stop` bound the bytes that the span hashes. The
    row groups of a parquet file share its bytes out, each about where it lies. Of jsonl they are
    the bytes that are read. `first_row` is the number of the first row or line.
    """

    file: SourceFile
    size: int
    start: int
    stop: int
    row_group: int | None = None
    first_row: int = 0
    error: str | None = None
    """Why the file cannot be opened."""

    def uncut(self) -> "Span":
        """Of a first range of lines, all of its file; any other span as it is."""
        size = self.file.state[0]
        return self if self.file.is_a(PARQUET) else Span(self.file, size, 0, size)

    def records(self) -> Generator[Record, None, Piece]:
        """Read the documents in order; returns what was read.

        Raises:
            UserError: the file is damaged, or has changed.
        """
        if self.error:
            raise UserError(self.error)
        path = self.file.path
        group = "" if self.row_group is None else f", row group {self.row_group}"
        with naming(f"{path}{group}"), regular(path).open("rb") as file:
            self._check_state(file)
            try:
                sha256 = yield from self._read(file)
            except Exception:  # a change that is under way may look like damage
                self._check_state(file)
                raise
            self._check_state(file)
        return Piece(file=self.file.number, start=self.start, stop=self.stop, sha256=sha256)

    def _read(self, file: BinaryIO) -> Generator[Record, None, str]:
        if self.file.is_a(PARQUET):
            # A row group is not read in order, but its bytes are in memory once they are hashed.
            sha256 = sha256_between(file, self.start, self.stop)
            if self.row_group is not None:
                with open_parquet(file, self.file.column) as parquet:
                    yield from read_rows(parquet, self.file, self.row_group, self.first_row)
            return sha256
        if not self.file.state[0] and self.file.is_a(*PACKINGS[1:]):
            raise EOFError("it is empty")  # as the gzip command says; Python's module says nothing
        file.seek(self.start)
        hashed = HashedFile(file, self.stop - self.start)
        yield from read_text_file(self.file, hashed, _encoding(self.file), self.first_row)
        return hashed.sha256()

    def _check_state(self, file: BinaryIO) -> None:
        # The inode's time does not count: it also changes with permissions and links.
        if state_of(file.fileno())[:2] != self.file.state[:2]:
            raise UserError(
                f"{self.file.path} changed while it was read: run the same command again once "
                "nothing writes to it"
            )


@contextmanager
def naming(place: Path | str) -> Iterator[None]:
    """Turn every error of the libraries that read `place` into a `UserError` that names it."""
    try:
        yield
    except (
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        pa.ArrowException,
        zlib.error,
        lzma.LZMAError,
        zstandard.ZstdError,
    ) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = " ".join(reason.split())[:200].rstrip(".")
        raise UserError(f"cannot read {place}: {reason}; repair or remove it") from None


def spans_of(file: SourceFile) -> list[Span]:
    """The spans of a file.

    Raises:
        UserError: a parquet file is damaged, does not have exactly one column `text`, or has
            columns that the file's condition does not fit.
    """
    size = file.state[0]
    if not file.is_a(PARQUET):
        return [Span(file, size, 0, size)]
    with naming(file.path), regular(file.path).open("rb") as handle:
        groups = row_groups(handle, file)
    if not groups:
        return [Span(file, 0, 0, size)]
    # Not at the groups' own offsets: pyarrow aborts where a damaged footer holds wrong ones.
    cuts = [size * number // len(groups) for number in range(len(groups) + 1)]
    return [
        Span(file, group.size, cuts[n], cuts[n + 1], n, group.first_row)
        for n, group in enumerate(groups)
    ]


def spans_or_error(file: SourceFile) -> list[Span]:
    """The spans of a file; of one that cannot be opened one span, which raises the error."""
    try:
        return spans_of(file)
    except UserError as error:
        size = file.state[0]
        return [Span(file, size, 0, size, error=str(error))]


class RowGroup(NamedTuple):
    """A row group: its bytes before compression, and the number of its first row."""

    size: int
    first_row: int


def row_groups(handle: BinaryIO, file: TextFile) -> list[RowGroup]:
    """The row groups of a parquet file.

    Raises:
        UserError: there is not exactly one column of text, or the condition does not fit the
            columns.
    """
    with pq.ParquetFile(handle) as parquet:
        names = parquet.schema_arrow.names
        if (count := names.count(file.column)) != 1:
            found = ", ".join(names[:20])
            wrong = f"has {count} columns" if count else "has no column"
            raise UserError(
                f"{file.place} {wrong} {file.column!r}; its columns are {found} (--text-column "
                "names the one that holds the text)"
            )
        if file.where:
            file.where.check(parquet.schema_arrow, file.place)
        groups = [parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups)]
        if sum(group.num_rows for group in groups) != parquet.metadata.num_rows:
            raise ValueError("its footer contradicts itself on the number of rows")
    first_rows = itertools.accumulate((group.num_rows for group in groups), initial=0)
    return [
        RowGroup(group.total_byte_size, row) for group, row in zip(groups, first_rows, strict=False)
    ]


def read_rows(
    parquet: pq.ParquetFile, file: TextFile, group: int, first_row: int
) -> Iterator[Record]:
    """Read the documents of a row group; no text where none of them is kept."""
    name = clean_file_name(file.name)
    kept: Iterable[bool] = itertools.repeat(True)
    if file.where:
        place = f"{file.place}, row group {group}"
        kept = rows = kept_rows(parquet, group, file.where, place).tolist()
        if not any(rows):
            for row in range(first_row, first_row + len(rows)):
                yield Record(f"{name}#{row}", "", "", Skip.WHERE)
            return
    # `map` keeps no row while its record is in use, as variables would: a text may be large.
    yield from map(
        partial(_row, name),
        itertools.count(first_row),
        _text(parquet, group, file.column),
        *(_labels(parquet, group, key) for key in _LABELS),
        kept,
    )


def _row(name: str, row: int, text: Any, identifier: Any, url: Any, is_kept: bool) -> Record:
    fields = dict(zip(_LABELS, (identifier, url), strict=True))
    return _record(f"{name}#{row}", fields, text if is_kept else Skip.WHERE)


def _text(parquet: pq.ParquetFile, group: int, key: str) -> Iterator[Any]:
    """The values of the column of text. They are counted: pyarrow skips a damaged page silently."""
    expected = parquet.metadata.row_group(group).num_rows
    rows = yield from _column(parquet, group, key, is_text=True)
    if rows != expected:
        raise EOFError(f"it holds {rows} rows of text, not {expected}")


def _labels(parquet: pq.ParquetFile, group: int, key: str) -> Iterator[Any]:
    """The values of a column, then None without end; values end where one cannot be read.

    Labels are not read together with the text, because an unreadable label must not cost the text.
    """
    if key in parquet.schema_arrow.names:
        with suppress(*_NO_VALUE):
            yield from _column(parquet, group, key, is_text=False)
    yield from itertools.repeat(None)


def _column(
    parquet: pq.ParquetFile, group: int, key: str, *, is_text: bool
) -> Generator[Any, None, int]:
    """The values of a column; returns how many there are."""
    begin = partial(parquet.iter_batches, _rows_at_a_time(parquet, group), [group], [key], **_ALONE)
    batches, rows, taken, again = begin(), 0, 0, 0
    expected = parquet.metadata.row_group(group).num_rows
    while (batch := next(batches, None)) is not None:
        # There may be two columns `id`: the first counts.
        values = _values(batch.column(batch.schema.names.index(key)), is_text)
        rows, taken = rows + len(values), taken + 1
        is_large = batch.nbytes > _LARGE and again < _MOST_AGAIN
        del batch
        if is_large:  # pyarrow would keep the batch, and the page that it is of
            batches, again = iter(()), again + 1
            give_back()
        values.reverse()
        while values:
            yield values.pop()  # nothing keeps a value that was taken
        if is_large and rows < expected:
            batches = begin()
            deque(itertools.islice(batches, taken), maxlen=0)  # keeps none, as a variable would
    if again:
        del batches
        give_back()
    return rows


def _rows_at_a_time(parquet: pq.ParquetFile, group: int) -> int:
    """Rows that are in memory at once: about 16 MB."""
    metadata = parquet.metadata.row_group(group)
    return max(1, min(_ROWS_AT_A_TIME, (metadata.num_rows << 24) // (metadata.total_byte_size + 1)))


def open_parquet(file: BinaryIO, text_column: str) -> pq.ParquetFile:
    """The file with its dictionary columns as plain ones.

    pyarrow refuses a whole dictionary column for one value of bad UTF-8. The footer asks for
    dictionaries under the key `ARROW:schema`, which is hidden from pyarrow here.
    """
    parquet = pq.ParquetFile(file, **_GENTLY)
    read = [column for column in parquet.schema_arrow if column.name in (text_column, *_LABELS)]
    if not any(pa.types.is_dictionary(column.type) for column in read):
        return parquet
    file.seek(-8, os.SEEK_END)
    size = int.from_bytes(file.read(4), "little")
    file.seek(-8 - size, os.SEEK_END)
    footer = file.read(size).replace(b"ARROW:schema", b"arrow:schema") + file.read()
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    return pq.ParquetFile(file, metadata=metadata, **_GENTLY)


def _values(column: pa.Array, is_text: bool) -> list[Any]:
    """Python values. Strings come as bytes, so that bad UTF-8 in one does not cost the others.

    A value that can be no text becomes True in the column of text. In a column of labels it becomes
    any Python value that pyarrow makes of it, else None.
    """
    plain = column.storage if isinstance(column.type, pa.BaseExtensionType) else column
    if plain.type in STRINGS:
        return plain.cast(pa.large_binary()).to_pylist()
    if is_text and column.type not in _BINARY and not pa.types.is_fixed_size_binary(column.type):
        return [True if valid else None for valid in column.is_valid().to_pylist()]
    with suppress(*_NO_VALUE):
        return column.to_pylist()
    for kind in (pa.string(), pa.int64()):  # of times beyond Python's, or of unknown time zones
        with suppress(*_NO_VALUE):
            return column.cast(kind).to_pylist()
    return [None] * len(column)


def lines_of(span: Span, size: int, kept: Path | None) -> list[Span]:
    """The span of a large jsonl file as several, of `size` bytes or more; any other as it is.

    Compressed files and other encodings than UTF-8 cannot be cut. What was found is kept in the
    folder `kept`, if there is one, and serves while the file has the same state.
    """
    file, parts = span.file, span.stop // size
    if parts < 2 or span.error or not file.is_a(*_PLAIN_LINES):
        return [span]
    with naming(file.path), regular(file.path).open("rb") as handle:
        if _encoding(file):
            return [span]
        path = kept and kept / f"lines-{file.number:06d}.json"
        ranges = LineRecord.ranges_of(handle, file.state, parts, path)
    return [Span(file, stop - start, start, stop, first_row=line) for start, stop, line in ranges]


def _encoding(file: SourceFile) -> str | None:
    with regular(file.path).open("rb") as start:
        return encoding_of(start, file.name)


def read_text_file(
    file: TextFile, stream: HashedFile, encoding: str | None, first_row: int
) -> Iterator[Record]:
    """Read the documents of a jsonl or txt file, from the line that has number `first_row` on."""
    records = _read_text(file, stream, encoding, first_row)
    yield from kept_lines(records, file.where, file.place) if file.where else records


def _read_text(
    file: TextFile, stream: HashedFile, encoding: str | None, first_row: int
) -> Iterator[Record]:
    name = clean_file_name(file.name)
    if not file.is_a(*JSON_LINES):
        yield Record(name, name, file.scheme + name, read_text(stream, file.file_name, encoding))
        return
    # `map` and `filter` keep no line while its record is in use, as a variable would.
    # A condition may be on a text, so that it has to be one.
    decoded = partial(json_lines.decoded, may_be_bytes=not file.where)
    lines = map(decoded, read_lines(stream, file.file_name, encoding))
    yield from filter(None, map(partial(_line, file, name), itertools.count(first_row), lines))


def _line(file: TextFile, name: str, row: int, line: Line) -> Record | None:
    """The document of a line; None if it is blank."""
    if not line.text or line.text.isspace():
        return None
    fields = json_lines.parse(line, f"{file.place}, line {row + 1}", file.column)
    return _record(f"{name}#{row}", fields, fields[file.column])


def _record(position: str, fields: dict[str, Any], text: object) -> Record:
    identifier, url = (_label(fields.get(key), position) for key in _LABELS)
    return Record(position, identifier, url, text, fields)


def _label(value: object, default: str) -> str:
    if value is None:
        return default
    return value.decode(errors="replace") if isinstance(value, bytes) else as_unicode(value)
