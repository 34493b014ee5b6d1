"""The frame, style and parts of a page."""

from collections.abc import Iterable, Sequence
from html import escape

from i3dist.errors import printable
from i3dist.page.svg import css_shades

_LIGHT = f"""--text: #1b1f24; --back: #ffffff; --soft: #5b6572; --line: #d9dee5; --panel: #f5f7fa;
  --accent: #2f6fdb; --series0: #2f6fdb; --series1: #d9480f; --series2: #2b8a3e;
  --series3: #c2255c; --series4: #6741d9; --series5: #0b7285; --series6: #946200;
  --series7: #5c636a; {css_shades(dark=False)}"""
_DARK = f"""--text: #e4e8ee; --back: #14171c; --soft: #9aa5b3; --line: #343b46; --panel: #1d222a;
  --accent: #6ea3ff; --series0: #6ea3ff; --series1: #ff922b; --series2: #69db7c;
  --series3: #f783ac; --series4: #b197fc; --series5: #3bc9db; --series6: #ffd43b;
  --series7: #ced4da; {css_shades(dark=True)}"""
_VARIABLES = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
"""
_RULES = """\
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; overflow-wrap: anywhere; } .soft { color: var(--soft); }
.tiles { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.tile { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.1rem; overflow-wrap: anywhere; }
.tile span, th { color: var(--soft); font-size: .85rem; font-weight: normal; }
.wide { display: grid; gap: 1rem 2rem; grid-template-columns: minmax(0, 2fr) minmax(12rem, 1fr);
  align-items: start; }
@media (max-width: 44rem) { .wide { grid-template-columns: minmax(0, 1fr); } }
.charts { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; }
figcaption span { color: var(--soft); }
svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .4rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.runs th:first-child, .runs td:first-child { overflow-wrap: normal; position: sticky; left: 0;
  background: var(--back); color: var(--soft); min-width: 8rem; }
.runs td + td { overflow-wrap: anywhere; min-width: 5.5rem; }
@media (max-width: 44rem) { .runs { font-size: .85rem; } }
.sources td:first-child { min-width: 8rem; }
.names th:nth-child(2), .names td:nth-child(2) { text-align: left; overflow-wrap: anywhere; }
.texts th, .texts td { text-align: left; vertical-align: top; }
.texts td { overflow-wrap: anywhere; min-width: 5.5rem; }
.bar { width: 30%; } .bar i { display: block; height: .7rem; border-radius: .2rem;
  background: var(--accent); }
@media (max-width: 30rem) { .bar { display: none; } }
.key { display: inline-block; width: 1.6rem; height: .3rem; margin-right: .4rem;
  border-radius: .15rem; vertical-align: middle; }
article { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; margin: .8rem 0; }
blockquote { margin: .6rem 0; padding-left: .8rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page of parts that are HTML; `title` is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{cell(title)}</title><style>{_VARIABLES}{_RULES}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def cell(text: object) -> str:
    """Plain text of one line as HTML; characters that cannot be printed become "?"."""
    return escape(printable(text))


def quoted(text: str) -> str:
    """Plain text of any form as a block of HTML; control characters, which HTML lacks, vanish."""
    kept = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    return f"<blockquote>{escape(kept.strip())}</blockquote>"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Figures in large type: (name, value, note)."""
    made = (
        f'<div class="tile"><span>{cell(name)}</span><b>{cell(value)}</b>'
        f"<span>{cell(note)}</span></div>"
        for name, value, note in figures
    )
    return f'<div class="tiles">{"".join(made)}</div>'


def table(heading: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table of plain text. Columns but the first stand right; of the kind "texts" all stand left,
    of the kind "names" the first two. Of the kind "sources" the first column keeps some width, and
    of the kind "runs" it stays in sight.
    """
    head = "".join(f"<th>{cell(name)}</th>" for name in heading)
    head = f"<tr>{head}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell(x)}</td>' for x in row)}</tr>" for row in rows)
    css = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{css}>{head}{body}</table></div>'
