"""The page: what the runs are, their charts, restarts and skipped steps, samples of text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from i3dist.cli.paths import as_unicode
from i3dist.data.download import shown
from i3dist.page.document import cell, document, quoted, table, tiles
from i3dist.page.svg import SERIES, short
from i3dist.report.charts import Chart, families, overlaid
from i3dist.report.facts import ABOUT, FIGURES, Facts, date_of, short_commit, tokens_at
from i3dist.report.run import HOLDS, Run, Start, differing, names
from i3dist.tracking.series import Lines

MOST_SKIPPED = 20  # steps that are listed
MOST_SAMPLES = 8  # validations whose texts are shown


def page(runs: Sequence[Run]) -> str:
    """The whole page of one or more runs.

    Raises:
        UserError: a run is there twice.
    """
    named = dict(zip(names(runs), runs, strict=True))
    title = as_unicode(", ".join(named) if len(runs) < 4 else f"{len(runs)} runs")
    parts = [
        f"<h1>{cell(title)}</h1>",
        *(f'<p class="soft">{cell(line)}</p>' for line in _left_out(named)),
        *_legend(named),
        *_about(named),
        *_differing(named),
        *_training(runs),
        *_families(named),
        *_not_default(named),
        *_interruptions(named),
        *_samples(named),
    ]
    return document(title, parts)


def _left_out(named: dict[str, Run]) -> Iterator[str]:
    """A line for each run that lacks something."""
    for name, run in named.items():
        if run.missing:
            what = ", ".join(f"{HOLDS[file]} ({file})" for file in run.missing)
            yield f"{name} has no {what}: an earlier version wrote it, or there is nothing yet."


def _legend(named: dict[str, Run]) -> list[str]:
    if len(named) < 2:
        return []
    keys = (
        f'<span class="key" style="background:var(--series{n % SERIES})"></span>{cell(name)}'
        for n, name in enumerate(named)
    )
    return [f'<p class="legend">{"<br>".join(keys)}</p>']


def _about(named: dict[str, Run]) -> Iterator[str]:
    """Where each run stands, and what it is."""
    figures, about = (_rows(facts, list(named.values())) for facts in (FIGURES, ABOUT))
    if len(named) == 1:
        yield tiles((name, value, "") for name, value in figures)
        yield table((), about, "runs texts")
    else:
        yield table(("", *map(as_unicode, named)), [*figures, *about], "runs")


def _rows(facts: Facts, runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for each fact that any of the runs has a value for."""
    values = {name: [value(run) for run in runs] for name, value in facts.items()}
    return [(name, *(x or "-" for x in row)) for name, row in values.items() if any(row)]


def _differing(named: dict[str, Run]) -> Iterator[str]:
    """The settings that runs differ in."""
    if len(named) > 1:
        yield "<h2>Settings that differ</h2>"
        yield _values(("setting", *named), differing(list(named.values())))


def _not_default(named: dict[str, Run]) -> Iterator[str]:
    """Each run's settings that are not the defaults."""
    yield "<h2>Settings that are not the defaults</h2>"
    for name, run in named.items():
        rows = _values(("setting", "value", "default"), differing([run]))
        what = cell(as_unicode(name))
        several = len(named) > 1
        yield f"<details><summary>{what}</summary>{rows}</details>" if several else rows


def _values(heading: Sequence[str], rows: dict[str, list[Any]]) -> str:
    texts = [(name, *(as_unicode(shown(str(x))) for x in row)) for name, row in rows.items()]
    return table(heading, texts, "runs") if texts else "<p>None.</p>"


def _figures(charts: Iterable[Chart]) -> str:
    made = [
        f"<figure><figcaption>{cell(chart.title)} <span>{cell(chart.note)}</span></figcaption>"
        f"{svg}</figure>"
        for chart in charts
        if (svg := chart.svg())
    ]
    return f'<div class="charts">{"".join(made)}</div>' if made else ""


def _training(runs: Sequence[Run]) -> Iterator[str]:
    """The charts that all runs share."""
    if figures := _figures(overlaid(runs)):
        yield f"<h2>Training</h2>{figures}"


def _families(named: dict[str, Run]) -> Iterator[str]:
    """The charts of single runs, of those that have any."""
    made = {name: _figures(families(n, run)) for n, (name, run) in enumerate(named.items())}
    if any(made.values()):
        yield "<h2>History</h2>"
    for name, figures in made.items():
        if figures:
            yield f"<h3>{cell(as_unicode(name))}</h3>" if len(named) > 1 else ""
            yield figures


def _interruptions(named: dict[str, Run]) -> Iterator[str]:
    """Starts, and steps that were skipped."""
    yield "<h2>Starts and skipped steps</h2>"
    heading = ("run", "after step", "time", "device", "commit")
    rows = [
        (as_unicode(name), f"{start.step:,}", date_of(start.time) or "-", *_place(start))
        for name, run in named.items()
        for start in run.starts
    ]
    yield table(heading, rows, "runs") if rows else "<p>No start is recorded.</p>"
    skipped = [
        (as_unicode(name), f"{entry.step:,}", entry.skipped, _figure(entry.gradient_norm))
        for name, run in named.items()
        for entry in run.ledger
        if entry.skipped
    ]
    if skipped:
        yield table(("run", "skipped step", "why", "norm"), skipped[:MOST_SKIPPED], "runs")
    if len(skipped) > MOST_SKIPPED:
        yield f"<p>And {len(skipped) - MOST_SKIPPED:,} more.</p>"
    if not skipped and any(run.ledger for run in named.values()):
        yield "<p>No step was skipped.</p>"


def _place(start: Start) -> tuple[str, str]:
    facts = start.facts
    ranks = f" x {facts['ranks']}" if facts.get("ranks", "1") != "1" else ""
    return f"{facts.get('device', '-')}{ranks}", short_commit(facts.get("git_commit", "-"))


def _figure(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _samples(named: dict[str, Run]) -> Iterator[str]:
    """What each run wrote after the same prompts, validation by validation."""
    if not any(run.samples for run in named.values()):
        return
    yield "<h2>Samples of text</h2>"
    yield "<p>How the model continues the beginnings of some held-out documents.</p>"
    for name, run in named.items():
        lines = _spread(run.samples)
        title = f"<b>{cell(as_unicode(name))}</b>" if len(named) > 1 else ""
        for number, prompt in _prompts(lines):
            texts = _continued(run, lines, number, prompt)
            yield f"<article>{title}{quoted(prompt)}{texts}</article>"


def _prompts(lines: Lines) -> list[tuple[int, str]]:
    """Each prompt with its place among those of its validation: two may be the same text."""
    pairs = (pair for line in lines for pair in enumerate(s["prompt"] for s in line["samples"]))
    return list(dict.fromkeys(pairs))


def _continued(run: Run, lines: Lines, number: int, prompt: str) -> str:
    """What follows a prompt, the validation's `number`th from 0, at each step."""
    rows = (
        f"<tr><td>step {line['step']:,}<br>{short(tokens_at(run, line['step']))} tokens</td>"
        f"<td>{quoted(sample['text'])}</td></tr>"
        for line in lines
        for sample in line["samples"][number : number + 1]
        if sample["prompt"] == prompt
    )
    return f'<table class="texts">{"".join(rows)}</table>'


def _spread(lines: Lines) -> Lines:
    """`MOST_SAMPLES` of the lines, the first and the last among them."""
    places = np.linspace(0, len(lines) - 1, min(MOST_SAMPLES, len(lines))).round().astype(int)
    return [lines[place] for place in places]
