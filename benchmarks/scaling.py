"""Derives tokens/s of i3-4096ctx on 1 to 1,024 GPUs from steps on one GPU: docs/scaling.md.

    python benchmarks/scaling.py [--measured FILE] [--several FILE] [--plot FILE] [--document FILE]

Nothing runs on a GPU here. The step times of one GPU come from a FILE of train_throughput.py
--json, by default from the results in docs/. The model is fitted to the rows "engine" of 4 and of
16 lanes x 8 chunks; the other rows of the engine check it. Tables are printed in Markdown;
--document writes them into docs/scaling.md.

Units: seconds, bytes, bytes/s, tokens. A lane is 8 chunks of 512 tokens.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from plots import plot_path, save

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import ModelSettings
from i3dist.engine.flat_parameters import FlatModel
from i3dist.errors import UserError
from i3dist.files import printing_beside, write_result
from i3dist.model.lm import I3LM

ADAMW = 2.3e-3  # of a step on one GPU: AdamW over all states, from a profile
BACKWARD = 2 / 3  # of computing: two matrix products for each of forward
WORLDS = [2**power for power in range(11)]
SHOWN = (1, 8, 64, 256, 1024)  # of them, in tables
LANE_TOKENS = 8 * 512
LANES = (4, 16)  # of a GPU: the default, and the largest micro-batch of the fit
BATCHES = {"1M tokens": 256, "4M tokens": 1024}  # lanes of a step
SCALARS = 3  # numbers that a step adds up over ranks: targets, loss, gradient norm
FP32, BF16 = 4, 2
RESULTS = Path(__file__).parent.parent / "docs" / "results"
MEASURED = RESULTS / "train_throughput.json"
SEVERAL = RESULTS / "several_gpus.json"
LAYERS = "12xrwkv,2xattention"  # of the model of these results

# Assumptions, explained in docs/scaling.md: one-way bandwidths, as NCCL achieves them.
NODE, NVLINK = 8, 360e9  # GPUs of a node, the bandwidth of each
LINKS = {"InfiniBand": 340e9, "Ethernet": 11e9}  # bandwidth of a node
RING_HOPS, TREE_HOPS = (1.9e-6, 4e-6), (1.25e-6, 8.5e-6)  # inside a node, between nodes
TREE_SHARE = 0.92  # of the bandwidth
WIRES = list(product(LINKS, (FP32, BF16)))  # link, bytes of a gradient's element


def ring(size: float, world: int, link: str) -> float:
    """Reduce-scatter, or all-gather, of `size` bytes in total along one ring through all GPUs."""
    nodes, bandwidth = _layout(world, link)
    inside, between = RING_HOPS
    hops = (world - nodes) * inside + (nodes - 1) * between
    return (world - 1) / world * size / bandwidth + hops


def all_reduce(size: float, world: int, link: str) -> float:
    """Reduce-scatter and all-gather; or up and down trees of nodes, if that is faster."""
    nodes, bandwidth = _layout(world, link)
    inside, between = TREE_HOPS
    hops = (world // nodes - 1) * inside + math.log2(nodes) * between
    return 2 * min(ring(size, world, link), size / (TREE_SHARE * bandwidth) + hops)


def _layout(world: int, link: str) -> tuple[int, float]:
    """Number of nodes, all full if there are several, and the bandwidth of a ring through them."""
    return max(1, world // NODE), NVLINK if world <= NODE else LINKS[link]


@cache
def flats() -> tuple[int, ...]:
    """Elements of each flat tensor that gradients and weights travel in."""
    with torch.device("meta"):
        packed = FlatModel(I3LM(ModelSettings(vocab_size=32_000, layers=LAYERS), bos_id=2))
    return tuple(flat.parameter.numel() for flat in packed.flats)


class Cost(NamedTuple):
    """Seconds that one GPU computes, without AdamW."""

    token: float
    micro_batch: float  # mostly for its gradient

    @classmethod
    def fit(cls, measured: dict[tuple[int, int], float]) -> "Cost":
        """The line through the steps of `LANES`, each one micro-batch.

        Raises:
            UserError: a step is missing, or no time is left for AdamW.
        """
        few, many = LANES
        try:
            first, second = measured[few, few], measured[many, many]
        except KeyError:
            message = f"engine steps of {few} and {many} lanes x 8 chunks are needed"
            raise UserError(message) from None
        token = (second - first) / ((many - few) * LANE_TOKENS)
        fixed = first - few * LANE_TOKENS * token
        if not (token > 0 and fixed >= ADAMW):
            raise UserError(f"steps of {few} and {many} lanes are not of one GPU in one state")
        return cls(token, fixed - ADAMW)


class Scheme(StrEnum):
    """A form of data parallelism."""

    DP = "DP"  # a step all-reduces the gradient
    ZERO1 = "ZeRO-1"  # a step reduce-scatters the gradient and all-gathers the weights
    ZERO2 = "ZeRO-2"  # the same, with a reduce-scatter for every micro-batch


@dataclass(frozen=True)
class SimulatedJob:
    """A step of all GPUs."""

    world: int
    lanes: int  # of a GPU
    micro_batches: int = 1
    scheme: Scheme = Scheme.ZERO2
    link: str = "InfiniBand"
    gradient_bytes: int = FP32  # of an element on the wire

    @property
    def tokens(self) -> int:
        """Tokens of the whole step."""
        return self.world * self.lanes * LANE_TOKENS

    def communication(self) -> float:
        """Seconds of communication in the step, none of which overlaps with computing."""
        wire = (self.world, self.link)
        gradients = [self.gradient_bytes * n for n in flats()]
        scalars = SCALARS * all_reduce(8, *wire)
        if self.scheme is Scheme.DP:
            return scalars + sum(all_reduce(size, *wire) for size in gradients)
        times = self.micro_batches if self.scheme is Scheme.ZERO2 else 1
        scattering = times * sum(ring(size, *wire) for size in gradients)
        return scalars + scattering + sum(ring(BF16 * n, *wire) for n in flats())

    def overhead(self) -> float:
        """Seconds of communication and AdamW: everything that depends on the scheme."""
        return self.communication() + ADAMW / (1 if self.scheme is Scheme.DP else self.world)

    def seconds(self, cost: Cost) -> float:
        """Seconds of the whole step."""
        computing = self.lanes * LANE_TOKENS * cost.token + self.micro_batches * cost.micro_batch
        return computing + self.overhead()

    def speed(self, cost: Cost) -> float:
        """Tokens/s."""
        return self.tokens / self.seconds(cost)

    def efficiency(self, cost: Cost, alone: "SimulatedJob") -> float:
        """Speed over `world` times that of one GPU, whose step is `alone`."""
        return self.speed(cost) / (self.world * alone.speed(cost))


def curves() -> dict[str, list[SimulatedJob]]:
    """On more and more GPUs: as many lanes on each, at once, or as many in all, 16 at once."""
    weak = {
        f"{lanes} lanes a GPU": [SimulatedJob(world, lanes) for world in WORLDS] for lanes in LANES
    }
    return weak | {
        name: [SimulatedJob(w, n // w, math.ceil(n / w / LANES[-1])) for w in WORLDS if w <= n]
        for name, n in BATCHES.items()
    }


def memory(scheme: Scheme, world: int) -> float:
    """Peak bytes on each GPU, without activations.

    In bf16: weights, and the gradient of backward. In fp32: gradient, master weights, two moments.
    During its reduction ZeRO holds the gradient both whole and as the GPU's own part.
    """
    if scheme is Scheme.DP or world == 1:
        return sum(flats()) * (2 * BF16 + 4 * FP32)
    return sum(flats()) * (2 * BF16 + FP32 + 4 * FP32 / world)


def load(path: Path) -> dict[tuple[int, int], float]:
    """Seconds of the engine's steps of 8 chunks in a file of train_throughput.py.

    Returns:
        seconds by (lanes, lanes at once).

    Raises:
        UserError: there is no such file, or it is not one of that program.
    """
    if not path.exists():
        raise UserError(f"there is no file {path}")
    shape, found = re.compile(r"(\d+) lanes(?: by (\d+))? x 8 chunks"), {}
    for row in results.load(path):
        if row.contestant == "engine" and (match := shape.fullmatch(row.shape)):
            lanes, at_once = int(match[1]), int(match[2] or match[1])
            if row.tokens == lanes * LANE_TOKENS:  # otherwise it is of the toy model
                found[lanes, at_once] = row.ms / 1e3
    return found


def tables(cost: Cost, measured: dict[tuple[int, int], float]) -> dict[str, str]:
    """The document's tables in Markdown, by their names in the document."""
    fit = "lanes | at once | measured, ms | fit, ms | off"
    scaling = "alike | GPUs | lanes a GPU | micro-batches | tokens a step | step, ms"
    scaling += " | communication | tokens/s | efficiency | bf16 | Ethernet | Ethernet, bf16"
    schemes = "GPUs, link | DP, ms | ZeRO-1, ms | ZeRO-2, ms | ZeRO-2, m = 8, ms"
    schemes += " | longer: 8 x 4 lanes | 8 x 16 lanes | DP, GB | ZeRO, GB"
    overlap = "link | gradients | step, ms | reduce-scatter | backward | gain at most"
    return {
        "fit": _markdown(fit, _fit_rows(cost, measured)),
        "scaling": _markdown(scaling, _scaling_rows(cost)),
        "schemes": _markdown(schemes, _scheme_rows(cost)),
        "overlap": _markdown(overlap, _overlap_rows(cost)),
        "several": several_table(cost, SEVERAL),
    }


