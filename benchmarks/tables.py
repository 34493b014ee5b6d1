"""The form of every table that the benchmarks print."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table


def table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: int = 1,
    **options: Any,
) -> Table:
    """A table whose first `left` columns hold text, and whose other columns hold numbers."""
    made = Table(title=title, **options)
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="left" if number < left else "right")
    for row in rows:
        made.add_row(*row)
    return made
