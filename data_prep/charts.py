"""Charts of a report as SVG text, in the colors of the page around them."""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

# Stand-ins, which the page's colors replace: matplotlib knows no CSS.
_TEXT, _BAR, _GRID = "#010203", "#040506", "#070809"
_COLORS = {_TEXT: "currentColor", _BAR: "var(--accent)", _GRID: "var(--line)"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "i3dist",  # the same chart gives the same bytes
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def histogram(
    edges: Sequence[int], counts: Sequence[int], x_label: str, y_label: str, description: str
) -> str:
    """A histogram whose bins grow by a constant factor, over a logarithmic axis."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(x_label, y_label)
        widths = [b - a for a, b in pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=_BAR, edgecolor="none")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        return _svg(figure, description)


def bars(
    labels: Sequence[str], values: Sequence[float], x_label: str, y_label: str, description: str
) -> str:
    """A bar for each label; values are shares if none is above 1, else counts."""
    shares = all(value <= 1 for value in values)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(x_label, y_label)
        places = range(len(labels))
        drawn = axes.bar(places, values, 0.8, color=_BAR, edgecolor="none")
        names = [f"{v:.1%}" if shares else short(v) for v in values]
        axes.bar_label(drawn, names, padding=2, fontsize=9)
        turned = sum(map(len, labels)) > 50
        axes.set_xticks(
            places, labels, rotation=35 if turned else 0, ha="right" if turned else "center"
        )
        formatter = PercentFormatter(1.0, 0) if shares else FuncFormatter(short)
        axes.yaxis.set_major_formatter(formatter)
        return _svg(figure, description)


def short(value: float, _: Any = None) -> str:
    """A number in few characters: 1,500 as 1.5k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", linewidth=0.8)
    axes.margins(y=0.1)
    return figure, axes


def _svg(figure: Figure, description: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, color in _COLORS.items():
        text = text.replace(stand_in, color)
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
