"""Compares two runs of launch/train.py that differ in history alone: what does history gain?

    python benchmarks/twins.py collect --run RUN --twin RUN --results FILE.jsonl
    python benchmarks/twins.py report FILE.jsonl [--plot FILE]

The twin is trained with `compression.off_steps` beyond its last step, so its history is never on.
Both read the same samples in every step, which their ledgers show, and were validated at the same
steps. `collect` writes a line for each run and validation. `report` compares held-out losses by
chunk index: of the run with its history, and of the twin without it.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import history_report
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plots import plot_path, save
from rich.console import Console
from rich.table import Table

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import UserError
from i3dist.files import printing_beside, write_result
from i3dist.report.run import Run

Line = dict[str, Any]

RUN, TWIN = "run", "twin"
STEPS = 50  # whose mean training loss is a point of the curve
# What the sums of history.jsonl are called in validation.jsonl.
COLUMNS = {"loss": "loss", "withheld": "loss_without_history", "other": "loss_other_history"}
ALL = range(10**9)
# The table's rows, by the chunk indices that they are means over.
ROWS = {str(i): range(i, i + 1) for i in range(9)} | {
    "9 to 15": range(9, 16),
    "16 to 31": range(16, 32),
    "32 and later": ALL[32:],
    "1 and later": ALL[1:],
}


def collect(run: Run, twin: Run) -> Iterator[Line]:
    """A line for each of the two runs and each validation after the first step.

    Raises:
        UserError: they did not read the same, or were validated at other steps.
    """
    if [entry.samples for entry in run.ledger] != [entry.samples for entry in twin.ledger]:
        raise UserError(f"{run.folder} and {twin.folder} should have read the same in every step")
    steps = [[line["step"] for line in each.validation] for each in (run, twin)]
    if steps[0] != steps[1] or not steps[0] or steps[0][-1] != len(run.ledger):
        raise UserError(
            f"{run.folder} and {twin.folder} should be validated at the same steps, and at the end"
        )
    for name, each in ((RUN, run), (TWIN, twin)):
        for validation in each.validation:
            if validation["step"]:
                yield {"run": name} | _held_out(each, validation) | _training(each, validation)


def _held_out(run: Run, validation: Line) -> Line:
    """Sums of held-out losses by chunk index, as in history.jsonl."""
    chunks = validation["by_chunk"]
    if [chunk["index"] for chunk in chunks] != list(range(len(chunks))):
        raise UserError(f"{run.folder}: validation.jsonl lacks a chunk index")
    sums = {
        name: [round(chunk["tokens"] * chunk[column], 3) for chunk in chunks]
        for name, column in COLUMNS.items()
    }
    count = [chunk["tokens"] for chunk in chunks]
    step = validation["step"]
    tokens = int(run.tokens([step])[0])
    return {"step": step, "tokens": tokens, "by_chunk": {"count": count} | sums}


def _training(run: Run, validation: Line) -> Line:
    """With the last validation: the training loss, and medians of time over logging intervals.

    Intervals in which a command began are left out.
    """
    if validation["step"] != len(run.ledger):
        return {}
    whole = len(run.ledger) // STEPS * STEPS
    losses = np.array([entry.loss for entry in run.ledger[:whole]]).reshape(-1, STEPS).mean(1)
    starts = [start.step for start in run.starts]
    before = [0, *(line["step"] for line in run.metrics)]
    usual = [
        line
        for since, line in zip(before, run.metrics, strict=False)
        if not any(since <= start < line["step"] for start in starts)
    ]

    def median(name: str) -> float:
        return statistics.median(line[name] for line in usual)

    return {
        "curve": losses.round(5).tolist(),
        "parameters": run.parameters,
        "ms": round(1e3 * median("step_time"), 2),
        "tokens_per_s": round(median("tokens_per_second")),
        "mfu": round(median("mfu"), 4),
    }


class Pair:
    """The lines of both runs after a number of steps, and what follows from them."""

    def __init__(self, run: Line, twin: Line):
        self.tokens: int = run["tokens"]
        self._count = np.array(run["by_chunk"]["count"])
        sums = {name: np.array(run["by_chunk"][name]) for name in COLUMNS}
        self._sums = sums | {"without": np.array(twin["by_chunk"]["withheld"])}

    @classmethod
    def all_of(cls, lines: list[Line]) -> "list[Pair]":
        """One for each step that both runs have a line of.

        Raises:
            UserError: there is none, or the lines are not those of `collect`.
        """
        runs: dict[str, dict[int, Line]] = {RUN: {}, TWIN: {}}
        try:
            for line in lines:
                runs[line["run"]][line["step"]] = line
        except KeyError:
            raise UserError("these are no results of `twins.py collect`") from None
        steps = sorted(runs[RUN].keys() & runs[TWIN].keys())
        pairs = [cls(runs[RUN][step], runs[TWIN][step]) for step in steps]
        if not pairs:
            raise UserError("there are no results of both runs yet")
        return pairs

    def tokens_in(self, chunks: range) -> int:
        """How many tokens have these chunk indices."""
        return int(self._count[chunks.start : chunks.stop].sum())

    def mean(self, name: str, chunks: range) -> float:
        """A mean loss over chunk indices: one of `COLUMNS`, or of the twin ("without")."""
        part = self._sums[name][chunks.start : chunks.stop]
        return float(part.sum()) / self.tokens_in(chunks)

    def gain(self, chunks: range) -> float:
        """How far the run's loss is below the twin's."""
        return self.mean("without", chunks) - self.mean("loss", chunks)


def show(pairs: list[Pair]) -> None:
    """Print a table for each number of tokens."""
    for pair in pairs:
        title = f"after {pair.tokens:,} tokens: held-out nats per token"
        table = Table(title=title)
        for heading in ("chunk", "tokens", "twin", "run", "gain", "withheld costs", "other costs"):
            table.add_column(heading, justify="right")
        for name, chunks in ROWS.items():
            if not pair.tokens_in(chunks):
                continue
            loss = pair.mean("loss", chunks)
            costs = (pair.mean(column, chunks) - loss for column in ("withheld", "other"))
            figures = (pair.mean("without", chunks), loss, pair.gain(chunks), *costs)
            table.add_row(name, f"{pair.tokens_in(chunks):,}", *(f"{x:.4f}" for x in figures))
        Console(width=100).print(table)


def plot(lines: list[Line], pairs: list[Pair], path: Path) -> None:
    """Plot the gain by chunk index, and the losses of both by tokens."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    gains, losses = figure.subplots(1, 2)
    places = [range(i, i + 1) for i in range(history_report.SHOWN_CHUNKS)]
    for pair in pairs:
        each = [pair.gain(place) for place in places if pair.tokens_in(place)]
        gains.plot(each, "o-", ms=3, lw=1, label=f"{pair.tokens / 1e6:,.0f}M tokens")
    gains.axhline(0.0, color="black", lw=0.5)
    gains.axvline(8.5, color="gray", lw=0.5, ls=":")
    gains.set(xlabel="chunk index within the document (history holds 8 chunks)")
    gains.set(ylabel="gain over the twin (nats per token)")
    for name, color in ((TWIN, "C1"), (RUN, "C0")):
        (line,) = (line for line in lines if line["run"] == name and "curve" in line)
        losses.plot(*_curve(line), lw=1, color=color, label=f"{name}, training")
        held_out = [pair.mean("loss" if name == RUN else "without", ALL) for pair in pairs]
        tokens = [pair.tokens / 1e6 for pair in pairs]
        losses.plot(tokens, held_out, "o--", ms=4, lw=1, color=color, label=f"{name}, held out")
    losses.set(xlabel="million tokens", ylabel="loss (nats per token)")
    for axes in (gains, losses):
        axes.legend(fontsize="small")
    save(figure, path)


