"""What benchmarks/history.py measured: tables of arms, and loss by chunk index."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from i3dist.errors import UserError

NONE, CEILING = "none", "ceiling"
SHOWN_CHUNKS = 32  # in the plot


class Figures(NamedTuple):
    """Mean held-out losses of one trained arm, nats per token."""

    first: float  # chunk 0
    later: float  # chunks 1 and later, with history
    withheld: float  # the same with history withheld
    other: float  # the same with another document's history
    rare: float  # of rare tokens, chunks 1 and later
    by_chunk: np.ndarray  # with history, [chunks]

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Figures":
        """From one line of the results."""
        sums = {key: np.array(value) for key, value in line["by_chunk"].items()}
        count = sums["count"]
        later = {key: value[1:].sum() / count[1:].sum() for key, value in sums.items()}
        with np.errstate(invalid="ignore"):
            by_chunk = sums["loss"] / count
        rare = line["rare"]["loss"] / max(1.0, line["rare"]["count"])
        first = sums["loss"][0] / count[0]
        return cls(first, later["loss"], later["withheld"], later["other"], rare, by_chunk)


Results = dict[int, dict[str, dict[int, Figures]]]  # tokens -> arm -> seed


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none where there is no file."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} holds no results of this program: {error}") from None


def show(lines: list[dict[str, Any]], plot: Path | None) -> None:
    """Print a table for each number of tokens, and draw the last."""
    if not lines:
        raise UserError("there are no results yet")
    grouped: Results = defaultdict(lambda: defaultdict(dict))
    costs: dict[str, tuple[float, float]] = {}
    for line in lines:
        grouped[line["tokens"]][line["arm"]][line["seed"]] = Figures.of(line)
        costs[line["arm"]] = (line["ms"], line["gib"])
    for tokens in sorted(grouped):
        Console(width=150).print(_table(tokens, grouped[tokens], costs))
    if plot is not None:
        _draw(max(grouped), grouped[max(grouped)], plot)


def _table(
    tokens: int, arms: dict[str, dict[int, Figures]], costs: dict[str, tuple[float, float]]
) -> Table:
    table = Table(title=f"after {tokens:,} tokens: held-out nats per token, mean ± spread of seeds")
    headings = ("arm", "seeds", "chunk 0", "chunks 1+", "gain", "recovered", "withheld costs")
    for heading in (*headings, "other's costs", "rare gain", "ms", "GiB"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, seeds in arms.items():
        ms, gib = costs[arm]
        gain = paired(arms, arm, lambda f: f.later)
        row = [
            arm,
            str(len(seeds)),
            spread([f.first for f in seeds.values()]),
            spread([f.later for f in seeds.values()]),
            spread(gain),
            recovered(arms, arm),
            spread([f.withheld - f.later for f in seeds.values()]),
            spread([f.other - f.later for f in seeds.values()]),
            spread(paired(arms, arm, lambda f: f.rare)),
            f"{ms:.1f}",
            f"{gib:.1f}",
        ]
        table.add_row(*row)
    return table


def paired(
    arms: dict[str, dict[int, Figures]], arm: str, figure: Callable[[Figures], float]
) -> list[float]:
    """What an arm gains over none in a figure, by common seed."""
    base = arms.get(NONE, {})
    return [figure(base[seed]) - figure(f) for seed, f in arms[arm].items() if seed in base]


def recovered(arms: dict[str, dict[int, Figures]], arm: str) -> str:
    """Share of the ceiling's gain over chunks 1 and later, means over seeds."""
    gain = paired(arms, arm, lambda f: f.later)
    most = paired(arms, CEILING, lambda f: f.later) if CEILING in arms else []
    if not gain or not most:
        return ""
    return f"{statistics.mean(gain) / statistics.mean(most):.2f}"


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def _draw(tokens: int, arms: dict[str, dict[int, Figures]], path: Path) -> None:
    """Gain over none by chunk index, with the spread over seeds."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm in arms:
        gains = np.array(paired(arms, arm, lambda f: f.by_chunk[:SHOWN_CHUNKS]))  # type: ignore[arg-type, return-value]
        if arm == NONE or not len(gains):
            continue
        mean, low, high = gains.mean(0), gains.min(0), gains.max(0)
        (line,) = axes.plot(mean, "o-", ms=3, lw=1, label=f"{arm} ({len(gains)} seeds)")
        axes.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.axhline(0.0, color="black", lw=0.5)
    axes.axvline(8.5, color="gray", lw=0.5, ls=":")
    axes.set(
        xlabel="chunk index within the document (history holds 8 chunks)",
        ylabel="gain over no history (nats per token)",
        title=f"after {tokens:,} tokens",
    )
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
