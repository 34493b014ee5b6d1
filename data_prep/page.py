"""A report as one HTML page that needs nothing else: no script, no other file, no network."""

from collections.abc import Iterable, Sequence
from html import escape

from data_prep import charts
from data_prep.figures import TOP_DOMAINS, Figures
from data_prep.index_statistics import geometric
from data_prep.samples import Example
from i3dist.cli.paths import as_unicode
from i3dist.errors import printable

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #5b6572;
  --line: #d9dee5; --panel: #f5f7fa; --accent: #2f6fdb; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --back: #14171c; --soft: #9aa5b3;
  --line: #343b46; --panel: #1d222a; --accent: #6ea3ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); }
.tiles { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.tile { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.1rem; overflow-wrap: anywhere; }
.tile span, th { color: var(--soft); font-size: .85rem; font-weight: normal; }
.wide { display: grid; gap: 1rem 2rem; grid-template-columns: minmax(0, 2fr) minmax(12rem, 1fr);
  align-items: start; }
@media (max-width: 44rem) { .wide { grid-template-columns: minmax(0, 1fr); } }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .4rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.bar { width: 30%; } .bar i { display: block; height: .7rem; border-radius: .2rem;
  background: var(--accent); }
@media (max-width: 30rem) { .bar { display: none; } }
article { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; margin: .8rem 0; }
article p { overflow-wrap: anywhere; }
blockquote { margin: .6rem 0; padding-left: .8rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""


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
    history_chart = charts.bars(
        *_columns(history), "chunks of history", "share of tokens", "Tokens by history"
    )
    shares = [(label, f"{share:.2%}") for label, share in history]
    parts = [
        f"<h1>{escape(printable(title))}</h1>",
        '<p class="soft">Prepared data, as training reads it. Figures are of all documents, unless '
        "they are said to be of a sample.</p>",
        _tiles(figures.totals()),
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
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(printable(title))}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _columns(rows: Iterable[tuple[str, float]]) -> tuple[list[str], list[float]]:
    labels, values = zip(*rows, strict=True)
    return list(labels), list(values)


def _tiles(totals: Sequence[tuple[str, str, str]]) -> str:
    tiles = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(printable(value))}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in totals
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _dropped(figures: Figures) -> list[str]:
    """What filters removed, if that is recorded."""
    if (dropped := figures.dropped()) is None:
        return []
    body = "".join(
        f"<tr><td>{escape(printable(source))}</td><td>{escape(printable(reason))}</td>"
        f"<td>{count:,}</td></tr>"
        for source, reason, count in dropped
    )
    head = "<tr><th>source</th><th>reason</th><th>documents</th></tr>"
    return [
        "<h2>What filters removed</h2>",
        f"<p>{escape(figures.dropped_in_words())}</p>",
        f"<table>{head}{body}</table>",
    ]


def _wide(chart: str, heading: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in heading)
    return f'<div class="wide"><div>{chart}</div><table><tr>{head}</tr>{body}</table></div>'


def _domains(rows: Sequence[tuple[str, int, float]]) -> str:
    most = max((share for _, _, share in rows), default=1.0) or 1.0
    body = "".join(
        f"<tr><td>{escape(printable(name))}</td><td>{tokens:,}</td><td>{share:.2%}</td>"
        f'<td class="bar"><i style="width:{share / most:.1%}"></i></td></tr>'
        for name, tokens, share in rows
    )
    head = '<tr><th>domain</th><th>tokens</th><th>share</th><th class="bar"></th></tr>'
    return f"<table>{head}{body}</table>"


def _example(example: Example) -> str:
    name = f"{example.kind}: document {example.document:,}, {example.tokens:,} tokens"
    source = printable(f"id {example.id}")
    if example.url != example.id:
        source += printable(f", {example.url}")
    end = f'<p class="soft">...</p><blockquote>{_text(example.end)}</blockquote>'
    return (
        f'<article><b>{escape(name)}</b><p class="soft">{escape(source)}</p>'
        f"<blockquote>{_text(example.begin)}</blockquote>{end if example.end else ''}</article>"
    )


def _text(text: str) -> str:
    # Control characters are no HTML.
    return escape("".join(c if c.isprintable() or c in "\n\t" else " " for c in text).strip())
