"""The results of benchmarks/train_throughput.py: tables, figures with targets, and a JSON file."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from flops import FORMULA
from rich.console import Console
from rich.table import Table

from i3dist.errors import UserError
from i3dist.files import write_result

# A ratio compares with the fastest of these.
GPT_SHORT, GPT_LONG = ("gpt-512",), ("gpt-4096", "gpt-4096-masks")
DERIVED = ("tokens_per_s", "mfu", "of_product")  # of a row's fields, stored with them


@dataclass(frozen=True)
class Row:
    """One contestant at one shape."""

    contestant: str
    shape: str
    parameters: int
    tokens: int  # of an optimizer step
    ms: float  # of an optimizer step, median
    flops_per_token: float
    peak: float  # FLOP/s of the best matrix product of the run
    memory_gib: float | None  # most that was allocated
    first_loss: float  # of the timed steps
    last_loss: float
    data_wait: float | None = None  # share of the time
    sheet: float | None = None  # FLOP/s of the GPU by its data sheet, None if unknown

    @property
    def tokens_per_s(self) -> float:
        """Speed."""
        return 1e3 * self.tokens / self.ms

    @property
    def mfu(self) -> float | None:
        """Share of the data sheet's dense bf16 peak, as everywhere; None if that is unknown."""
        return self.flops_per_token * self.tokens_per_s / self.sheet if self.sheet else None

    @property
    def of_product(self) -> float:
        """Share of the best matrix product's rate."""
        return self.flops_per_token * self.tokens_per_s / self.peak


@dataclass(frozen=True)
class Figure:
    """A figure of merit, with or without a target."""

    name: str
    value: float
    form: str  # how it is printed
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None if there is no target."""
        if self.least is not None:
            return self.value >= self.least
        return self.value <= self.most if self.most is not None else None


def fastest(rows: Iterable[Row], *contestants: str) -> Row | None:
    """The fastest row of these contestants; None if there is none."""
    found = [row for row in rows if row.contestant in contestants]
    return max(found, key=lambda row: row.tokens_per_s, default=None)


def figures(rows: list[Row], card_step: str) -> list[Figure]:
    """Every figure whose rows were measured."""
    engine = fastest(rows, "engine")
    if engine is None:
        return []
    found = [
        Figure("engine, best shape, tokens/s", engine.tokens_per_s, ",.0f", least=240_000),
        Figure("engine, best shape, of the best product", engine.of_product, ".1%", least=0.53),
    ]
    if engine.mfu is not None:
        found.append(Figure("engine, best shape, MFU", engine.mfu, ".1%"))
    at = {(row.contestant, row.shape): row for row in rows}

    def ratio(name: str, a: Row | None, b: Row | None, least: float | None = None) -> None:
        if a is not None and b is not None:
            found.append(Figure(name, a.tokens_per_s / b.tokens_per_s, ".3f", least=least))

    card, bare = at.get(("engine", card_step)), at.get(("bare", engine.shape))
    equal = [row for row in rows if ", ff " not in row.shape]  # the GPT of i3's size
    ratio("engine / fastest GPT at 4,096", engine, fastest(equal, *GPT_LONG), 1.35)
    ratio("engine / fastest GPT at 512", engine, fastest(equal, *GPT_SHORT), 1.05)
    ratio("engine / bare loop, same shape", engine, bare, 0.95)
    ratio("engine / bare loop, card's step", card, at.get(("bare", card_step)))
    ratio("card's step / best shape", card, engine, 0.90)
    ratio("card to the letter / best shape", fastest(rows, "letter"), engine)
    ratio("engine / scripted WKV", fastest(rows, "one-chunk"), fastest(rows, "scripted"))
    if without := at.get(("no-history", engine.shape)):
        cost = engine.ms / without.ms - 1
        found.append(Figure("time that history adds", cost, ".1%", most=0.06))
    if (data := at.get(("data", engine.shape))) and data.data_wait is not None:
        found.append(Figure("waiting for data", data.data_wait, ".2%", most=0.01))
    return found


def show(rows: list[Row], merits: list[Figure], title: str) -> None:
    """Print both tables."""
    console = Console(width=120)
    console.print(_row_table(rows, title))
    if merits:
        console.print(figure_table(merits))


def _row_table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, caption=f"{FORMULA}; MFU against the data sheet")
    numbers = ("weights", "tokens", "ms", "tokens/s", "MFU", "of product", "its TFLOP/s", "GiB")
    for heading in ("contestant", "step", *numbers):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    for row in rows:
        table.add_row(
            row.contestant,
            row.shape,
            f"{row.parameters / 1e6:,.1f}M",
            f"{row.tokens:,}",
            f"{row.ms:,.1f}",
            f"{row.tokens_per_s:,.0f}",
            "" if row.mfu is None else f"{row.mfu:.1%}",
            f"{row.of_product:.1%}",
            f"{row.peak / 1e12:,.1f}",
            "" if row.memory_gib is None else f"{row.memory_gib:.1f}",
        )
    return table


def figure_table(merits: list[Figure]) -> Table:
    """Figures beside their targets."""
    table = Table(title="figures and their targets")
    for heading in ("figure", "value", "target", "met"):
        table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
    for f in merits:
        bound = f.least if f.least is not None else f.most
        sign = ">=" if f.least is not None else "<="
        target = "" if bound is None else f"{sign} {bound:{f.form}}"
        met = {None: "", True: "yes", False: "no"}[f.met]
        table.add_row(f.name, f"{f.value:{f.form}}", target, met)
    return table


def load(path: Path | None) -> list[Row]:
    """Rows of an earlier run; none if there is no file.

    Raises:
        UserError: the file is not one of this program.
    """
    if path is None or not path.exists():
        return []
    try:
        given = json.loads(path.read_text())["rows"]
        names = {field.name for field in fields(Row)}
        return [Row(**{name: row[name] for name in names & row.keys()}) for row in given]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of this program: {error}") from None


def merge(rows: list[Row], new: Row) -> list[Row]:
    """The rows and a new one, which replaces that of the same contestant and shape."""
    kept = [row for row in rows if (row.contestant, row.shape) != (new.contestant, new.shape)]
    return [*kept, new]


def store(path: Path, rows: list[Row], merits: list[Figure], machine: dict[str, str]) -> None:
    """Write all as one JSON object."""
    tables = {
        "rows": [asdict(row) | {name: getattr(row, name) for name in DERIVED} for row in rows],
        "figures": [asdict(figure) | {"met": figure.met} for figure in merits],
    }
    content = machine | {"formula": FORMULA} | tables
    write_result(path, f"{json.dumps(content, indent=1)}\n".encode())
