"""A report of prepared data as one HTML page."""

from collections.abc import Iterable, Sequence
from html import escape

from data_prep.progress import SOURCE_HEADINGS
from data_prep.reports import charts
from data_prep.reports.figures import TOP_DOMAINS, Figures
from data_prep.reports.index_statistics import geometric
from data_prep.reports.samples import Example
from i3dist.cli.paths import as_unicode
from i3dist.page.document import cell, document, quoted, table, tiles


def page(figures: Figures) -> str:
    """The whole page."""
    reader, statistics = figures.reader, figures.statistics
    title = f"{as_unicode(reader.folder.parent.name)}: {reader.manifest.split}"
    edges, counts = geometric(statistics.lengths)
    length_chart = charts.histogram(
        edges, counts, "tokens of a document (logarithmic)", "documents", "Documents by length"
    )
    chunks, history = figures.chunks(), figures.history()
    chunk_chart = charts.bars(*_columns(chunks), "chunks", "documents", "Documents by chunks")
    short = [(label.replace(" or more", "+"), share) for label, share in history]
    history_chart = charts.bars(
        *_columns(short), "chunks of history", "share of tokens", "Tokens by history"
    )
    shares = [(label, f"{share:.2%}") for label, share in history]
    parts = [
        f"<h1>{cell(title)}</h1>",
        '<p class="soft">Prepared data, as training reads it. Figures are of all documents, unless '
        "they are said to be of a sample.</p>",
        tiles(figures.totals()),
        *_sources(figures),
        *_dropped(figures),
        "<h2>Lengths of documents</h2>",
        "<p>&lt;BOS&gt; and &lt;EOS&gt; count as tokens. Each bar ends at 1.41 times the length at "
        "which it begins.</p>",
        _wide(length_chart, ("documents", "tokens"), figures.lengths()),
        "<h2>Chunks per document</h2>",
        f"<p>A chunk has {reader.manifest.chunk_length:,} tokens. A document counts every chunk "
        "that holds a token of it.</p>",
        _wide(chunk_chart, ("chunks", "documents"), [(a, f"{b:,}") for a, b in chunks]),
        "<h2>Tokens behind compressed history</h2>",
        f"<p>{escape(figures.history_in_words())}</p>",
        _wide(history_chart, ("chunks of history", "tokens"), shares),
        f"<h2>Domains with most tokens (top {TOP_DOMAINS})</h2>",
        f"<p>{escape(figures.domains_in_words())}</p>",
        _domains(figures.domains()),
        "<h2>Examples</h2>",
        "<p>Drawn at random: short documents are among the shortest 10%, long ones among the "
        "longest 5%, median ones between 45% and 55%.</p>",
        *map(_example, figures.examples),
    ]
    return document(title, parts)


def _columns(rows: Iterable[tuple[str, float]]) -> tuple[list[str], list[float]]:
    labels, values = zip(*rows, strict=True)
    return list(labels), list(values)


def _sources(figures: Figures) -> list[str]:
    """Where the documents come from."""
    if (sources := figures.sources()) is None:
        return [f"<p>Source: {cell(figures.reader.manifest.source)}</p>"]
    return [
        "<h2>Sources</h2>",
        "<p>Of all splits together. A document that is taken twice counts twice.</p>",
        table(SOURCE_HEADINGS, sources, "sources"),
    ]


def _dropped(figures: Figures) -> list[str]:
    """What filters removed, if that is recorded."""
    if (dropped := figures.dropped()) is None:
        return []
    rows = ((source, reason, f"{count:,}") for source, reason, count in dropped)
    return [
        "<h2>What filters removed</h2>",
        f"<p>{escape(figures.dropped_in_words())}</p>",
        table(("source", "reason", "documents"), rows, "names"),
    ]


def _wide(chart: str, heading: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return f'<div class="wide"><div>{chart}</div>{table(heading, rows)}</div>'


def _domains(rows: Sequence[tuple[str, int, float]]) -> str:
    most = max((share for _, _, share in rows), default=1.0) or 1.0
    body = "".join(
        f"<tr><td>{cell(name)}</td><td>{tokens:,}</td><td>{share:.2%}</td>"
        f'<td class="bar"><i style="width:{share / most:.1%}"></i></td></tr>'
        for name, tokens, share in rows
    )
    head = '<tr><th>domain</th><th>tokens</th><th>share</th><th class="bar"></th></tr>'
    return f"<table>{head}{body}</table>"


def _example(example: Example) -> str:
    name = f"{example.kind}: document {example.document:,}, {example.tokens:,} tokens"
    source = f"id {example.id}"
    if example.url != example.id:
        source += f", {example.url}"
    end = f'<p class="soft">...</p>{quoted(example.end)}' if example.end else ""
    return (
        f'<article><b>{cell(name)}</b><p class="soft">{cell(source)}</p>'
        f"{quoted(example.begin)}{end}</article>"
    )