def _overlap_rows(cost: Cost) -> Iterator[list[str]]:
    """What hiding the reduce-scatter behind backward could gain on 64 GPUs of 4 lanes."""
    for link, size in WIRES:
        job = SimulatedJob(64, LANES[0], link=link, gradient_bytes=size)
        step = job.seconds(cost)
        scattering = sum(ring(size * elements, job.world, link) for elements in flats())
        backward = BACKWARD * (step - job.overhead())
        gain = step / (step - min(scattering, backward)) - 1
        shown = [f"{1e3 * seconds:,.1f}" for seconds in (step, scattering, backward)]
        yield [link, "fp32" if size == FP32 else "bf16", *shown, f"{gain:.1%}"]


def several_table(cost: Cost, path: Path) -> str:
    """Speeds measured through launch/train.py beside the derived ones, in Markdown."""
    columns = "lanes a GPU | GPUs | derived, tokens/s | measured | derived, efficiency | measured"
    alone: dict[int, float] = {}
    rows = []
    for row in json.loads(path.read_text("utf-8"))["speed"]:
        lanes, world = row["lanes_a_gpu"], row["gpus"]
        speed = statistics.median(row["tokens_per_second"])
        job, one = SimulatedJob(world, lanes), SimulatedJob(1, lanes)
        alone.setdefault(lanes, speed)  # one GPU comes first
        shares = [job.efficiency(cost, one), speed / world / alone[lanes]]
        rows.append(
            [f"{lanes}", f"{world}", f"{job.speed(cost):,.0f}", f"{speed:,.0f}"]
            + [f"{share:.1%}" for share in shares]
        )
    return _markdown(columns, rows)


