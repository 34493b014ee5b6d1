"""Readers of parquet, jsonl and txt. A broken file is a `UserError` that names file and place."""

import codecs
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep.evidence import Piece, State, sha256_between, state_of
from data_prep.row_filter import kept_lines, kept_rows
from data_prep.sources import Record, Skip, clean_file_name
from data_prep.streams import PACKINGS, HashedFile, encoding_of, read_lines, read_text
from data_prep.where import STRINGS, Where
from i3dist.cli.paths import as_unicode
from i3dist.errors import UserError

PARQUET = ".parquet"
JSON_LINES = tuple(kind + packing for kind in (".jsonl", ".ndjson") for packing in PACKINGS)
SUFFIXES = (PARQUET, *JSON_LINES, *(".txt" + packing for packing in PACKINGS))
SUFFIXES_IN_WORDS = f"{PARQUET}, .jsonl, .ndjson or .txt (all but {PARQUET} also with " + (
    f"{', '.join(PACKINGS[1:-1])} or {PACKINGS[-1]} after it)"
)
_LABELS = ("id", "url")
_ROWS_AT_A_TIME = 128
_MARK = codecs.BOM_UTF8.decode()
_BINARY = (pa.binary(), pa.large_binary(), pa.binary_view())
_NO_VALUE = ValueError, OverflowError, LookupError, pa.ArrowException


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    `name` is its path below the source's root, and `number` its place in the order of names. The
    url of a txt file is `scheme` and `name`.
    """

    path: Path
    name: str
    number: int
    state: State
    scheme: str = ""

    def is_a(self, *suffixes: str) -> bool:
        """Whether the name ends in one of these, in upper or lower case."""
        return self.name.lower().endswith(suffixes)


@dataclass(frozen=True)
class Span:
    """What is read of a file in one go: all of it, or one row group of a parquet file.

    `size` estimates the bytes of text. `start` and `stop` bound the bytes that the span hashes. The
    row groups of a parquet file share its bytes out, each about where it lies.
    """

    file: SourceFile
    size: int
    start: int
    stop: int
    row_group: int | None = None
    first_row: int = 0
    where: Where | None = None

    def records(self) -> Generator[Record, None, Piece]:
        """Read the documents in order; returns what was read."""
        path = self.file.path
        group = "" if self.row_group is None else f", row group {self.row_group}"
        with naming(f"{path}{group}"), path.open("rb") as file:
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
            yield from _read_parquet(self, file)
            return sha256
        if not self.file.state[0] and self.file.is_a(*PACKINGS[1:]):
            raise EOFError("it is empty")  # as the gzip command says; Python's module says nothing
        hashed = HashedFile(file)
        records = _read_text(self.file, hashed, encoding_of(self.file.path))
        yield from kept_lines(records, self.where, self.file.path) if self.where else records
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
        reason = " ".join(reason.split())[:200]
        raise UserError(f"cannot read {place}: {reason}; repair or remove it") from None


def spans_of(file: SourceFile, where: Where | None = None) -> list[Span]:
    """The spans of a file, of which only rows are read for which `where` is true.

    Raises:
        UserError: a parquet file is damaged, does not have exactly one column `text`, or has
            columns that `where` does not fit.
    """
    size = file.state[0]
    if not file.is_a(PARQUET):
        return [Span(file, size, 0, size)]
    with naming(file.path), file.path.open("rb") as handle, pq.ParquetFile(handle) as parquet:
        names = parquet.schema_arrow.names
        if (count := names.count("text")) != 1:
            found = ", ".join(names[:20])
            wrong = f"has {count} columns 'text'" if count else "has no column 'text'"
            raise UserError(f"{file.path} {wrong}; its columns are {found}")
        if where:
            where.check(parquet.schema_arrow, file.path)
        groups = [parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups)]
        if sum(group.num_rows for group in groups) != parquet.metadata.num_rows:
            raise ValueError("its footer contradicts itself on the number of rows")
    if not groups:
        return [Span(file, 0, 0, size)]
    # Not at the groups' own offsets: pyarrow aborts where a damaged footer holds wrong ones.
    cuts = [size * number // len(groups) for number in range(len(groups) + 1)]
    first_rows = itertools.accumulate((group.num_rows for group in groups), initial=0)
    return [
        Span(file, group.total_byte_size, cuts[n], cuts[n + 1], n, row, where)
        for n, (group, row) in enumerate(zip(groups, first_rows, strict=False))
    ]


def _read_parquet(span: Span, file: BinaryIO) -> Iterator[Record]:
    if span.row_group is None:
        return
    name = clean_file_name(span.file.name)
    row = span.first_row
    kept: Iterable[bool] = itertools.repeat(True)
    if span.where:
        place = f"{span.file.path}, row group {span.row_group}"
        kept = rows = kept_rows(file, span.row_group, span.where, place).tolist()
        if not any(rows):
            for number in range(row, row + len(rows)):
                yield Record(f"{name}#{number}", "", "", Skip.WHERE)
            return
    with _open_parquet(file) as parquet:
        columns = [_text(parquet, span), *(_labels(parquet, span, key) for key in _LABELS)]
        for *values, is_kept in zip(*columns, kept, strict=False):
            record = _record(f"{name}#{row}", dict(zip(("text", *_LABELS), values, strict=True)))
            yield record if is_kept else replace(record, text=Skip.WHERE)
            row += 1


def _text(parquet: pq.ParquetFile, span: Span) -> Iterator[Any]:
    """The values of the column `text`, which are counted: pyarrow skips a damaged page silently."""
    expected = parquet.metadata.row_group(span.row_group).num_rows
    rows = 0
    for value in _column(parquet, span, "text"):
        yield value
        rows += 1
    if rows != expected:
        raise EOFError(f"it holds {rows} rows of text, not {expected}")


def _labels(parquet: pq.ParquetFile, span: Span, key: str) -> Iterator[Any]:
    """The values of a column, then None without end; values end where one cannot be read.

    Labels are not read together with the text, because an unreadable label must not cost the text.
    """
    if key in parquet.schema_arrow.names:
        with suppress(*_NO_VALUE):
            yield from _column(parquet, span, key)
    yield from itertools.repeat(None)


def _column(parquet: pq.ParquetFile, span: Span, key: str) -> Iterator[Any]:
    batches = parquet.iter_batches(_ROWS_AT_A_TIME, [span.row_group], [key], use_threads=False)
    for batch in batches:
        # There may be two columns `id`: the first counts.
        yield from _values(batch.column(batch.schema.names.index(key)), key == "text")


def _open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """The file with its dictionary columns as plain ones.

    pyarrow refuses a whole dictionary column for one value of bad UTF-8. The footer asks for
    dictionaries under the key `ARROW:schema`, which is hidden from pyarrow here.
    """
    parquet = pq.ParquetFile(file)
    fields = [field for field in parquet.schema_arrow if field.name in ("text", *_LABELS)]
    if not any(pa.types.is_dictionary(field.type) for field in fields):
        return parquet
    file.seek(-8, os.SEEK_END)
    size = int.from_bytes(file.read(4), "little")
    file.seek(-8 - size, os.SEEK_END)
    footer = file.read(size).replace(b"ARROW:schema", b"arrow:schema") + file.read()
    return pq.ParquetFile(file, metadata=pq.read_metadata(pa.BufferReader(b"PAR1" + footer)))


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


def _read_text(file: SourceFile, stream: HashedFile, encoding: str | None) -> Iterator[Record]:
    name = clean_file_name(file.name)
    if not file.is_a(*JSON_LINES):
        yield Record(name, name, file.scheme + name, read_text(stream, file.name, encoding))
        return
    for row, line in enumerate(read_lines(stream, file.name, encoding)):
        # Bad bytes become lone surrogates, which `usable_text` finds.
        text = line.decode("utf-8", "surrogateescape").removeprefix(_MARK)
        if text and not text.isspace():
            yield _record(f"{name}#{row}", _parse_line(text, f"{file.path}, line {row + 1}"))


def _parse_line(line: str, place: str) -> dict[str, Any]:
    try:
        fields = _loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep, or a number too long")
        raise UserError(f"{place}: broken JSON ({reason}); repair or remove it") from None
    if not isinstance(fields, dict) or "text" not in fields:
        raise UserError(f"{place}: no key 'text'")
    return fields


def _loads(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a whole number with more digits than `int` takes
        fields = json.loads(line, parse_int=Decimal)
        if isinstance(fields, dict) and "text" in fields:
            return fields
        raise


def _record(position: str, fields: dict[str, Any]) -> Record:
    identifier, url = (_label(fields.get(key), position) for key in _LABELS)
    return Record(position, identifier, url, fields["text"], fields)


def _label(value: object, default: str) -> str:
    if value is None:
        return default
    return value.decode(errors="replace") if isinstance(value, bytes) else as_unicode(value)
