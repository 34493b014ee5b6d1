"""Readers of the file formats. A broken file is a `UserError` that names it."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.records import Record, clean_name
from i3dist.errors import UserError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".parquet", *JSON_SUFFIXES, ".txt")
_ROWS_AT_A_TIME = 128


@dataclass(frozen=True)
class Span:
    """A part of a file that is read at one go: whole, or some row groups of a parquet file.

    `name` is the file's path below the source's root, `scheme` goes before it in the url of a
    text file, `size` estimates the bytes of text.
    """

    path: Path
    name: str
    size: int
    scheme: str = ""
    row_groups: tuple[int, ...] = ()
    first_row: int = 0

    def records(self) -> Iterator[Record]:
        """Read the documents in order."""
        with naming(self.path):
            if self.name.endswith(".parquet"):
                yield from _read_parquet(self)
            elif self.name.endswith(JSON_SUFFIXES):
                yield from _read_jsonl(self)
            else:
                name = clean_name(self.name)
                text = self.path.read_bytes()
                yield Record(name, name, self.scheme + name, text)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever a library raises while it reads `path` into a `UserError` that names it."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = " ".join(reason.split())[:200]
        raise UserError(f"cannot read {path}: {reason}; repair or remove it") from None


def parquet_spans(path: Path, name: str) -> Iterator[Span]:
    """One span per row group; a file without a `text` column is a `UserError`."""
    with naming(path), pq.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            found = ", ".join(file.schema_arrow.names[:20])
            raise UserError(f"{path} has no column 'text'; its columns are {found}")
        first = 0
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            yield Span(path, name, group.total_byte_size, "", (number,), first)
            first += group.num_rows


def _read_parquet(span: Span) -> Iterator[Record]:
    name = clean_name(span.name)
    row = span.first_row
    with pq.ParquetFile(span.path) as file:
        columns = [c for c in ("text", "id", "url") if c in file.schema_arrow.names]
        batches = file.iter_batches(_ROWS_AT_A_TIME, span.row_groups, columns, use_threads=False)
        for batch in batches:
            values = {c: _values(batch.column(c)) for c in columns}
            for i in range(batch.num_rows):
                position = f"{name}#{row}"
                fields = {c: values[c][i] for c in columns}
                yield _record(position, fields)
                row += 1


def _values(column: pa.Array) -> list[Any]:
    """Python values; text as bytes, because one value of bad UTF-8 must not cost its neighbours."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def _read_jsonl(span: Span) -> Iterator[Record]:
    name = clean_name(span.name)
    with pa.input_stream(str(span.path)) as stream:
        for row, line in enumerate(io.BufferedReader(stream)):
            if not line.isspace():
                yield _record(f"{name}#{row}", _parse_line(line, f"{span.path}, line {row + 1}"))


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError:
        return {"text": line}
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep, or a number too long")
        raise UserError(f"{place}: broken JSON ({reason}); repair or remove it") from None
    if not isinstance(fields, dict) or "text" not in fields:
        raise UserError(f"{place}: no key 'text'")
    return fields


def _record(position: str, fields: dict[str, Any]) -> Record:
    identifier, url = (_label(fields.get(key), position) for key in ("id", "url"))
    return Record(position, identifier, url, fields["text"])


def _label(value: object, default: str) -> str:
    if value is None:
        return default
    return value.decode(errors="replace") if isinstance(value, bytes) else clean_name(value)
