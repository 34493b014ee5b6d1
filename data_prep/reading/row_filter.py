"""Leaves out the rows of parquet and jsonl of which a condition is not true."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.reading.where import Kept, Where
from data_prep.sources import Record, Skip
from i3dist.errors import UserError

_ROWS, _ROWS_WITH_TEXT = 1024, 128
_LINES, _LINES_BYTES = 1024, 1 << 22
SAMPLED_FILES, SAMPLED_LINES = 16, 1000

Records = Callable[[], Iterable[Record]]
"""Reads the lines of a file."""


def no_columns(place: object) -> UserError:
    """The error for a condition on the file at `place`, which is not made of rows."""
    return UserError(
        f"--where needs rows with columns, and {place} has none: name only parquet and jsonl with "
        "--source, or omit --where"
    )


def kept_rows(parquet: pq.ParquetFile, row_group: int, where: Where, place: object) -> Kept:
    """Which rows of a row group of a parquet file are kept; reads only the columns that it takes.

    Raises:
        UserError: the condition cannot be computed for a value.
    """
    columns = where.columns(parquet.schema_arrow.names)
    rows = _ROWS_WITH_TEXT if "text" in columns else _ROWS
    batches = parquet.iter_batches(rows, [row_group], columns, use_threads=False)
    kept = [where.kept(batch, place) for batch in batches]
    give_back()
    found, expected = sum(map(len, kept)), parquet.metadata.row_group(row_group).num_rows
    if found != expected:  # pyarrow skips a damaged page silently
        raise EOFError(f"it holds {found} rows of {', '.join(columns)}, not {expected}")
    return np.concatenate(kept) if kept else np.empty(0, bool)


def kept_lines(records: Iterable[Record], where: Where, place: object) -> Iterator[Record]:
    """Records of lines of jsonl; those that are not kept have the reason as their text."""
    for batch in _batches(records):
        kept = where.kept_lines([record.columns or {} for record in batch], place).tolist()
        give_back()
        batch.reverse()
        # `pop`, and no variables: nothing keeps a record that was taken.
        yield from (_chosen(batch.pop(), is_kept) for is_kept in kept)


def _chosen(record: Record, is_kept: bool) -> Record:
    return record if is_kept else replace(record, text=Skip.WHERE, columns=None)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.text) if isinstance(record.text, str) else 0
        del record
        if len(batch) == _LINES or size >= _LINES_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def give_back() -> None:
    """Give memory that Arrow keeps back to the system: a text may have been large."""
    pa.default_memory_pool().release_unused()


def for_sample(where: Where, files: Sequence[Records], place: object) -> Where:
    """The condition for lines of jsonl, whose columns are those of the first lines of some files.

    The files are evenly spaced. If these are empty the columns are those of the first that is not.

    Raises:
        UserError: the condition does not fit the columns.
    """
    count = min(SAMPLED_FILES, len(files))
    chosen = [files[len(files) * number // count] for number in range(count)]
    rows = [row for file in chosen for row in _first_rows(file, where)]
    rows = rows or next(filter(None, (_first_rows(file, where) for file in files)), [])
    return where.for_lines(rows, place) if rows else where


def _first_rows(file: Records, where: Where) -> list[Mapping[str, Any]]:
    """All names in the first lines of a file, and the values that the condition may use."""
    rows: list[Mapping[str, Any]] = []
    for record in islice(file(), SAMPLED_LINES):
        columns = record.columns or {}
        used = where.columns(tuple(columns))
        rows.append({name: columns[name] if name in used else None for name in columns})
    return rows
