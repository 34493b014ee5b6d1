"""Plots of a run, from its metrics.jsonl, validation.jsonl and diagnostics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np

from i3dist.engine.toolchain import variables
from i3dist.tracking.metrics_log import DIAGNOSTICS, METRICS, VALIDATION, read_metrics
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

# While it is imported, matplotlib fails if the variable names a backend that is not installed, as a
# notebook's may.
with variables(MPLBACKEND="agg"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure  # pyplot keeps global state
    from matplotlib.ticker import (
        EngFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
        SymmetricalLogLocator,
    )

TRAIN, VALID, WITHOUT, OTHER = "#1f77b4", "#d62728", "#7f7f7f", "#ff7f0e"
LOSS_UNIT, GAIN_UNIT = "loss (nats per token)", "gain (nats per token)"
CHUNK_INDEX = "chunk index in the document"
DPI = 150


def plot_run(folder: Path) -> list[Path]:
    """Write ``loss.png``, ``history.png`` and ``diagnostics.png`` to a run's folder ``plots/``.

    Returns:
        The files written: a missing or empty log leaves its plot out.
    """
    metrics = read_metrics(folder / METRICS)
    validation = read_metrics(folder / VALIDATION)
    figures = {
        "loss.png": _loss(metrics, validation),
        "history.png": _history(validation),
        "diagnostics.png": _diagnostics(read_metrics(folder / DIAGNOSTICS)),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / "plots" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=DPI)
            written.append(path)
    return written


def _loss(metrics: Lines, validation: Lines) -> Figure | None:
    """Training and validation loss against step, tokens seen on top."""
    loss, held_out = column(metrics, "loss"), column(validation, "loss")
    if not (np.isfinite(loss).any() or np.isfinite(held_out).any()):
        return None
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    if np.isfinite(loss).any():
        _plot_training(axes, metrics)
    if np.isfinite(held_out).any():
        at = column(validation, "step")
        axes.plot(at, held_out, "o-", color=VALID, ms=3, lw=1, label="validation")
    steps = column([*metrics, *validation], "step")
    scale = step_scale(steps)
    scale_steps(axes, steps, scale)
    _shade_gate(axes, metrics)
    _tokens_on_top(axes, metrics, scale)
    _finish_axes(axes, "training and validation loss", "step", LOSS_UNIT)
    return figure


def _plot_training(axes: Axes, metrics: Lines) -> None:
    """Loss of single steps; if there are many, faint, below the running mean of all steps."""
    steps, loss = column(metrics, "step"), column(metrics, "loss")
    if len(loss) < SMOOTH_FROM:
        axes.plot(steps, loss, ".-", color=TRAIN, label="training")
        return
    axes.plot(steps, loss, color=TRAIN, alpha=0.3, lw=0.8, label="training")
    mean = smooth_loss(metrics)
    known = np.isfinite(mean)
    axes.plot(steps[known], mean[known], color=TRAIN, label="training, running mean")


def scale_steps(axes: Axes, steps: np.ndarray, scale: dict[str, Any]) -> None:
    """Scale the axis of steps [points] by `step_scale`, tick it if it is not linear, and fix its
    limits."""
    axes.set_xscale(**scale)
    transform = axes.xaxis.get_transform()
    first, last = transform.transform([steps.min(), steps.max()])
    margin = 0.02 * (last - first) or 0.5
    axes.set_xlim(*transform.inverted().transform([first - margin, last + margin]))
    if scale["value"] == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif scale["value"] == "symlog":
        axes.xaxis.set_major_locator(SymmetricalLogLocator(transform, subs=[1, 2, 5]))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shade_gate(axes: Axes, metrics: Lines) -> None:
    """Shade the steps without history (gate 0) and those where it comes in (gate below 1)."""
    gate, steps = column(metrics, "gate"), column(metrics, "step")
    left, right = axes.get_xlim()
    for inside, label, shade in (
        (gate == 0, "history off", "0.92"),
        ((gate > 0) & (gate < 1), "history ramps in", "#fdebcf"),
    ):
        if inside.any():
            first, last = np.flatnonzero(inside)[[0, -1]]
            start = steps[first] if first > 0 else left
            # Up to the next logged line, so that the shades meet.
            end = steps[last + 1] if last + 1 < len(steps) else right
            axes.axvspan(start, end, color=shade, lw=0, zorder=0, label=label)


def _tokens_on_top(axes: Axes, metrics: Lines, scale: dict[str, Any]) -> None:
    """A second axis with round numbers of tokens at the steps that had seen them."""
    tokens, steps = column(metrics, "tokens_seen"), column(metrics, "step")
    known = np.isfinite(tokens) & (tokens > 0)
    if known.sum() < 2:
        return
    steps, tokens = steps[known], tokens[known]
    locator = MaxNLocator() if scale["value"] == "linear" else LogLocator(subs=(1, 2, 5))
    ticks = locator.tick_values(tokens[0], tokens[-1])
    ticks = ticks[(ticks >= tokens[0]) & (ticks <= tokens[-1])]
    top = axes.twiny()
    top.set_xscale(**scale)
    top.set(xlim=axes.get_xlim(), xlabel="tokens seen")
    top.set_xticks(np.interp(ticks, tokens, steps), [EngFormatter(sep="")(tick) for tick in ticks])
    top.xaxis.set_minor_locator(NullLocator())


def _history(validation: Lines) -> Figure | None:
    """Loss by chunk index at the last validation; gain of history over the run, and by chunk."""
    measured = [line for line in validation if line.get("by_chunk")]
    if not measured:
        return None
    figure = Figure(figsize=(16, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    last = measured[-1]
    chunks = sorted(last["by_chunk"], key=lambda chunk: chunk["index"])
    _plot_by_chunk(left, chunks, last["step"])
    _plot_gain(figure, middle, measured)
    _plot_last_gain(right, chunks, last["step"])
    return figure


def _plot_by_chunk(axes: Axes, chunks: Lines, step: int) -> None:
    index = column(chunks, "index")
    without, with_history = column(chunks, "loss_without_history"), column(chunks, "loss")
    axes.plot(index, without, "s--", color=WITHOUT, ms=5, label="history withheld")
    _plot_other(axes, index, column(chunks, "loss_other_history"))
    axes.plot(index, with_history, "o-", color=TRAIN, ms=5, label="with history")
    axes.fill_between(index, with_history, without, color=TRAIN, alpha=0.12, lw=0)
    _finish_axes(axes, f"validation at step {step:,}", CHUNK_INDEX, LOSS_UNIT)


def _plot_last_gain(axes: Axes, chunks: Lines, step: int) -> None:
    index = column(chunks, "index")
    axes.axhline(0, color="0.4", lw=0.8)
    _plot_other(axes, index, gains(chunks, "loss_other_history"))
    axes.plot(index, gains(chunks), "o-", color=TRAIN, ms=5, label="own history")
    if np.isfinite(mean := mean_gain(chunks)):
        axes.axhline(mean, color="k", ls="--", lw=1.2, label=f"mean over tokens {mean:+.4f}")
    axes.margins(y=0.35)  # room for the legend, and for the bars
    _plot_tokens(axes, index, column(chunks, "tokens"))
    _finish_axes(axes, f"gain by chunk at step {step:,}", CHUNK_INDEX, GAIN_UNIT, "upper left")


def _plot_other(axes: Axes, index: np.ndarray, values: np.ndarray) -> None:
    if np.isfinite(values).any():
        axes.plot(index, values, "^:", color=OTHER, ms=5, label="another document's history")


def _plot_tokens(axes: Axes, index: np.ndarray, tokens: np.ndarray) -> None:
    """How many tokens a chunk's figures are means of, as low bars with an axis of their own."""
    if np.isfinite(tokens).any():
        bars = axes.twinx()
        bars.bar(index, tokens, color="0.88", zorder=0)
        bars.set(ylabel="tokens (bars)", ylim=(0, 5 * np.nanmax(tokens)))
        bars.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_zorder(bars.get_zorder() + 1)
        axes.patch.set_visible(False)


