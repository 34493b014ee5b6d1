"""Tokens/s of i3-4096ctx on 1 to 1,024 GPUs, derived from steps measured on one: docs/scaling.md.

    python benchmarks/scaling.py [--measured FILE] [--plot FILE] [--json FILE]

Nothing runs on a GPU here. Step times of one GPU come from FILE, which train_throughput.py --json
wrote (its rows "engine, 4 lanes x 8 chunks" and "16 lanes x 8 chunks"; others check the fit), or
are those of `MEASURED`. Tables are in Markdown, as the document has them.

Units: seconds, bytes, bytes/s, tokens. A lane is 8 chunks of 512 tokens.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import results
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from i3dist.errors import ArgumentParser, UserError, one_line_errors

WORLDS = [2**power for power in range(11)]
LANE_TOKENS = 8 * 512
BATCHES = {"1M": 256, "4M": 1024}  # lanes of a step that stays the same
LANES = (4, 16)  # of a GPU: the default, and the largest micro-batch that is measured
FLATS = (342_860_800, 262_560)  # elements of the two flat tensors, i3dist/model/packed.py
SCALARS = 3  # sums of a step over ranks: targets, loss, gradient norm
FP32, BF16 = 4, 2
ADAMW = 3.3e-3  # of a step on one GPU: fused AdamW over all states, from a profile


@dataclass(frozen=True)
class Measured:
    """A step of one GPU."""

    lanes: int
    at_once: int  # lanes of a micro-batch
    seconds: float


# H200, through the engine; see docs/scaling.md.
MEASURED = [Measured(4, 4, 73.6e-3), Measured(16, 16, 259.6e-3)]


@dataclass(frozen=True)
class Cost:
    """What a step costs one GPU: tokens, micro-batches (gradients above all) and the update."""

    token: float
    micro_batch: float
    adamw: float = ADAMW

    @classmethod
    def fit(cls, measured: Sequence[Measured]) -> "Cost":
        """The line through the steps of `LANES`, each one micro-batch.

        Raises:
            UserError: a step is missing, or the line leaves no time for AdamW.
        """
        one = {step.lanes: step.seconds for step in measured if step.lanes == step.at_once}
        if any(lanes not in one for lanes in LANES):
            raise UserError("the measurements lack an engine step of 4 or 16 lanes at once")
        few, many = LANES
        token = (one[many] - one[few]) / ((many - few) * LANE_TOKENS)
        fixed = one[few] - few * LANE_TOKENS * token
        if token <= 0 or fixed < ADAMW:
            raise UserError("the steps of 4 and 16 lanes are not of one GPU in one state")
        return cls(token, fixed - ADAMW)

    def seconds(self, lanes: int, micro_batches: int, share: float = 1.0) -> float:
        """A step without communication; `share` of the optimizer's states is this GPU's."""
        computed = lanes * LANE_TOKENS * self.token + micro_batches * self.micro_batch
        return computed + share * self.adamw


def ring(size: float, ranks: int, bandwidth: float, hop: float) -> float:
    """All-gather, or reduce-scatter, of `size` bytes in all around a ring."""
    return (ranks - 1) * (size / ranks / bandwidth + hop)


def tree(size: float, ranks: int, bandwidth: float, hop: float) -> float:
    """All-reduce through two binary trees; NCCL counts two hops of a ring for a level."""
    return 2 * size / bandwidth + 2 * math.ceil(math.log2(ranks)) * 2 * hop


@dataclass(frozen=True)
class Cluster:
    """Nodes of 8 GPUs; every bandwidth is one GPU's, one way, as NCCL achieves it: assumed."""

    name: str
    rail: float  # to the GPUs of equal place in other nodes
    rail_hop: float
    nvlink: float = 370e9
    nvlink_hop: float = 3.4e-6

    def scatter(self, size: float, world: int) -> float:
        """All-gather, or reduce-scatter, of `size` bytes in all: within nodes, along rails."""
        gpus, nodes = _layout(world)
        inside = ring(size, gpus, self.nvlink, self.nvlink_hop)
        return inside + ring(size / gpus, nodes, self.rail, self.rail_hop)

    def all_reduce(self, size: float, world: int) -> float:
        """Reduce-scatter within nodes, all-reduce along rails, all-gather within nodes."""
        gpus, nodes = _layout(world)
        inside = 2 * ring(size, gpus, self.nvlink, self.nvlink_hop)
        rail = (size / gpus, nodes, self.rail, self.rail_hop)
        return inside + min(2 * ring(*rail), tree(*rail))


