"""Charts of runs against the tokens that they had seen. Runs are overlaid, each in its color."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from i3dist.page.svg import SERIES, axes_of, series_color, shade, short, styled, ticker, to_svg
from i3dist.report.run import Run
from i3dist.tracking.plots import GAIN_UNIT, LOSS_UNIT, scale_steps
from i3dist.tracking.series import (
    AGE,
    SMOOTH_FROM,
    Lines,
    column,
    gains,
    mean_gain,
    smooth_loss,
    step_scale,
)

MOST_POINTS = 1000  # of a curve; a longer one has a point for each of so many groups
MOST_CURVES = 8  # of one run's chart; more are put together

Numbers = np.ndarray


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str
    """Its id in the page."""
    x: Numbers
    y: Numbers
    color: str
    style: str = "-"
    """As matplotlib writes it: "-", ":", ".-"."""
    faint: bool = False
    label: str = ""
    summary: Callable[..., Numbers] = np.mean
    """What a group of points is shown as, if there are more than `MOST_POINTS`."""

    def points(self) -> "Curve":
        """The points to show: those that are finite, or groups of them."""
        known = np.isfinite(self.x) & np.isfinite(self.y)
        x, y = self.x[known], self.y[known]
        if len(x) > MOST_POINTS:
            groups = np.array_split(np.arange(len(x)), MOST_POINTS)
            x = np.array([x[group].mean() for group in groups])
            y = np.array([self.summary(y[group]) for group in groups])
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    unit: str
    curves: Sequence[Curve]
    note: str = ""
    """How to read it."""
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    """Whether y is a share, shown in percent; the axis reaches below 0 by 5% of its upper end at
    most."""
    whole: bool = False
    """Whether y is a share, and the axis shows all from 0 to 1."""
    perplexity: bool = False
    """Whether y is a loss, and the right axis has its perplexity."""
    legend: str = ""
    """Title of a legend of the curves' labels."""

    def svg(self) -> str | None:
        """The chart; None if it has no point."""
        curves = [curve for curve in map(Curve.points, self.curves) if len(curve.x)]
        if not curves:
            return None
        with styled():
            figure, axes = axes_of("tokens seen", self.unit)
            for curve in curves:
                self._plot(axes, curve)
            self._scale(axes, np.concatenate([curve.x for curve in curves]))
            if self.legend:
                place = {"loc": "outside upper center", "ncols": 4, "fontsize": 9}
                figure.legend(title=self.legend, title_fontsize=9, **place)
            return to_svg(figure, f"{self.title}: {self.unit} against tokens seen")

    def _plot(self, axes: Any, curve: Curve) -> None:
        (line,) = axes.plot(
            *(curve.x, curve.y, curve.style),
            color=curve.color,
            alpha=0.35 if curve.faint else 1.0,
            lw=0.8 if curve.faint else 1.3,
            ms=4,
            label=curve.label or None,
        )
        line.set_gid(curve.name)

    def _scale(self, axes: Any, x: Numbers) -> None:
        if self.log_x and (scale := step_scale(x))["value"] != "linear":
            scale_steps(axes, x, scale)
            begin = [0] if x.min() == 0 else []
            axes.set_xticks([*begin, *_round_numbers(x[x > 0].min(), x.max())])
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(short))
        if self.log_y:
            axes.set_yscale("log")
            axes.set_yticks(_round_numbers(*axes.get_ylim()))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        if self.whole:
            axes.set_ylim(-0.05, 1.05)
        elif self.percent:  # around a flat curve the axis would reach as far down as up
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.05 * high), high)
        formatter = ticker.PercentFormatter(1.0) if self.percent else ticker.FuncFormatter(short)
        axes.yaxis.set_major_formatter(formatter)
        if self.perplexity:
            _perplexity(axes)


