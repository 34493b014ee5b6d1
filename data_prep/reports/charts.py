"""Charts of a report as SVG text."""

from collections.abc import Sequence
from itertools import pairwise

from i3dist.page.svg import ACCENT, axes_of, short, styled, ticker, to_svg


def histogram(
    edges: Sequence[int], counts: Sequence[int], x_label: str, y_label: str, description: str
) -> str:
    """A histogram whose bins grow by a constant factor, over a logarithmic axis."""
    with styled():
        figure, axes = axes_of(x_label, y_label)
        widths = [b - a for a, b in pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=ACCENT, edgecolor="none")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(short))
        axes.xaxis.set_minor_formatter(ticker.FuncFormatter(lambda *_: ""))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(short))
        return to_svg(figure, description)


def bars(
    labels: Sequence[str], values: Sequence[float], x_label: str, y_label: str, description: str
) -> str:
    """A bar for each label; values are shares if none is above 1, else counts."""
    shares = all(value <= 1 for value in values)
    with styled():
        figure, axes = axes_of(x_label, y_label)
        places = range(len(labels))
        drawn = axes.bar(places, values, 0.8, color=ACCENT, edgecolor="none")
        names = [f"{v:.1%}" if shares else short(v) for v in values]
        axes.bar_label(drawn, names, padding=2, fontsize=9)
        turned = sum(map(len, labels)) > 50
        axes.set_xticks(
            places, labels, rotation=35 if turned else 0, ha="right" if turned else "center"
        )
        formatter = ticker.PercentFormatter(1.0, 0) if shares else ticker.FuncFormatter(short)
        axes.yaxis.set_major_formatter(formatter)
        return to_svg(figure, description)
