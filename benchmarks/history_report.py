"""Reports the results of benchmarks/history.py: tables of arms, and gain by place in the text."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plots import save
from rich.console import Console
from rich.table import Table

from i3dist.errors import UserError

Value = TypeVar("Value", float, np.ndarray)

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
    by_position: np.ndarray  # with history in chunks 1 and later, [tokens of a chunk]

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Figures":
        """From one line of the results."""
        sums, places = (
            {key: np.array(value) for key, value in line[name].items()}
            for name in ("by_chunk", "by_position")
        )
        count = sums["count"]
        later = {key: value[1:].sum() / count[1:].sum() for key, value in sums.items()}
        with np.errstate(invalid="ignore"):
            by_chunk = sums["loss"] / count
            by_position = places["loss"] / places["count"]
        rare = line["rare"]["loss"] / max(1.0, line["rare"]["count"])
        first = sums["loss"][0] / count[0]
        losses = (later[key] for key in ("loss", "withheld", "other"))
        return cls(first, *losses, rare, by_chunk, by_position)


Results = dict[int, dict[str, dict[int, Figures]]]  # tokens -> arm -> seed


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if there is no file."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} holds no results of this program: {error}") from None


def refuse_mixed(lines: list[dict[str, Any]]) -> None:
    """See that all lines are of the same data: losses per token compare within one tokenizer alone.

    Raises:
        UserError: their fingerprints differ, or the tokens that they were evaluated on.
    """
    prints = {line["data"]: line for line in lines if "data" in line}
    texts = {tuple(line["by_chunk"]["count"]): line for line in lines if "by_chunk" in line}
    for differing in (prints, texts):
        if len(differing) > 1:
            one, other, *_ = (f"{line['arm']}, seed {line['seed']}" for line in differing.values())
            raise UserError(
                f"{one} and {other} are of different data: compare arms of one --data and one "
                "--held-out, in a file of --results of their own"
            )


def show(lines: list[dict[str, Any]], plot: Path | None) -> None:
    """Print a table for each number of tokens, and plot the last."""
    if not lines:
        raise UserError("there are no results yet")
    refuse_mixed(lines)
    grouped: Results = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        grouped[line["tokens"]][line["arm"]][line["seed"]] = Figures.of(line)
    for tokens in sorted(grouped):
        Console(width=150).print(_table(tokens, grouped[tokens]))
    if plot is not None:
        _plot(max(grouped), grouped[max(grouped)], plot)


def _table(tokens: int, arms: dict[str, dict[int, Figures]]) -> Table:
    table = Table(title=f"after {tokens:,} tokens: held-out nats per token, mean ± spread of seeds")
    headings = ("arm", "seeds", "chunk 0", "chunks 1+", "gain", "recovered", "withheld costs")
    for heading in (*headings, "other's costs", "rare gain"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, seeds in arms.items():
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
        ]
        table.add_row(*row)
    return table


def paired(
    arms: dict[str, dict[int, Figures]], arm: str, figure: Callable[[Figures], Value]
) -> list[Value]:
    """The gain of an arm over the arm without history in a figure, for each common seed."""
    base = arms.get(NONE, {})
    return [figure(base[seed]) - figure(f) for seed, f in arms[arm].items() if seed in base]


def recovered(arms: dict[str, dict[int, Figures]], arm: str) -> str:
    """Share of the ceiling's gain in chunks 1 and later, by means over seeds."""
    gain = paired(arms, arm, lambda f: f.later)
    most = paired(arms, CEILING, lambda f: f.later) if CEILING in arms else []
    if not gain or not most:
        return ""
    return f"{statistics.mean(gain) / statistics.mean(most):.2f}"