def compared_table(path: Path) -> str:
    """The formula beside steps that multi_gpu.py measured on several GPUs, in Markdown.

    Computing is fitted to one GPU of the same call. Communication is first derived from the
    assumptions, then the sum of the exchanges that were timed by themselves on the same network.

    Raises:
        UserError: there is no such file, or it is not one of that program.
    """
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        world = next(row["gpus"] for row in rows if row["stage"] == "machine")
        alone: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            if row["stage"] == "alone":
                alone.setdefault((row["case"], row["lanes"]), []).append(row["ms"] / 1e3)
        exchanges = {(r["network"], r["what"]): r["ms"] for r in rows if r["stage"] == "exchange"}
        together = [row for row in rows if row["stage"] == "together"]
        lines = [_compared(row, world, alone, exchanges) for row in together]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{path} holds no results of multi_gpu.py: {error!r}") from None
    columns = "case | lanes a GPU | measured, ms | derived | off | with timed exchanges | off"
    return _markdown(columns, filter(None, lines))


def _compared(
    row: dict[str, Any],
    world: int,
    alone: dict[tuple[str, int], list[float]],
    exchanges: dict[tuple[str, str], float],
) -> list[str] | None:
    """A row of `compared_table`; None for a case that the formula does not describe."""
    loop, lanes, wire, *network = row["case"].split("-")
    if loop not in ("zero2", "disk"):
        return None
    fitted = {(n, n): statistics.mean(alone[f"zero2-{n}-fp32", n]) for n in LANES}
    gradient_bytes = FP32 if wire == "fp32" else BF16
    job = SimulatedJob(world, int(lanes), gradient_bytes=gradient_bytes)
    derived = 1e3 * job.seconds(Cost.fit(fitted))
    place = network[0] if network else "local"
    timed = exchanges[place, f"reduce-scatter, {wire}"] + exchanges[place, "all-gather, bf16"]
    sent = derived - 1e3 * job.communication() + timed
    shown = [row["case"], lanes, f"{row['ms']:,.1f}"]
    shown += ["", ""] if network else [f"{derived:,.1f}", f"{derived / row['ms'] - 1:+.1%}"]
    return [*shown, f"{sent:,.1f}", f"{sent / row['ms'] - 1:+.1%}"]


