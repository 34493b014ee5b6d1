"""Measures what compressed history is worth: the same model with and without it, on whole books.

    python benchmarks/history.py run --data DIR --held-out DIR --arms none recipe --seeds 0 1
    python benchmarks/history.py report RESULTS.jsonl [--plot FILE]
    python benchmarks/history.py curves RESULTS.jsonl ... --arms recipe --plot FILE

`run` trains every arm with every seed on the same windows in the same order, and appends a line to
--results for each evaluation. An experiment can be run in parts: results that exist are not
measured again. Evaluation is on authors that no arm was trained on. It gives the loss by chunk
index in the document, with history, without it, and with another document's history; and the loss
of rare tokens. `report` compares arms that share seeds; `curves` plots when in training they gain.
The arms are in benchmarks/history_arms.py.

The data are two outputs of data_prep/shard.py with one tokenizer, of documents that span many
chunks (see benchmarks/books.py). Of --held-out the train split is read, which is nearly all of it.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import history_report
import numpy as np
import torch
from history_arms import ARMS, Arm, CarriesLater, build, named_arm
from i3_steps import I3Steps, Shape, in_bare_loop, in_engine
from plots import plot_path
from torch import Tensor
from unigram import counts

from i3dist.cli.paths import appended_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import ModelSettings, OptimizerSettings, TrainSettings
from i3dist.data.corpus import Split, fingerprint_of
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.data.manifest import Manifest
from i3dist.distributed import collectives
from i3dist.errors import UserError
from i3dist.files import printing_beside
from i3dist.inference.evaluate import chunk_index, token_losses
from i3dist.model.lm import I3LM
from i3dist.ops.cross_entropy import IGNORE

WINDOW = 8  # chunks
DROPPED = 0.1  # share of chunks without history in the arms with -drop
RARE = 0.1  # share of rare tokens among the training targets
LOSSES = ("loss", "withheld", "other")  # with history, without it, with another document's


@dataclass(frozen=True)
class Plan:
    """One training run."""

    arm: str
    seed: int
    model: ModelSettings
    lanes: int
    steps: int  # length of the learning rate's schedule
    marks: tuple[int, ...]  # steps after which it is evaluated; the run ends at the last
    lr: float
    clip: float

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.lanes * WINDOW * self.model.chunk_length


class Curve:
    """Means of training loss and gradient norm, and the largest norm, of every `STEPS` steps."""

    STEPS = 50

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor | float] = []

    def add(self, loss: Tensor, norm: Tensor | float) -> None:
        """Add a step, without waiting for the device."""
        self.losses.append(loss)
        self.norms.append(norm)

    def to_dict(self) -> dict[str, list[float]]:
        """The values of whole intervals, for JSON."""
        whole = len(self.losses) // self.STEPS * self.STEPS
        loss, norm = (
            torch.tensor([float(x) for x in values[:whole]]).view(-1, self.STEPS)
            for values in (self.losses, self.norms)
        )
        rows = {"loss": loss.mean(1), "norm": norm.mean(1), "largest_norm": norm.amax(1)}
        return {key: row.tolist() for key, row in rows.items()}


class Experiment:
    """Trains and evaluates on two data folders."""

    def __init__(self, data: Path, held_out: Path):
        self.train = Split(data / "train", Manifest.load(data / "train"))
        self.held_out = Split(held_out / "train", Manifest.load(held_out / "train"))
        if self.train.manifest.tokenizer_sha256 != self.held_out.manifest.tokenizer_sha256:
            raise UserError(f"{held_out} was made with another tokenizer than {data}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rare = rare_tokens(data / "train").to(self.device)

    @property
    def fingerprint(self) -> str:
        """Of the data that it trains and evaluates on."""
        return fingerprint_of(self.train.manifest, self.held_out.manifest)

    def run(self, plan: Plan) -> Iterator[dict[str, Any]]:
        """Train; yields the results at each mark."""
        with self.device:
            model = build(plan.arm, plan.model, self.train.manifest.bos_id, plan.seed)
        steps = steps_of(model, plan.lanes, self.device, plan.clip)
        optimizer = OptimizerSettings(lr=plan.lr, decay_steps=plan.steps)
        arm = Arm.parse(plan.arm)
        compression, drops = arm.compression, "drop" in arm.added
        curve = Curve()
        span = range(plan.marks[-1])
        batches = read(self.train, plan.lanes, plan.seed, span, self.device)
        for step, batch in enumerate(batches):
            steps.gate.fill_(compression.gate_at(step))
            if isinstance(model, CarriesLater):
                model.carries.fill_(float(step >= arm.added["carries"]))
            if compression.joins:
                model.join_softmaxes(compression.joined_at(step))
            if drops:
                batch = without_some(batch, plan.seed, step)
            loss = steps([batch], optimizer.lr_at(step), self.train.manifest.pad_id)
            curve.add(loss, steps.norm)
            if step + 1 in plan.marks:
                yield {
                    "arm": plan.arm,
                    "seed": plan.seed,
                    "tokens": (step + 1) * plan.tokens,
                    "data": self.fingerprint,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "curve": curve.to_dict(),
                } | self.evaluate(model, plan)
        steps.close()

    @torch.no_grad()
    def evaluate(self, model: I3LM, plan: Plan) -> dict[str, Any]:
        """Sums of losses over the held-out split.

        They are given by chunk index; and for chunks 1 and later by position, and for rare tokens.
        A token for which no other document has enough history counts with the mean change of the
        tokens that have one.
        """
        manifest = self.held_out.manifest
        by_chunk, by_position, rare = (
            torch.zeros(5, n, dtype=torch.float64, device=self.device)
            for n in (manifest.chunks_per_shard, plan.model.chunk_length, 1)
        )
        # Not compiled: these are a few windows of a shape that occurs nowhere else.
        with torch.compiler.set_stance("force_eager"), mock.patch.object(model, "compiled", False):
            held_out = self.held_out.held_out(model.settings.history_chunks)
            share = held_out.share(0, 1, WINDOW, plan.lanes, model.settings.state_carry)
            for each in token_losses(model, held_out, share, plan.lanes):
                change = (each.other - each.loss).where(each.exchanged, 0.0)
                figures = (each.loss, each.withheld, change, each.exchanged)
                values = torch.stack([torch.ones_like(each.loss), *figures]).double()
                used = each.batch.targets != IGNORE
                index = chunk_index(each.batch, model.bos_id)
                by_chunk.index_add_(1, index[used], values[:, used])
                later = used & (index > 0)
                by_position += (values * later).sum((1, 2))
                few = later & self.rare[each.batch.targets.clamp(min=0)]
                rare += values[:, few].sum(1, keepdim=True)
        if not by_chunk[4, 1:].any():
            raise UserError("--held-out must hold two documents that run over several chunks")
        return {
            "by_chunk": named(by_chunk),
            "by_position": named(by_position),
            "rare": {name: values[0] for name, values in named(rare).items()},
        }


def named(sums: Tensor) -> dict[str, list[float]]:
    """The sums of `LOSSES` and the count of tokens, by name.

    Args:
        sums: [5, n] sums of 1, the loss, the loss without history, its change with another
            document's history, and 1 for each token that had such a history.
    """
    count, loss, withheld, change, exchanged = sums
    other = loss + change * count / exchanged.clamp(min=1)
    parts = zip(("count", *LOSSES), (count, loss, withheld, other), strict=True)
    return {name: part.tolist() for name, part in parts}


def steps_of(model: I3LM, lanes: int, device: torch.device, clip: float) -> I3Steps:
    """The model's training steps: through the engine on a GPU, else in a plain loop."""
    loop = in_engine if device.type == "cuda" else partial(in_bare_loop, compiled=False)
    return loop(model, Shape(lanes, lanes, WINDOW), device, TrainSettings(clip=clip))