def spread(values: Sequence[float]) -> str:
    """The mean, with the standard deviation of several values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def _plot(tokens: int, arms: dict[str, dict[int, Figures]], path: Path) -> None:
    """Plot the gain over no history by chunk index and by position in the chunk."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    by_chunk, by_position = figure.subplots(1, 2)
    for arm in arms:
        if arm == NONE:
            continue
        _plot_gain(by_chunk, arm, paired(arms, arm, lambda f: f.by_chunk[:SHOWN_CHUNKS]))
        _plot_gain(by_position, arm, paired(arms, arm, lambda f: doubling_means(f.by_position)))
    by_chunk.axvline(8.5, color="gray", lw=0.5, ls=":")
    by_chunk.set_xlabel("chunk index within the document (history holds 8 chunks)")
    by_position.set_xlabel("position in the chunk (chunks 1 and later)")
    some = next(figures for seeds in arms.values() for figures in seeds.values())
    starts = doubling(len(some.by_position))
    by_position.set_xticks(range(len(starts)), [str(start) for start in starts])
    for axes in (by_chunk, by_position):
        axes.axhline(0.0, color="black", lw=0.5)
        title = f"after {tokens / 1e6:,.0f}M tokens"
        axes.set(ylabel="gain over no history (nats per token)", title=title)
    by_position.legend(fontsize="small")
    save(figure, path)


def plot_curves(lines: list[dict[str, Any]], arms: Sequence[str], path: Path) -> None:
    """Plot how far each arm's training loss is below that of no history, against tokens.

    Raises:
        UserError: an arm has no seed in common with no history, or lines are of different data.
    """
    refuse_mixed(lines)
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm in arms:
        tokens, gains = training_gain(lines, arm)
        label = f"{arm} ({_seeds(len(gains))})"
        axes.plot(tokens / 1e6, gains.mean(0), "o-", ms=2, lw=1, label=label)
    axes.axhline(0.0, color="black", lw=0.5)
    axes.set(xlabel="million tokens", ylabel="training loss below no history's (nats per token)")
    axes.legend(fontsize="small")
    save(figure, path)


def training_gain(lines: list[dict[str, Any]], arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] at the middle of each interval of an arm's curve, and by how much its mean loss
    there is below that of no history, for each common seed [seeds, n]. The longest runs count.

    Raises:
        UserError: there is no common seed.
    """
    runs: dict[str, dict[int, dict[str, Any]]] = {arm: {}, NONE: {}}
    for line in sorted(lines, key=lambda line: line["tokens"]):
        if line["arm"] in runs:
            runs[line["arm"]][line["seed"]] = line
    seeds = sorted(runs[arm].keys() & runs[NONE].keys())
    if not seeds:
        raise UserError(f"there is no run of {arm} with a seed of {NONE}")
    pairs = [(_losses(runs[NONE][seed]), _losses(runs[arm][seed])) for seed in seeds]
    count = min(len(losses) for pair in pairs for losses in pair)
    interval = runs[arm][seeds[0]]["tokens"] / len(pairs[0][1])
    gains = np.array([np.subtract(base[:count], losses[:count]) for base, losses in pairs])
    return (np.arange(count) + 0.5) * interval, gains


def _losses(line: dict[str, Any]) -> list[float]:
    """The mean training losses of a line's curve, which may have nothing else."""
    curve = line["curve"]
    losses: list[float] = curve["loss"] if isinstance(curve, dict) else curve
    return losses


def _seeds(count: int) -> str:
    return f"{count} seed" + ("s" if count > 1 else "")


def _plot_gain(axes: Axes, arm: str, of_seeds: list[np.ndarray]) -> None:
    """Plot one arm's gains: the mean as a line, and the range over seeds behind it."""
    gains = np.array(of_seeds)
    if not len(gains):
        return
    mean, low, high = gains.mean(0), gains.min(0), gains.max(0)
    (line,) = axes.plot(mean, "o-", ms=3, lw=1, label=f"{arm} ({_seeds(len(gains))})")
    axes.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.15, lw=0)


def doubling_means(values: np.ndarray) -> np.ndarray:
    """Means over positions 0, 1, 2-3, 4-7, 8-15 and so on."""
    return np.array([part.mean() for part in np.split(values, doubling(len(values))[1:])])


def doubling(length: int) -> list[int]:
    """0 and the powers of two below `length`."""
    return [0, *(2**i for i in range(length.bit_length()) if 2**i < length)]
