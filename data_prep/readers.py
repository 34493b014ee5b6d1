"""Readers of the file formats. A broken file is a `UserError` that names it and the place."""

import codecs
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep.evidence import Piece, State, sha256_between, state_of
from data_prep.sources import Record, clean_file_name, clean_name
from data_prep.streams import PACKINGS, HashedFile, encoding_of, read_lines, read_text
from i3dist.errors import UserError

PARQUET = ".parquet"
_JSON_LINES = tuple(kind + packing for kind in (".jsonl", ".ndjson") for packing in PACKINGS)
SUFFIXES = (PARQUET, *_JSON_LINES, *(".txt" + packing for packing in PACKINGS))
SUFFIXES_IN_WORDS = f"{PARQUET}, .jsonl, .ndjson or .txt (but the first also with " + (
    f"{', '.join(PACKINGS[1:-1])} or {PACKINGS[-1]} after it)"
)
_LABELS = ("id", "url")
_ROWS_AT_A_TIME = 128
_MARK = codecs.BOM_UTF8.decode()
_NO_VALUE = ValueError, OverflowError, LookupError, pa.ArrowException


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    `name` is its path below the source's root, `number` its place in the order of names, `scheme`
    goes before the name in the url of a text file.
    """

    path: Path
    name: str
    number: int
    state: State
    scheme: str = ""

    def is_a(self, *suffixes: str) -> bool:
        """Whether the name ends so, in whatever case."""
        return self.name.lower().endswith(suffixes)


@dataclass(frozen=True)
class Span:
    """A part of a file that is read at one go: whole, or some row groups of a parquet file.

    `size` estimates the bytes of text. `start` and `stop` bound the bytes that the span hashes: of
    a parquet file a share, about where its row groups lie.
    """

    file: SourceFile
    size: int
    start: int
    stop: int
    row_groups: tuple[int, ...] = ()
    first_row: int = 0

    def records(self) -> Generator[Record, None, Piece]:
        """Read the documents in order; returns what was read."""
        path = self.file.path
        groups = f", row group {self.row_groups[0]}" if self.row_groups else ""
        with naming(f"{path}{groups}"), path.open("rb") as file:
            self._check_state(file)
            try:
                sha256 = yield from self._read(file)
            except Exception:  # half a change may look like damage
                self._check_state(file)
                raise
            self._check_state(file)
        return Piece(file=self.file.number, start=self.start, stop=self.stop, sha256=sha256)

    def _read(self, file: BinaryIO) -> Generator[Record, None, str]:
        if self.file.is_a(PARQUET):
            # Row groups are not read in one go, but what was just hashed is still in memory.
            sha256 = sha256_between(file, self.start, self.stop)
            yield from _read_parquet(self, file)
            return sha256
        if not self.file.state[0] and self.file.is_a(*PACKINGS[1:]):
            raise EOFError("it is empty")  # gzip's command says so too, its module reads nothing
        hashed = HashedFile(file)
        yield from _read_text(self.file, hashed, encoding_of(self.file.path))
        return hashed.sha256()

    def _check_state(self, file: BinaryIO) -> None:
        # Not the time of the file's entry: it also changes where permissions or other links do.
        if state_of(file.fileno())[:2] != self.file.state[:2]:
            raise UserError(
                f"{self.file.path} changed while it was read: run the same command again when "
                "nothing writes to it"
            )


@contextmanager
def naming(place: Path | str) -> Iterator[None]:
    """Turn whatever a library raises while it reads at `place` into a `UserError` that names it."""
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


def spans_of(file: SourceFile) -> list[Span]:
    """The spans of a file; a parquet file without exactly one column `text` is a `UserError`."""
    size = file.state[0]
    if not file.is_a(PARQUET):
        return [Span(file, size, 0, size)]
    with naming(file.path), file.path.open("rb") as handle, pq.ParquetFile(handle) as parquet:
        names = parquet.schema_arrow.names
        if (count := names.count("text")) != 1:
            found = ", ".join(names[:20])
            wrong = f"has {count} columns 'text'" if count else "has no column 'text'"
            raise UserError(f"{file.path} {wrong}; its columns are {found}")
        groups = [parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups)]
        if sum(group.num_rows for group in groups) != parquet.metadata.num_rows:
            raise ValueError("its footer contradicts itself on the number of rows")
    if not groups:
        return [Span(file, 0, 0, size)]
    # A group's own offsets are not asked for: pyarrow aborts where a damaged footer holds them.
    cuts = [size * number // len(groups) for number in range(len(groups) + 1)]
    first_rows = itertools.accumulate((group.num_rows for group in groups), initial=0)
    return [
        Span(file, group.total_byte_size, cuts[n], cuts[n + 1], (n,), row)
        for n, (group, row) in enumerate(zip(groups, first_rows, strict=False))
    ]


def _read_parquet(span: Span, file: BinaryIO) -> Iterator[Record]:
    if not span.row_groups:
        return
    name = clean_file_name(span.file.name)
    row = span.first_row
    with _open_parquet(file) as parquet:
        columns = [_text(parquet, span), *(_labels(parquet, span, key) for key in _LABELS)]
        for values in zip(*columns, strict=False):
            yield _record(f"{name}#{row}", dict(zip(("text", *_LABELS), values, strict=True)))
            row += 1


def _text(parquet: pq.ParquetFile, span: Span) -> Iterator[Any]:
    """The values of the column `text`; pyarrow passes over a damaged page without a word."""
    expected = sum(parquet.metadata.row_group(number).num_rows for number in span.row_groups)
    rows = 0
    for value in _column(parquet, span, "text"):
        yield value
        rows += 1
    if rows != expected:
        raise EOFError(f"it holds {rows} rows of text, not {expected}")


def _labels(parquet: pq.ParquetFile, span: Span, key: str) -> Iterator[Any]:
    """The values of a column, and None without end after them, or after what is no value.

    A column of its own, since one that cannot be read must not cost the text.
    """
    if key in parquet.schema_arrow.names:
        with suppress(*_NO_VALUE):
            yield from _column(parquet, span, key)
    yield from itertools.repeat(None)


def _column(parquet: pq.ParquetFile, span: Span, key: str) -> Iterator[Any]:
    batches = parquet.iter_batches(_ROWS_AT_A_TIME, span.row_groups, [key], use_threads=False)
    for batch in batches:
        # `id` may be there twice: the first counts.
        yield from _values(batch.column(batch.schema.names.index(key)), key == "text")


def _open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """The file with its dictionaries as plain columns.

    Of a column that pyarrow was told to make a dictionary, it refuses all for one value of bad
    UTF-8. It is told so in the footer, under a key that is hidden from it here.
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
    """Python values; text as bytes, because one value of bad UTF-8 must not cost its neighbours.

    Of other types, what can be no text is True where `is_text`, else what the type can be read as,
    or None.
    """
    plain = column.storage if isinstance(column.type, pa.BaseExtensionType) else column
    if _is_string(plain.type):
        return plain.cast(pa.large_binary()).to_pylist()
    if is_text and not _is_binary(column.type):
        return [True if valid else None for valid in column.is_valid().to_pylist()]
    with suppress(*_NO_VALUE):
        return column.to_pylist()
    for kind in (pa.string(), pa.int64()):  # times beyond Python's, and of unknown time zones
        with suppress(*_NO_VALUE):
            return column.cast(kind).to_pylist()
    return [None] * len(column)


def _is_string(kind: pa.DataType) -> bool:
    tests = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(test(kind) for test in tests)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    tests = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    return any(test(kind) for test in tests)


def _read_text(file: SourceFile, stream: HashedFile, encoding: str | None) -> Iterator[Record]:
    name = clean_file_name(file.name)
    if not file.is_a(*_JSON_LINES):
        yield Record(name, name, file.scheme + name, read_text(stream, file.name, encoding))
        return
    for row, line in enumerate(read_lines(stream, file.name, encoding)):
        # Bad bytes become lone surrogates: bad UTF-8 in the text is found as theirs are.
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
    except ValueError:  # a whole number of more digits than `int` takes
        fields = json.loads(line, parse_int=Decimal)
        if isinstance(fields, dict) and "text" in fields:
            return fields
        raise


def _record(position: str, fields: dict[str, Any]) -> Record:
    identifier, url = (_label(fields.get(key), position) for key in _LABELS)
    return Record(position, identifier, url, fields["text"])


def _label(value: object, default: str) -> str:
    if value is None:
        return default
    return value.decode(errors="replace") if isinstance(value, bytes) else clean_name(value)