def _plot_gain(figure: Figure, axes: Axes, validation: Lines) -> None:
    curves: dict[int, list[tuple[int, float]]] = {}
    for line in validation:
        for chunk, gain in zip(line["by_chunk"], gains(line["by_chunk"]), strict=True):
            if np.isfinite(gain):
                curves.setdefault(chunk["index"], []).append((line["step"], gain))
    axes.axhline(0, color="0.4", lw=0.8)
    if curves:
        colours = _index_colours(0, max(curves))
        for index, points in sorted(curves.items()):
            axes.plot(*zip(*points, strict=True), ".-", color=colours.cmap(index))
        _add_colour_bar(figure, axes, colours, "chunk index")
    means = [mean_gain(line["by_chunk"]) for line in validation]
    if np.isfinite(means).any():
        label = "mean over tokens of chunks 1, 2, ..."
        axes.plot(column(validation, "step"), means, "ko-", ms=4, lw=2, label=label)
    _finish_axes(axes, "gain: loss without history minus loss with it", "step", GAIN_UNIT)


def _diagnostics(lines: Lines) -> Figure | None:
    """Diagnoses against step: attention to history, rank of latents, the compressor's gradient."""
    ages = sorted({name for line in lines for name in line if name.startswith(AGE)})
    ages = [name for name in ages if np.isfinite(column(lines, name)).any()]
    others = {
        "effective_rank": ("effective rank of the latents", "directions"),
        "compressor_gradient_norm": ("gradient norm of the compressor", "norm before clipping"),
    }
    if not ages and not any(np.isfinite(column(lines, name)).any() for name in others):
        return None
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    first, *rest = figure.subplots(1, 3)
    _plot_attention(figure, first, lines, {int(name.removeprefix(AGE)): name for name in ages})
    for axes, (name, (title, unit)) in zip(rest, others.items(), strict=True):
        axes.plot(column(lines, "step"), column(lines, name), ".-", color=TRAIN)
        axes.set_ylim(bottom=0)
        _finish_axes(axes, title, "step", unit)
    return figure


