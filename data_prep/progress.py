"""The progress bar of a pass, and the table that a run ends with."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_prep.dropped import BySource, rows
from data_prep.workers import Report
from i3dist.data.manifest import Manifest, SourceCounts
from i3dist.errors import printable

SOURCE_HEADINGS = ("source", "weight", "documents", "tokens", "epochs")
_REDRAW_S = 0.1


@contextmanager
def pass_bar(console: Console, title: str, unit: str, total: int) -> Iterator[Report]:
    """Show a bar over `total` units; of a pass over tokens also their mean rate since its start."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + "{task.fields[tokens]}"),
        TimeElapsedColumn(),
    )
    start = drawn = time.monotonic()
    done = tokens = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, tokens="")

        def report(more_units: int, more_tokens: int) -> None:
            nonlocal drawn, done, tokens
            done += more_units
            tokens += more_tokens
            now = time.monotonic()
            if now - drawn >= _REDRAW_S or done >= total:
                drawn = now
                speed = tokens / max(now - start, 1e-9)
                counted = f", {tokens:,} tokens, {speed:,.0f}/s" if tokens else ""
                progress.update(task, completed=done, tokens=counted)

        yield report


def closing_table(
    manifests: Mapping[str, Manifest], skipped: Mapping[str, int], seconds: float
) -> Table:
    """A row for each split, then the time, the speed, and the skipped documents by reason."""
    tokens = sum(manifest.tokens for manifest in manifests.values())
    reasons = [f"{count:,} {reason}" for reason, count in sorted(skipped.items())]
    left_out = f"skipped documents: {', '.join(reasons)}" if reasons else "no document skipped"
    speed = f"{seconds:,.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
    table = Table(title="Shards", caption=f"{speed}; {left_out}")
    for heading in ("split", "documents", "tokens", "chunks", "shards", "MB"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, manifest in sorted(manifests.items()):
        size = sum(shard.size for shard in manifest.shards) / 1e6
        counts = (manifest.documents, manifest.tokens, manifest.chunks, len(manifest.shards))
        table.add_row(split, *(f"{count:,}" for count in counts), f"{size:,.1f}")
    return table


def sources_table(sources: Iterable[SourceCounts]) -> Table:
    """A row for each of several sources."""
    table = Table(title="Sources")
    for heading in SOURCE_HEADINGS:
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for source in sources:
        table.add_row(*(escape(printable(cell)) for cell in source_row(source)))
    return table


def source_row(source: SourceCounts) -> tuple[str, str, str, str, str]:
    """What is shown of one of several sources, below `SOURCE_HEADINGS`."""
    counts = f"{source.documents:,}", f"{source.tokens:,}", f"{source.epochs:,.3f}"
    return (source.name, f"{source.weight:g}", *counts)


def dropped_table(dropped: Mapping[str, BySource], *, of_splits: bool) -> Table:
    """Documents that were dropped, by source and reason; `dropped` has them by split.

    With `of_splits` each split has sources of its own. Otherwise all have the same.
    """
    table = Table(title="Dropped documents")
    table.add_column("source", overflow="fold")
    table.add_column("reason")
    table.add_column("documents", justify="right")
    splits = sorted(dropped) if of_splits else sorted(dropped)[:1]
    for split in splits:
        for source, reason, count in rows(dropped[split]):
            name = f"{split}: {source}" if of_splits else source
            table.add_row(escape(printable(name)), reason, f"{count:,}")
    return table
