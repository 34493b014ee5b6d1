"""Checks the least and largest values that a Parquet file states for its columns.

Readers skip row groups by them, so one that is wrong hides rows. Checksums do not cover them.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


class Bounds:
    """The least and largest values that were read of each column of a row group."""

    def __init__(self) -> None:
        """Nothing has been read."""
        self._found: dict[str, tuple[Any, Any]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the values of some rows."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            least, most = pc.min_max(column).as_py().values()
            if least is not None:
                before = self._found.get(name, (least, most))
                self._found[name] = min(before[0], least), max(before[1], most)

    def contradicts(self, column: Any) -> bool:
        """Whether the metadata (of pyarrow) of a column of the row group rule out values of it."""
        stated, found = column.statistics, self._found.get(column.path_in_schema)
        if not found or stated is None or not stated.has_min_max:
            return False
        return bool(stated.min > found[0] or stated.max < found[1])
