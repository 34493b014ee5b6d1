"""The option --where: a condition on the columns of a source's rows, computed by DuckDB.

Rows stay in the source's order, and each is judged by itself. So what may give another answer for
the same row is refused: subqueries, aggregates, and functions such as `random` or `now`.

Columns of parquet have their own types. A line of jsonl has none: its columns and their types are
those of a sample of the lines. All numbers are DOUBLE then, and a value of another type than its
column's is cast, or NULL where that cannot be. A row of which the condition is NULL is excluded.
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from i3dist.errors import UserError

Kept = NDArray[np.bool_]
"""For each row, whether it is kept: [rows]."""

_CONFIG: dict[str, Any] = {
    "threads": 1,  # so rows stay in order
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
}
_TABLE = "source"
_OF_THREAD = threading.local()
_LONGEST_REASON = 200
_DEEPEST = 32  # lists and objects in each other that have types; deeper ones are VARCHAR
STRINGS = (pa.string(), pa.large_string(), pa.string_view())
_NUMBERS = ("DOUBLE", "UBIGINT", "BIGINT", "HUGEINT", "UHUGEINT")
_REFUSED = {
    "SUBQUERY": "it has a subquery",
    "STAR": "it has a star",
    "PARAMETER": "it has a parameter",
    "POSITIONAL_REFERENCE": "it names a column by number",
}
# The answer depends on the time or on chance. `age` does with one argument.
_UNSTABLE = """
SELECT DISTINCT function_name FROM duckdb_functions()
WHERE stability = 'VOLATILE' OR (stability = 'CONSISTENT_WITHIN_QUERY' AND len(parameters) = 0)
"""


@dataclass(frozen=True)
class Where:
    """A condition. `names` are those in it that may be columns.

    `types` tells the types of the columns in lines of jsonl, as DuckDB's `from_json` takes them.
    """

    expression: str
    names: frozenset[str]
    types: str = ""

    @classmethod
    def parse(cls, expression: str) -> "Where":
        """The condition that an expression of SQL stands for.

        Raises:
            UserError: it is none.
        """
        nodes = list(_nodes(_parsed(expression)))
        for node in nodes:
            if problem := _REFUSED.get(node["class"]):
                raise _wrong(expression, f"{problem}, and a condition is of the row's own columns")
        references = (node for node in nodes if node["class"] == "COLUMN_REF")
        names = frozenset(name for node in references for name in node["column_names"])
        return cls(expression, names)

    def columns(self, available: Sequence[str]) -> list[str]:
        """Those of the available columns that the condition may use."""
        by_name = {name.casefold(): name for name in reversed(available)}
        found = {name if name in available else by_name.get(name.casefold()) for name in self.names}
        return [name for name in dict.fromkeys(available) if name in found]

    def check(self, schema: pa.Schema, place: object) -> None:
        """Check the condition against the columns of rows at `place`.

        Raises:
            UserError: it does not fit them; the line names the columns that there are.
        """
        twice = [name for name in self.columns(schema.names) if schema.names.count(name) > 1]
        problem = f"there are several columns {twice[0]}" if twice else _problem(self, schema)
        if problem:
            raise self._misfit(problem, schema.names, place)

    def for_lines(self, rows: Sequence[Mapping[str, Any]], place: object) -> "Where":
        """The condition for lines of jsonl, whose columns and types are those of a sample.

        Raises:
            UserError: the condition does not fit them.
        """
        available = list(dict.fromkeys(name for row in rows for name in row))
        lines = _lines(rows, self.columns(available))
        try:
            ((found,),) = _rows("SELECT json_group_structure(line::JSON) FROM source", lines)
        except _duckdb().Error as error:
            raise self._misfit(_reason(error), available, place) from None
        bound = replace(self, types=json.dumps(_simplified(json.loads(found))))
        if problem := bound._problem(lines[:0], available):
            raise self._misfit(problem, available, place)
        return bound

    def kept(self, rows: pa.Table | pa.RecordBatch, place: object) -> Kept:
        """Which rows are kept. They have all columns that the condition uses.

        Raises:
            UserError: the condition cannot be computed for a value.
        """
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        query = f"SELECT coalesce(({self.expression}\n), false) FROM {self._source}"
        try:
            return np.array([kept for (kept,) in _rows(query, _in_unicode(table))], bool)
        except pa.ArrowInvalid as error:
            raise _wrong(self.expression, f"{_reason(error)} ({place})") from None
        except _duckdb().Error as error:
            advice = "TRY(...) and TRY_CAST make NULL of what cannot be computed"
            raise _wrong(self.expression, f"{_reason(error)} ({place}); {advice}") from None

    def kept_lines(self, rows: Sequence[Mapping[str, Any]], place: object) -> Kept:
        """As `kept`, of the values of lines of jsonl."""
        return self.kept(_lines(rows, list(json.loads(self.types))), place)

    @property
    def _source(self) -> str:
        if not self.types:
            return _TABLE
        types = self.types.replace("'", "''")
        return f"(SELECT line.* FROM (SELECT from_json(line, '{types}') AS line FROM {_TABLE}))"

    def _misfit(self, problem: str, available: Sequence[str], place: object) -> UserError:
        there = f"{place} has the columns {', '.join(available)}"
        return _wrong(self.expression, f"{problem}; {there}")

    def _problem(self, empty: pa.Table, available: Sequence[str]) -> str | None:
        """Why the condition does not fit the columns that are available; `empty` has no rows."""
        if changing := _unstable(self.expression) - {name.casefold() for name in available}:
            return f"{min(changing)} has another value each time"
        if not self.columns(available):
            names = " or ".join(sorted(self.names))
            return f"there is no column {names}" if names else "it names no column"
        try:
            # A condition after WHERE may hold no aggregate and no window function.
            _rows(f"SELECT 1 FROM {self._source} WHERE ({self.expression}\n)", empty)
            kind = _type(f"SELECT ({self.expression}\n) FROM {self._source}", empty)
        except _duckdb().Error as error:
            return _reason(error)
        return None if kind == "BOOLEAN" else f"it is {kind}, not true or false"


@lru_cache
def _problem(where: Where, schema: pa.Schema) -> str | None:
    fields = [schema.field(schema.names.index(name)) for name in where.columns(schema.names)]
    return where._problem(pa.schema(fields).empty_table(), schema.names)


def _wrong(expression: str, problem: str) -> UserError:
    return UserError(f"--where {expression!r}: {problem}")


def _parsed(expression: str) -> Any:
    """The syntax tree of one expression."""
    statements = []
    for text in (expression, "true"):
        query = "SELECT json_serialize_sql(?)"
        found = _connection().execute(query, [f"SELECT ({text}\n)"]).fetchall()
        answer = json.loads(found[0][0])
        if answer["error"]:
            raise _wrong(expression, _first_line(answer["error_message"]))
        (statement,) = answer["statements"]
        statements.append((statement["node"].pop("select_list"), statement))
    (found, around), (_, usual) = statements
    if around != usual or len(found) != 1:
        raise _wrong(expression, "it is not one expression")
    return found[0]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All expressions in a syntax tree."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        for below in tree.values():
            yield from _nodes(below)
    elif isinstance(tree, list):
        for below in tree:
            yield from _nodes(below)


def _unstable(expression: str) -> set[str]:
    """Names in an expression, in lower case, of functions that do not depend on arguments only."""
    used = set()
    for node in _nodes(_parsed(expression)):
        if node["class"] == "COLUMN_REF" and len(node["column_names"]) == 1:
            used.add(node["column_names"][0].lower())  # current_date needs no parentheses
        elif node["class"] == "FUNCTION":
            name = node["function_name"].lower()
            used.add(name if name != "age" or len(node["arguments"]) == 1 else "")
    return used & ({name for (name,) in _connection().sql(_UNSTABLE).fetchall()} | {"age"})


def _simplified(types: Any, depth: int = _DEEPEST) -> Any:
    """What `json_group_structure` found, with DOUBLE for numbers and VARCHAR for what varies."""
    if isinstance(types, dict) and types and depth:
        return {name: _simplified(kind, depth - 1) for name, kind in types.items()}
    if isinstance(types, list) and depth:
        return [_simplified(kind, depth - 1) for kind in types]
    return "DOUBLE" if types in _NUMBERS else types if types == "BOOLEAN" else "VARCHAR"


def _lines(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pa.Table:
    """Some values of lines of jsonl, again as JSON; what is no Unicode becomes a question mark."""
    lines = (
        json.dumps({name: row.get(name) for name in columns}, ensure_ascii=False, default=str)
        for row in rows
    )
    values = [line.encode("utf-8", "replace") for line in lines]
    return pa.table({"line": pa.array(values, pa.binary()).cast(pa.string())})


def _in_unicode(table: pa.Table) -> pa.Table:
    """The table with U+FFFD for bad UTF-8, at which functions of DuckDB may fail for good.

    Raises:
        pa.ArrowInvalid: there is bad UTF-8 inside a list or a struct.
    """
    with suppress(pa.ArrowInvalid):
        table.validate(full=True)
        return table
    repaired = pa.table([_repaired(column) for column in table.columns], names=table.column_names)
    repaired.validate(full=True)
    return repaired


def _repaired(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.type not in STRINGS:
        return column
    values = column.cast(pa.large_binary()).to_pylist()
    texts = [value if value is None else value.decode("utf-8", "replace") for value in values]
    return pa.array(texts, pa.string())


def _rows(query: str, table: pa.Table) -> list[Any]:
    """The answer to a query about a table, which it calls `source`."""
    connection = _connection()
    connection.register(_TABLE, table)
    try:
        return connection.sql(query).fetchall()
    finally:
        connection.unregister(_TABLE)


def _type(query: str, table: pa.Table) -> str:
    """The type of the only column of the answer."""
    connection = _connection()
    connection.register(_TABLE, table)
    try:
        return str(connection.sql(query).types[0])
    finally:
        connection.unregister(_TABLE)


def _duckdb() -> Any:
    import duckdb  # late, for those who do not use it

    return duckdb


def _connection() -> Any:
    """A connection of this thread's own: footers at URLs are read by several threads."""
    if not hasattr(_OF_THREAD, "connection"):
        _OF_THREAD.connection = _duckdb().connect(":memory:", config=_CONFIG)
        _OF_THREAD.connection.execute("SET TimeZone = 'UTC'").fetchall()
    return _OF_THREAD.connection


def _reason(error: Exception) -> str:
    """What DuckDB says, in one line."""
    text = _first_line(str(error))
    if found := re.search(r'Referenced column "(.*)" not found', text):
        return f"there is no column {found[1]}"
    return re.sub(r"^\w+( \w+)? Error: ", "", text)[:_LONGEST_REASON]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip().rstrip("!")