def _markdown(columns: str, rows: Iterable[list[str]]) -> str:
    names = columns.split(" | ")
    return "".join(f"| {' | '.join(row)} |\n" for row in [names, ["---:"] * len(names), *rows])


def _fit_rows(cost: Cost, measured: dict[tuple[int, int], float]) -> Iterator[list[str]]:
    for (lanes, at_once), seconds in measured.items():
        fit = SimulatedJob(1, lanes, lanes // at_once).seconds(cost)
        shown = [f"{1e3 * seconds:,.1f}", f"{1e3 * fit:,.1f}", f"{fit / seconds - 1:+.1%}"]
        yield [f"{lanes}", f"{at_once}", *shown]


def _scaling_rows(cost: Cost) -> Iterator[list[str]]:
    points = [(alike, jobs[0], job) for alike, jobs in curves().items() for job in jobs]
    for alike, alone, job in points:
        if job.world in SHOWN:
            seconds = job.seconds(cost)
            shown = [alike, f"{job.world:,}", f"{job.lanes:,}", f"{job.micro_batches}"]
            shown += [f"{job.tokens / 1e6:,.2f}M", f"{1e3 * seconds:,.1f}"]
            shown += [f"{job.communication() / seconds:.1%}", f"{job.speed(cost):,.0f}"]
            wires = [replace(job, link=link, gradient_bytes=size) for link, size in WIRES]
            yield shown + [f"{one.efficiency(cost, alone):.1%}" for one in wires]


def _scheme_rows(cost: Cost) -> Iterator[list[str]]:
    for world, link in [*product((2, 8, 64, 256, 512, 1024), ["InfiniBand"]), (64, "Ethernet")]:
        dp, zero1, zero2 = (SimulatedJob(world, 1, 1, scheme, link) for scheme in Scheme)
        jobs = (dp, zero1, zero2, replace(zero2, micro_batches=8))
        shown = [f"{1e3 * job.overhead():,.1f}" for job in jobs]
        for lanes in LANES:
            eight = [replace(job, lanes=8 * lanes, micro_batches=8) for job in (zero1, zero2)]
            one, two = (job.seconds(cost) for job in eight)
            shown.append(f"{two / one - 1:+.1%}")
        shown += [f"{memory(job.scheme, world) / 1e9:.1f}" for job in (dp, zero2)]
        yield [f"{world:,}, {link if world > NODE else 'NVLink'}", *shown]


def fill(document: Path, contents: dict[str, str]) -> None:
    """Replace the tables of a document; each follows a comment with its name.

    Raises:
        UserError: there is no such comment, or more than one.
    """
    text = document.read_text("utf-8")
    for name, table in contents.items():
        text, count = re.subn(rf"(<!-- {name} -->\n)(?:\|.*\n)*", rf"\g<1>{table}", text)
        if count != 1:
            raise UserError(f"{document} has {count} lines <!-- {name} --> for a table, not 1")
    document.write_text(text, "utf-8")


def plot(cost: Cost, path: Path) -> None:
    """Plot efficiency at equal lanes per GPU, and speed at equal tokens per step."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.set(ylabel="efficiency", ylim=(0, 1.02), title="as many lanes on every GPU")
    left.yaxis.set_major_formatter(PercentFormatter(1))
    right.set(ylabel="tokens/s", yscale="log", title="as many tokens a step")
    right.yaxis.set_major_formatter(EngFormatter(sep=""))
    panels = (left, "C0"), (left, "C3"), (right, "C0"), (right, "C3")
    for (axes, colour), (name, jobs) in zip(panels, curves().items(), strict=True):
        for (link, size), style in zip(WIRES, ("o-", "^--", "s:", "v-."), strict=True):
            wired = [replace(job, link=link, gradient_bytes=size) for job in jobs]
            y = [j.efficiency(cost, jobs[0]) if axes is left else j.speed(cost) for j in wired]
            label = f"{name}, {link}, {'fp32' if size == FP32 else 'bf16'}"
            axes.plot(WORLDS[: len(y)], y, style, color=colour, ms=4, lw=1.2, label=label)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="GPUs", xticks=WORLDS, xticklabels=[f"{world:,}" for world in WORLDS])
        axes.axvline(NODE, color="0.85", lw=6, zorder=0)  # the last that one node holds
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)
    save(figure, path)


def record(cost: Cost) -> list[dict[str, Any]]:
    """Every point with every scheme and wire."""
    points = [job for jobs in curves().values() for job in jobs]
    jobs = [
        replace(job, scheme=scheme, link=link, gradient_bytes=size)
        for job, scheme, (link, size) in product(points, Scheme, WIRES)
    ]
    return [asdict(job) | {"seconds": job.seconds(cost), "speed": job.speed(cost)} for job in jobs]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; if asked, plot, fill the document and write JSON."""
    parser = ArgumentParser(description=__doc__)
    add = partial(parser.add_argument, metavar="FILE", type=Path)
    add("--measured", default=MEASURED, help="steps of one GPU (default: those in docs/)")
    add("--several", help="compare with the results of multi_gpu.py --json in this file too")
    add("--plot", type=plot_path, help="plot the curves into this file")
    add("--document", help="replace the tables of this document")
    add("--json", type=result_path, help="write every point to this file")
    options = parser.parse_args(arguments)
    measured = load(options.measured)
    cost = Cost.fit(measured)
    contents = tables(cost, measured)
    if options.several:
        contents["compared"] = compared_table(options.several)
    with printing_beside(options.plot, options.json):
        print("\n".join(f"{name}\n\n{table}" for name, table in contents.items()))
    if options.plot:
        plot(cost, options.plot)
    if options.document:
        fill(options.document, contents)
    if options.json:
        facts = {"cost": cost._asdict(), "adamw": ADAMW, "jobs": record(cost)}
        write_result(options.json, f"{json.dumps(facts, indent=1)}\n".encode())


if __name__ == "__main__":
    with one_line_errors():
        main()