def _curve(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Million tokens and training loss, without the first twentieth, far above the rest."""
    losses = np.array(line["curve"])
    tokens = STEPS * (np.arange(len(losses)) + 0.5) * line["tokens"] / line["step"]
    first = len(losses) // 20
    return tokens[first:] / 1e6, losses[first:]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("collect", help="write what is compared of two runs")
    runs.add_argument("--run", type=Path, required=True, metavar="RUN", help="with history")
    runs.add_argument("--twin", type=Path, required=True, metavar="RUN", help="without")
    runs.add_argument("--results", type=result_path, required=True, metavar="FILE")
    report = commands.add_parser("report", help="compare them")
    report.add_argument("results", type=Path, metavar="FILE")
    report.add_argument("--plot", type=plot_path, metavar="FILE", help="plot gain and losses")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Collect or report."""
    options = parse_arguments(arguments)
    if options.command == "collect":
        collected = collect(Run.read(options.run), Run.read(options.twin))
        text = "".join(f"{json.dumps(line)}\n" for line in collected)
        write_result(options.results, text.encode())
        return
    lines = history_report.read(options.results)
    pairs = Pair.all_of(lines)
    with printing_beside(options.plot):
        show(pairs)
    if options.plot:
        plot(lines, pairs, options.plot)


if __name__ == "__main__":
    with one_line_errors():
        main()
