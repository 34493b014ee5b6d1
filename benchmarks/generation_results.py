"""The results of benchmarks/generation.py: rows, figures with targets, a table."""

from collections.abc import Iterator
from dataclasses import dataclass

from results import Figure
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One contestant at one batch and context."""

    contestant: str
    batch: int
    context: int
    ms: float  # of a step, or of a prompt
    slowest_ms: float
    tokens_per_s: float
    weight_bytes: int = 0  # that a step reads
    cache_bytes: int = 0
    share: float | None = None  # of the copy bandwidth
    memory_gib: float | None = None  # most that was reserved on the GPU


def gpu_figures(
    rows: list[Row], contexts: tuple[int, int, int, int], batches: tuple[int, int, int]
) -> list[Figure]:
    """The figures of merit whose rows were measured."""
    at = {(row.contestant, row.batch, row.context): row for row in rows}
    short, medium, long, longest = contexts
    one, some, many = batches
    found: list[Figure] = []

    def i3(batch: int, context: int) -> Row | None:
        return at.get(("i3 together", batch, context))

    if row := i3(one, short):
        found.append(Figure("batch 1, tokens/s", row.tokens_per_s, ",.0f", least=3_000))
        share = (row.share or 0.0) * row.weight_bytes / (row.weight_bytes + row.cache_bytes)
        found.append(Figure("batch 1, share of bandwidth, weights", share, ".1%", least=0.45))
        if far := i3(one, longest):
            name = f"time at context {longest:,} / at {short:,}"
            found.append(Figure(name, far.ms / row.ms, ".3f", most=1.05))
            if row.memory_gib and far.memory_gib:
                name = f"memory at context {longest:,} / at {short:,}"
                found.append(Figure(name, far.memory_gib / row.memory_gib, ".3f", most=1.05))
    if row := i3(many, short):
        found.append(Figure(f"batch {many}, tokens/s", row.tokens_per_s, ",.0f", least=100_000))
    for batch, context, least in ((many, medium, 6.0), (some, long, 15.0)):
        ours = i3(batch, context)
        for name, target in (("gpt", least), ("gpt-4kv", None)):
            if ours and (gpt := at.get((name, batch, context))):
                what = f"i3 / {name} at context {context:,}, batch {batch}"
                ratio = ours.tokens_per_s / gpt.tokens_per_s
                found.append(Figure(what, ratio, ".1f", least=target))
    return found + [figure for row in rows for figure in row_figures(row)]


def row_figures(row: Row) -> Iterator[Figure]:
    """The figures of one row."""
    where = f"{row.contestant}, batch {row.batch}, context {row.context:,}"
    if row.contestant in ("i3 together", "i3 apart"):
        yield Figure(f"{where}: slowest / median", row.slowest_ms / row.ms, ".2f", most=2.0)
    elif row.contestant in ("gpt", "gpt-4kv"):
        yield Figure(f"{where}: share", row.share or 0.0, ".1%", least=0.6)
    elif row.contestant == "i3 prompt":
        yield Figure("prompt, tokens/s", row.tokens_per_s, ",.0f", least=400_000)
    elif row.contestant == "first token":
        yield Figure("first token, s", row.ms / 1e3, ".1f", most=8.0)


def table(rows: list[Row], title: str, bandwidth: float) -> Table:
    """All rows."""
    shown = Table(title=title, caption=f"copy bandwidth {bandwidth / 1e9:,.0f} GB/s")
    headings = ("batch", "context", "ms", "slowest", "tokens/s", "GB read", "share", "GiB")
    shown.add_column("contestant")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.contestant,
            f"{row.batch}",
            f"{row.context:,}",
            f"{row.ms:,.3f}",
            f"{row.slowest_ms:,.3f}",
            f"{row.tokens_per_s:,.0f}",
            f"{(row.weight_bytes + row.cache_bytes) / 1e9:.2f}" if row.share else "",
            "" if row.share is None else f"{row.share:.1%}",
            "" if row.memory_gib is None else f"{row.memory_gib:.1f}",
        )
    return shown