def _perplexity(axes: Any) -> None:
    """Add a right axis with round perplexities at their losses."""
    right = axes.secondary_yaxis("right", functions=(_exp, _log))
    right.set_yticks(_round_numbers(*_exp(np.array(axes.get_ylim()))))
    right.yaxis.set_major_formatter(ticker.FuncFormatter(short))
    right.set_ylabel("perplexity")


def _round_numbers(low: float, high: float) -> list[float]:
    """Some in a range above 0: powers of ten, or 1, 2, 5, 10, 20, if there are three of them."""
    powers, halves = ticker.LogLocator(), ticker.LogLocator(subs=(1, 2, 5))
    for locator in (powers, halves, ticker.MaxNLocator(5)):
        found = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        if len(found) > 2:
            break
    return found


def _exp(loss: Numbers) -> Numbers:
    return np.exp(np.minimum(loss, 700.0))


def _log(perplexity: Numbers) -> Numbers:
    return np.log(np.maximum(perplexity, 1e-300))


def overlaid(runs: Sequence[Run]) -> Iterator[Chart]:
    """The charts that have a color for each run."""
    norms = "Each point is the largest of some steps. " if _are_grouped(runs) else ""
    every = dict(enumerate(runs))
    yield Chart(
        "Loss",
        LOSS_UNIT,
        [curve for n, run in every.items() for curve in _losses(n, run)],
        "Line: training, running mean (faint: single steps). Dots: held-out text.",
        log_x=True,
        perplexity=True,
    )
    yield Chart(
        "Gain of history",
        GAIN_UNIT,
        [curve for n, run in every.items() for curve in _mean_gains(n, run)],
        "Held-out loss without history minus with it. Dotted: with another document's history.",
    )
    yield Chart("Learning rate", "rate", _metric(runs, "learning_rate"))
    gate, joined = _metric(runs, "gate"), _metric(runs, "joined")
    yield Chart("Gate of history", "g", gate, "0: history is off, 1: fully on.", whole=True)
    yield Chart("Share joined", "j", joined, "0: two softmaxes, 1: they are one.", whole=True)
    yield Chart("Speed", "tokens per second", _metric(runs, "tokens_per_second"))
    yield Chart(
        "MFU",
        "share of the GPUs' peak",
        _metric(runs, "mfu"),
        "Model FLOPs per second, against the data sheet's dense peak.",
        percent=True,
    )
    yield Chart(
        "Gradient norm",
        "norm before clipping",
        [curve for n, run in every.items() for curve in _norms(n, run)],
        f"{norms}Crosses: skipped steps.",
        log_y=True,
    )


def families(number: int, run: Run) -> Iterator[Chart]:
    """The charts that have several curves of one run."""
    by_index = grouped(_gains_by_index(run.validation))
    yield Chart(
        "Gain of history by chunk",
        GAIN_UNIT,
        _shaded(f"gain-{number}", run, run.validation, by_index),
        "Held-out loss without history minus with it.",
        legend="index of the chunk in its document",
    )
    ages = {
        int(name.removeprefix(AGE)): column(run.diagnostics, name)
        for name in sorted({n for line in run.diagnostics for n in line if n.startswith(AGE)})
    }
    yield Chart(
        "Attention to history by age",
        "share for a chunk",
        _shaded(f"age-{number}", run, run.diagnostics, grouped(ages)),
        "Share of a query's attention that a chunk of history of that age gets.",
        percent=True,
        legend="age in chunks",
    )


