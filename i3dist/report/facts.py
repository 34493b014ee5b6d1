"""What the page says of a run in a word or a figure. A fact is None where the run lacks it."""

import math
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np

from i3dist.cli.paths import as_unicode
from i3dist.data.download import shown
from i3dist.page.svg import short
from i3dist.report.run import Run
from i3dist.tracking.series import Lines, mean_gain


def _state(run: Run) -> str:
    steps = run.settings.train.steps
    return f"finished, {steps:,} steps" if run.finished else f"at step {run.step:,} of {steps:,}"


def tokens_at(run: Run, step: int) -> int:
    """The tokens that the run had seen after a step."""
    return round(float(run.tokens([step])[0]))


def _data(run: Run) -> str:
    place, facts = shown(str(run.settings.data.path)), run.facts
    if "data_tokens" not in facts:
        return as_unicode(place)
    size = short(float(facts["data_tokens"]))
    return as_unicode(f"{place}: {size} tokens of {facts.get('data_source')}")


def _device(run: Run) -> str | None:
    facts = run.facts
    if "device" not in facts:
        return None
    ranks = facts.get("ranks", "1")
    return f"{facts['device']}, {ranks} rank{'s' * (ranks != '1')}"


def short_commit(text: str) -> str:
    """The first characters of a commit's hash, and whether files had changes."""
    number, _, changed = text.partition("+")
    return f"{number[:12]}{', with changes' * bool(changed)}"


def _versions(run: Run) -> str:
    found = {
        name.removeprefix("version."): text
        for name, text in run.facts.items()
        if name.startswith("version.")
    }
    return ", ".join(f"{name} {text}" for name, text in found.items() if text != "none")


def _last_time(run: Run) -> float | None:
    lines = [line for log in (run.metrics, run.validation) for line in log[-1:]]
    return max((line["time"] for line in lines if line.get("time")), default=None)


def date_of(seconds: float | None) -> str | None:
    """A time, in seconds since 1970, as a date and a time of day."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _number(lines: Lines, *columns: str, digits: int = 4) -> str | None:
    """The last line's value in the first of the columns that has one."""
    values = [lines[-1].get(name) for name in columns] if lines else []
    return next((f"{value:.{digits}f}" for value in values if value is not None), None)


def _gain(run: Run) -> str | None:
    gain = mean_gain(run.validation[-1].get("by_chunk") or ()) if run.validation else math.nan
    return f"{gain:+.4f}" if math.isfinite(gain) else None


def _best(run: Run) -> str | None:
    known = [line for line in run.validation if line.get("loss") is not None]
    if not known:
        return None
    best = min(known, key=lambda line: line["loss"])
    return f"{best['loss']:.4f} at step {best['step']:,}"


def _median(run: Run, name: str, text: Callable[[float], str]) -> str | None:
    values = [line[name] for line in run.metrics if line.get(name) is not None]
    return text(float(np.median(values))) if values else None


def _skipped(run: Run) -> str | None:
    if not run.ledger:
        return None
    reasons = Counter(entry.skipped.partition(",")[0] for entry in run.ledger if entry.skipped)
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "none"


Facts = dict[str, Callable[[Run], str | None]]

FIGURES: Facts = {
    "state": _state,
    "tokens seen": lambda run: short(tokens_at(run, run.step)),
    "parameters": lambda run: short(run.parameters) if run.parameters else None,
    "training loss": lambda run: _number(run.metrics, "mean_loss", "loss"),
    "held-out loss": lambda run: _number(run.validation[-1:], "loss"),
    "best held-out loss": _best,
    "held-out perplexity": lambda run: _number(run.validation[-1:], "perplexity", digits=2),
    "gain of history": _gain,
    "tokens per second": lambda run: _median(run, "tokens_per_second", short),
    "MFU": lambda run: _median(run, "mfu", "{:.1%}".format),
    "time in training": lambda run: _duration(run.seconds) if run.seconds else None,
    "skipped steps": _skipped,
}
"""Where a run stands; of a speed the median over the run, of other figures the last."""

ABOUT: Facts = {
    "folder": lambda run: as_unicode(run.folder),
    "layers": lambda run: f"{run.settings.model.layers} of width {run.settings.model.d_model:,}",
    "data": _data,
    "device": _device,
    "commit": lambda run: short_commit(run.facts.get("git_commit", "")),
    "versions": _versions,
    "started": lambda run: date_of(run.starts[0].time) if run.starts else None,
    "last line written": lambda run: date_of(_last_time(run)),
}
"""What a run is."""