def _layout(world: int) -> tuple[int, int]:
    """GPUs of a node, and nodes."""
    if world > 8 and world % 8:
        raise ValueError(f"{world} GPUs do not fill nodes of 8")
    return min(world, 8), max(1, world // 8)


INFINIBAND = Cluster("InfiniBand", rail=45e9, rail_hop=14e-6)
ETHERNET = Cluster("Ethernet", rail=11e9 / 8, rail_hop=50e-6)


@dataclass(frozen=True)
class Scheme:
    """A form of data parallelism."""

    name: str
    shards: bool  # the optimizer's states, so that weights are gathered after the update
    every_micro_batch: bool = False  # reduces gradients, not once a step


DP, ZERO1 = Scheme("DP", shards=False), Scheme("ZeRO-1", shards=True)
ZERO2 = Scheme("ZeRO-2", shards=True, every_micro_batch=True)


@dataclass(frozen=True)
class Job:
    """A step of all GPUs."""

    world: int
    lanes: int  # of a GPU
    micro_batches: int = 1
    scheme: Scheme = ZERO2
    cluster: Cluster = INFINIBAND
    gradient_bytes: int = FP32  # of an element on the wire

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.world * self.lanes * LANE_TOKENS

    def reduction(self) -> float:
        """One all-reduce of the whole gradient."""
        return sum(self.cluster.all_reduce(self.gradient_bytes * n, self.world) for n in FLATS)

    def gathering(self, element: int = BF16) -> float:
        """All-gather of the weights, or reduce-scatter of as large a gradient."""
        return sum(self.cluster.scatter(element * n, self.world) for n in FLATS)

    def communication(self) -> float:
        """All of a step; none of it overlaps with computation."""
        times = self.micro_batches if self.scheme.every_micro_batch else 1
        gathering = self.gathering() if self.scheme.shards else 0.0
        scalars = SCALARS * self.cluster.all_reduce(8, self.world)
        return times * self.reduction() + gathering + scalars

    def seconds(self, cost: Cost) -> float:
        """A step."""
        share = 1 / self.world if self.scheme.shards else 1.0
        return cost.seconds(self.lanes, self.micro_batches, share) + self.communication()

    def speed(self, cost: Cost) -> float:
        """Tokens/s."""
        return self.tokens / self.seconds(cost)

    def efficiency(self, cost: Cost, alone: "Job | None" = None) -> float:
        """Speed over `world` times that of one GPU: with a GPU's lanes, or those of `alone`."""
        alone = alone or replace(self, world=1)
        return self.speed(cost) / (self.world * alone.speed(cost))


def load(path: Path | None) -> list[Measured]:
    """Steps of the engine in a file of train_throughput.py, windows of 8 chunks.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    if path is None:
        return MEASURED
    if not path.exists():
        raise UserError(f"there is no file {path}")
    shape, found = re.compile(r"(\d+) lanes(?: by (\d+))? x 8 chunks"), []
    for row in results.load(path):
        if row.contestant == "engine" and (match := shape.fullmatch(row.shape)):
            found.append(Measured(int(match[1]), int(match[2] or match[1]), row.ms / 1e3))
    return found


def tables(cost: Cost, measured: Sequence[Measured]) -> Iterator[Table]:
    """What the document shows, in its order."""
    yield _table("Fit, ms", "lanes | at once | measured | fit", _fit_rows(cost, measured))
    columns = "GPUs | tokens a step | step, ms | communication | tokens/s | efficiency"
    columns += " | bf16: tokens/s | efficiency | Ethernet: efficiency | bf16"
    for lanes in LANES:
        rows = (_weak_row(cost, world, lanes) for world in WORLDS)
        yield _table(f"{lanes} lanes a GPU, ZeRO-2, fp32 gradients, InfiniBand", columns, rows)
    columns = "batch | GPUs | lanes a GPU | micro-batches | step, ms | tokens/s | efficiency"
    columns += " | ZeRO-1: tokens/s | DP: tokens/s"
    yield _table("One batch on all GPUs, ZeRO-2, InfiniBand", columns, _strong_rows(cost))
    columns = "GPUs, link | all-reduce | reduce-scatter | all-gather | AdamW saved | ZeRO-1 - DP"
    columns += " | ZeRO-2: 2 x 4 lanes | 8 x 4 | 2 x 16 | 8 x 16"
    yield _table("Schemes, ms; ZeRO-2 against ZeRO-1", columns, _scheme_rows(cost))


def _table(title: str, columns: str, rows: Iterable[list[str]]) -> Table:
    table = Table(title=title, box=MARKDOWN)
    for column in columns.split(" | "):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _ms(*seconds: float) -> list[str]:
    return [f"{1e3 * value:,.1f}" for value in seconds]


def _fit_rows(cost: Cost, measured: Sequence[Measured]) -> Iterator[list[str]]:
    for step in measured:
        fit = cost.seconds(step.lanes, step.lanes // step.at_once)
        yield [f"{step.lanes}", f"{step.at_once}", *_ms(step.seconds, fit)]


def _weak_row(cost: Cost, world: int, lanes: int) -> list[str]:
    forms = itertools.product((INFINIBAND, ETHERNET), (FP32, BF16))
    jobs = [Job(world, lanes, cluster=link, gradient_bytes=size) for link, size in forms]
    job, bf16, *slow = jobs
    share = job.communication() / job.seconds(cost)
    shown = [f"{world:,}", f"{job.tokens:,}", *_ms(job.seconds(cost)), f"{share:.1%}"]
    for one in (job, bf16):
        shown += [f"{one.speed(cost):,.0f}", f"{one.efficiency(cost):.1%}"]
    return shown + [f"{one.efficiency(cost):.1%}" for one in slow]


def strong_jobs(lanes: int, scheme: Scheme = ZERO2, **wire: Any) -> list[Job]:
    """Of `lanes` in all: as many at once as are measured, and at least one for each GPU."""
    each = [(world, lanes // world) for world in WORLDS if world <= lanes]
    return [Job(w, n, math.ceil(n / LANES[-1]), scheme, **wire) for w, n in each]


def _strong_rows(cost: Cost) -> Iterator[list[str]]:
    for name, lanes in BATCHES.items():
        alone, *_ = jobs = strong_jobs(lanes)
        for job in jobs:
            shown = [name, f"{job.world:,}", f"{job.lanes:,}", f"{job.micro_batches}"]
            shown += [*_ms(job.seconds(cost)), f"{job.speed(cost):,.0f}"]
            others = [replace(job, scheme=scheme).speed(cost) for scheme in (ZERO1, DP)]
            yield [*shown, f"{job.efficiency(cost, alone):.1%}", *(f"{v:,.0f}" for v in others)]


def _scheme_rows(cost: Cost) -> Iterator[list[str]]:
    for world, link in [*((w, INFINIBAND) for w in (2, 8, 16, 64, 1024)), (64, ETHERNET)]:
        job = Job(world, 1, scheme=ZERO1, cluster=link)
        saved, gathering = cost.adamw * (1 - 1 / world), job.gathering()
        shown = [f"{world:,}, {link.name if world > 8 else 'NVLink'}"]
        shown += _ms(job.reduction(), job.gathering(FP32), gathering, saved, gathering - saved)
        for lanes, count in itertools.product(LANES, (2, 8)):
            one = replace(job, lanes=lanes * count, micro_batches=count)
            two = replace(one, scheme=ZERO2)
            shown.append(f"+{two.seconds(cost) / one.seconds(cost) - 1:.1%}")
        yield shown


def draw(cost: Cost, path: Path) -> None:
    """Speed and efficiency against GPUs with equal lanes a GPU; speed with equal batches."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    speed, efficiency, strong = figure.subplots(1, 3)
    for link, size, style in ((INFINIBAND, 4, "o-"), (INFINIBAND, 2, "^--"), (ETHERNET, 4, "s:")):
        wire: dict[str, Any] = {"cluster": link, "gradient_bytes": size}
        label = f"{link.name}, {'fp32' if size == FP32 else 'bf16'}"
        for lanes, batch, colour in zip(LANES, BATCHES, ("#1f77b4", "#d62728"), strict=True):
            weak = [Job(world, lanes, **wire) for world in WORLDS]
            _curve(speed, weak, [job.speed(cost) for job in weak], style, colour)
            shares = [job.efficiency(cost) for job in weak]
            _curve(efficiency, weak, shares, style, colour, f"{lanes} lanes, {label}")
            jobs = strong_jobs(BATCHES[batch], **wire)
            speeds = [job.speed(cost) for job in jobs]
            _curve(strong, jobs, speeds, style, colour, f"{batch} tokens, {label}")
    best = [world * Job(1, LANES[-1]).speed(cost) for world in WORLDS]
    for axes, title in ((speed, "equal lanes per GPU"), (strong, "equal tokens per step")):
        axes.plot(WORLDS, best, color="0.6", lw=0.8, label="in proportion", zorder=0)
        axes.set(ylabel="tokens/s", yscale="log", title=title)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    efficiency.set(ylabel="efficiency", ylim=(0, 1.02), title="equal lanes per GPU")
    efficiency.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (speed, efficiency, strong):
        _finish_axes(axes)
    figure.savefig(path, dpi=150)


def _curve(
    axes: Axes, jobs: list[Job], y: list[float], style: str, colour: str, label: str = ""
) -> None:
    axes.plot([job.world for job in jobs], y, style, color=colour, ms=4, lw=1.2, label=label)


def _finish_axes(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set(xlabel="GPUs", xticks=WORLDS, xticklabels=[f"{world:,}" for world in WORLDS])
    axes.axvline(8, color="0.85", lw=6, zorder=0)  # the last that one node holds
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.9)


def record(cost: Cost, measured: Sequence[Measured]) -> dict[str, Any]:
    """All points of the curves, with what they are made of."""
    jobs = []
    for link, size in itertools.product((INFINIBAND, ETHERNET), (FP32, BF16)):
        wire: dict[str, Any] = {"cluster": link, "gradient_bytes": size}
        jobs += [Job(world, lanes, **wire) for lanes in LANES for world in WORLDS]
        for lanes, scheme in itertools.product(BATCHES.values(), (ZERO2, ZERO1, DP)):
            jobs += strong_jobs(lanes, scheme, **wire)
    rows = [asdict(job) | {"seconds": job.seconds(cost), "speed": job.speed(cost)} for job in jobs]
    return {"measured": [asdict(step) for step in measured], "cost": asdict(cost), "jobs": rows}


def main(arguments: list[str] | None = None) -> None:
    """Print, draw, and write JSON where asked."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--measured", metavar="FILE", type=Path, help="steps of one GPU")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the curves here")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every point here")
    options = parser.parse_args(arguments)
    measured = load(options.measured)
    cost = Cost.fit(measured)
    console = Console(width=160)
    for table in tables(cost, measured):
        console.print(table)
    if options.plot:
        draw(cost, options.plot)
    if options.json:
        options.json.write_text(json.dumps(record(cost, measured), indent=1) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