def grouped(columns: Mapping[int, Numbers]) -> dict[str, Numbers]:
    """Columns by number under their labels, or the means of groups that double: 1, 2, 3-4, 5-8."""
    numbers = sorted(columns)
    if len(numbers) <= MOST_CURVES:
        return {str(n): columns[n] for n in numbers}
    groups: dict[tuple[int, int], list[Numbers]] = {}
    for n in numbers:
        last = 1 << (n - 1).bit_length()  # the power of two that is n, or the next
        groups.setdefault((last // 2 + 1, last), []).append(columns[n])
    return {
        str(last) if first >= last else f"{first}-{last}": _mean(members)
        for (first, last), members in groups.items()
    }


def _mean(columns: Sequence[Numbers]) -> Numbers:
    """Mean of those that are finite, place by place; NaN where none is."""
    table = np.ma.masked_invalid(np.stack(columns))
    return table.mean(axis=0).filled(np.nan)


def _losses(number: int, run: Run) -> Iterator[Curve]:
    x, color = _tokens(run, run.metrics), series_color(number)
    loss, many = column(run.metrics, "loss"), len(run.metrics) >= SMOOTH_FROM
    yield Curve(f"loss-{number}", x, loss, color, faint=many)
    if many:
        mean = smooth_loss(run.metrics)
        yield Curve(f"mean-loss-{number}", x, mean, color, _line(number))
    held_out = column(run.validation, "loss")
    x = _tokens(run, run.validation)
    yield Curve(f"held-out-{number}", x, held_out, color, "o:")


def _mean_gains(number: int, run: Run) -> Iterator[Curve]:
    x, color = _tokens(run, run.validation), series_color(number)
    own = np.array([mean_gain(line.get("by_chunk") or ()) for line in run.validation])
    yield Curve(f"history-{number}", x, own, color, f".{_line(number)}")
    other = column(run.validation, "other_history_gain")
    yield Curve(f"other-history-{number}", x, other, color, ":")


def _metric(runs: Sequence[Run], name: str) -> list[Curve]:
    """A metric of each run."""
    return [
        Curve(
            f"{name.replace('_', '-')}-{n}",
            _tokens(run, run.metrics),
            column(run.metrics, name),
            series_color(n),
            _line(n),
        )
        for n, run in enumerate(runs)
    ]


def _norms(number: int, run: Run) -> Iterator[Curve]:
    """Gradient norms of the ledger's steps (without a ledger: of the metrics'), and skipped ones.

    A skipped step whose norm is not finite stands at the largest norm.
    """
    lines = [entry.model_dump() for entry in run.ledger] or run.metrics
    norm, color = column(lines, "gradient_norm"), series_color(number)
    norm[norm <= 0] = np.nan  # which a logarithm has no place for
    name, x = f"gradient-norm-{number}", _tokens(run, lines)
    yield Curve(name, x, norm, color, _line(number), summary=np.max)
    skipped = np.array([line.get("skipped") is not None for line in lines], bool)
    if skipped.any():
        top = np.nanmax(norm) if np.isfinite(norm).any() else 1.0
        y = np.where(np.isfinite(norm), norm, top)[skipped]
        yield Curve(f"skipped-{number}", x[skipped], y, color, "x", summary=np.max)


def _are_grouped(runs: Sequence[Run]) -> bool:
    return any(len(run.ledger) > MOST_POINTS for run in runs)


def _gains_by_index(validation: Lines) -> dict[int, Numbers]:
    """Gain of history in each validation [n], by the chunk's index from 1."""
    found: dict[int, Numbers] = {}
    for place, line in enumerate(validation):
        chunks = line.get("by_chunk") or ()
        for chunk, gain in zip(chunks, gains(chunks), strict=True):
            if chunk["index"] > 0:
                empty = np.full(len(validation), np.nan)
                found.setdefault(chunk["index"], empty)[place] = gain
    return found


def _shaded(name: str, run: Run, lines: Lines, columns: Mapping[str, Numbers]) -> list[Curve]:
    """A curve for each column, the darker the later."""
    x, last = _tokens(run, lines), max(1, len(columns) - 1)
    return [
        Curve(f"{name}-{label}", x, values, shade(n / last), ".-", label=label)
        for n, (label, values) in enumerate(columns.items())
    ]


def _tokens(run: Run, lines: Lines) -> Numbers:
    return run.tokens([line["step"] for line in lines])


def _line(number: int) -> str:
    """Dashes tell the runs beyond the last color from the first ones."""
    return "-" if number // SERIES % 2 == 0 else "--"