def _plot_attention(figure: Figure, axes: Axes, lines: Lines, names: dict[int, str]) -> None:
    """Attention to history against step, a curve an age; `names` are columns by age."""
    if names:
        colours = _index_colours(min(names), max(names))
        for age, name in names.items():
            colour = colours.cmap(age - min(names))
            axes.plot(column(lines, "step"), column(lines, name), ".-", color=colour)
        _add_colour_bar(figure, axes, colours, "age (chunks)")
    axes.set_ylim(bottom=0)
    unit = "share of a query's attention"
    _finish_axes(axes, "attention to the chunks before", "step", unit)


def _index_colours(first: int, last: int) -> ScalarMappable:
    """One colour a number, the larger the darker; its ``cmap`` counts from the first."""
    count = last - first + 1
    colours = colormaps["viridis_r"].resampled(count)
    return ScalarMappable(BoundaryNorm(np.arange(first, last + 2) - 0.5, count), colours)


def _add_colour_bar(figure: Figure, axes: Axes, colours: ScalarMappable, label: str) -> None:
    bar = figure.colorbar(colours, ax=axes, label=label)
    bar.set_ticks(MaxNLocator(9, integer=True))
    bar.minorticks_off()


def _finish_axes(axes: Axes, title: str, x: str, y: str, legend: str = "best") -> None:
    axes.set_title(title, fontsize=11)
    axes.set(xlabel=x, ylabel=y)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines["right"].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend, frameon=True, framealpha=0.9)
