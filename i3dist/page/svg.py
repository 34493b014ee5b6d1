"""matplotlib figures as SVG text that takes its colors from the page around it."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from i3dist.engine.toolchain import variables

# While it is imported, matplotlib fails if the variable names a backend that is not installed.
with variables(MPLBACKEND="agg"):
    import matplotlib as mpl
    from matplotlib import colormaps
    from matplotlib import ticker as ticker  # for those who draw
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

# Stand-ins, which the page's colors replace: matplotlib knows no CSS.
TEXT, ACCENT, GRID = "#010203", "#040506", "#070809"
SERIES = 8  # colors of things that are compared
SHADES = 10  # colors of things in an order

_COLORS = {
    TEXT: "currentColor",
    ACCENT: "var(--accent)",
    GRID: "var(--line)",
    **{f"#0a0b{n:02x}": f"var(--series{n})" for n in range(SERIES)},
    **{f"#0c0d{n:02x}": f"var(--shade{n})" for n in range(SHADES)},
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "i3dist",  # the same chart gives the same bytes
    "path.simplify": False,  # every point is there
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def series_color(number: int) -> str:
    """The color of the compared thing `number`, from 0; they repeat after `SERIES`."""
    return f"#0a0b{number % SERIES:02x}"


def shade(place: float) -> str:
    """The color of a place in an order, from 0.0 to 1.0."""
    return f"#0c0d{round(place * (SHADES - 1)):02x}"


def css_shades(dark: bool) -> str:
    """The CSS variables of the shades, on a light or a dark page."""
    first, last = (0.95, 0.25) if dark else (0.85, 0.0)
    places = (first + (last - first) * n / (SHADES - 1) for n in range(SHADES))
    return " ".join(
        f"--shade{n}: {to_hex(colormaps['viridis'](place))};" for n, place in enumerate(places)
    )


@contextmanager
def styled() -> Iterator[None]:
    """Inside, figures are made and turned `to_svg` in the page's style."""
    with mpl.rc_context(_STYLE):
        yield


def axes_of(x_label: str, y_label: str) -> tuple[Figure, Any]:
    """An empty figure and its axes, of a size that can be read at 400 pixels."""
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", linewidth=0.8)
    axes.margins(y=0.1)
    return figure, axes


def to_svg(figure: Figure, description: str) -> str:
    """The figure as an SVG element; `description` is for those who cannot see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[a-z0-9]+_\d+">', "<g>", text)  # the same in every figure of a page
    for stand_in, color in _COLORS.items():
        text = text.replace(stand_in, color)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)


def short(value: float, _: Any = None) -> str:
    """A number in few characters: 1,500 as 1.5k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