def read(split: Split, lanes: int, seed: int, span: range, device: torch.device) -> Iterator[Batch]:
    """Windows `span` of a split's stream, as the published runs read them."""
    schedule = split.schedule(lanes, WINDOW, seed, version=1)
    reader = LaneWindows(split.folder, split.manifest, schedule, range(lanes))
    workers = 2 if device.type == "cuda" else 0
    return windows(reader, span.start, span.stop, workers=workers, device=device)


def without_some(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with a random tenth of its chunks cut off from their history."""
    random = np.random.default_rng((seed, step)).random(tuple(batch.depth.shape))
    kept = torch.from_numpy(random >= DROPPED).to(batch.depth.device)
    return batch._replace(depth=batch.depth * kept)


def rare_tokens(folder: Path) -> Tensor:
    """The least frequent tokens, which together are `RARE` of the targets: bool [V]."""
    frequency = torch.from_numpy(counts(folder)).double()
    order = frequency.argsort()
    rare = torch.zeros(len(frequency), dtype=torch.bool)
    rare[order[frequency[order].cumsum(0) <= RARE * frequency.sum()]] = True
    return rare


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and evaluate arms")
    run.add_argument("--data", type=Path, required=True, help="data to train on")
    run.add_argument("--held-out", type=Path, required=True, help="data to evaluate")
    run.add_argument("--arms", nargs="+", type=named_arm, default=ARMS, metavar="ARM")
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    run.add_argument("--tokens", type=float, default=150e6, help="tokens of a run (default: 150e6)")
    run.add_argument(
        "--marks",
        type=float,
        nargs="+",
        default=[0.5, 1.0],
        help="evaluate after these parts of the run; it ends at the last (default: 0.5 1)",
    )
    add_sizes(run)
    run.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    run.add_argument(
        "--clip", type=float, default=1.0, help="largest norm of the gradient (default: 1)"
    )
    run.add_argument("--results", type=appended_path, default="history.jsonl")
    report = commands.add_parser("report", help="compare arms")
    report.add_argument("results", type=Path)
    report.add_argument(
        "--plot", type=plot_path, help="plot gain by chunk index and by position in the chunk"
    )
    curves = commands.add_parser("curves", help="plot the gain in training loss by tokens")
    curves.add_argument("results", type=Path, nargs="+")
    curves.add_argument("--arms", nargs="+", type=named_arm, required=True, metavar="ARM")
    curves.add_argument("--plot", type=plot_path, required=True, metavar="FILE")
    return parser.parse_args(arguments)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add options for the sizes of the model and its step."""
    parser.add_argument("--lanes", type=int, default=8, help="(default: 8)")
    parser.add_argument("--width", type=int, default=512, help="of the model (default: 512)")
    parser.add_argument("--layers", type=int, default=6, help="RWKV blocks (default: 6)")


def model_settings(options: argparse.Namespace, manifest: Manifest) -> ModelSettings:
    """The model card's settings with the sizes of options and data; a latent per 16 tokens."""
    return ModelSettings(
        vocab_size=manifest.vocab_size,
        d_model=options.width,
        layers=f"{options.layers}xrwkv,2xattention",
        chunk_length=manifest.chunk_length,
        latents=manifest.chunk_length // 16,
    )


def plans(options: argparse.Namespace, manifest: Manifest) -> Iterator[Plan]:
    """Every run that the options ask for."""
    model = model_settings(options, manifest)
    per_step = options.lanes * WINDOW * manifest.chunk_length
    steps = max(2, round(options.tokens / per_step))
    for seed in options.seeds:
        for arm in options.arms:
            yield Plan(
                arm,
                seed,
                model,
                options.lanes,
                steps,
                tuple(max(1, round(mark * steps)) for mark in sorted(options.marks)),
                options.lr,
                options.clip,
            )


def run(options: argparse.Namespace) -> None:
    """Do the runs that have no results yet; append their results."""
    experiment = Experiment(options.data, options.held_out)
    lines = history_report.read(options.results)
    if any("data" not in line for line in lines):
        raise UserError(
            f"{options.results} has lines that do not say of which data they are: name another file"
        )
    first = {"arm": options.arms[0], "seed": options.seeds[0], "data": experiment.fingerprint}
    history_report.refuse_mixed([*lines, first])
    done = {(line["arm"], line["seed"], line["tokens"]) for line in lines}
    for plan in plans(options, experiment.train.manifest):
        if (plan.arm, plan.seed, plan.marks[-1] * plan.tokens) in done:
            continue
        started = time.perf_counter()
        for line in experiment.run(plan):
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
        torch._dynamo.reset()
        seconds = time.perf_counter() - started
        figures = history_report.Figures.of(line)
        print(
            f"{plan.arm}, seed {plan.seed}: loss {figures.first:.4f} in chunk 0, "
            f"{figures.later:.4f} later ({figures.withheld:.4f} without, {figures.other:.4f} with "
            f"another document's history); {seconds:.0f} s",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Run or report."""
    options = parse_arguments(arguments)
    if options.command == "report":
        with printing_beside(options.plot):
            history_report.show(history_report.read(options.results), options.plot)
        return
    if options.command == "curves":
        lines = [line for path in options.results for line in history_report.read(path)]
        history_report.plot_curves(lines, options.arms, options.plot)
        return
    run(options)
    collectives.leave_group()


if __name__ == "__main__":
    with one_line_errors():
        main()
