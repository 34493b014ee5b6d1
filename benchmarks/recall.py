"""Recall over compressed history: a task that no local model can solve.

    python benchmarks/recall.py [--arms ARM ...] [--pairs N ...] [--json FILE] [--plot FILE]

Notation: B documents, K chunks of each, T tokens, P parts of a chunk, as many as it has latents,
N pairs of a part, Q questions of a part.

A document is K chunks. A part of 16 tokens asks up to Q times for the value of a key, then states N
pairs of a key and a value. About three in eight questions are about keys that were stated d chunks
ago, with every d >= 1 equally often. The others are about keys of the same chunk (d = 0): they need
no history, and show whether the model has learned the task. A key is stated once in a document;
only answers are trained on. RWKV state restarts at each chunk, so only latents carry information:
the model should answer up to the history's length, and beyond it be at chance, which is one in the
number of values. The arms are those of benchmarks/history_arms.py; -soon and -drop change nothing
here.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from history_arms import build, named_arm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plots import plot_path, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import ModelSettings
from i3dist.errors import UserError
from i3dist.files import printing_beside, write_result
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE

BOS, ASK, FIRST = 2, 3, 4  # FIRST: of the values, which keys follow
SLOTS = 8  # of two tokens in a part, each a question or a pair


class Documents(NamedTuple):
    """A batch of documents."""

    tokens: Tensor  # [B, K, T]
    targets: Tensor  # [B, K, T]
    distance: Tensor  # [B, K, T], where there is a target
    depth: Tensor  # [B, K]


@dataclass(frozen=True)
class Task:
    """Sizes of the task."""

    chunks: int = 24  # K
    length: int = 128  # T
    pairs: int = 1  # N
    values: int = 16
    distances: int = 11  # d is 0 to this

    @property
    def parts(self) -> int:
        """P."""
        return self.length // (2 * SLOTS)

    @property
    def questions(self) -> int:
        """Q."""
        return SLOTS - self.pairs

    @property
    def stated(self) -> int:
        """Pairs of a chunk."""
        return self.parts * self.pairs

    @property
    def vocab(self) -> int:
        """Values, and as many keys as a document states."""
        return FIRST + self.values + self.chunks * self.stated

    @property
    def answers(self) -> float:
        """Answers of a document at any one distance d >= 1, on average."""
        asked = self.questions * self.parts * (self.chunks - self.distances)
        return asked / (2 * self.distances)

    def sample(self, documents: int, random: torch.Generator) -> Documents:
        """A random batch of documents."""
        b, k, p, q = documents, self.chunks, self.parts, self.questions
        keys = torch.rand(b, k * self.stated, generator=random, device=random.device).argsort(1)
        keys = FIRST + self.values + keys
        values = FIRST + self._random(self.values, keys.shape, random)
        tokens = torch.zeros(b, k, p, SLOTS, 2, dtype=torch.long, device=random.device)
        tokens[..., q:, 0], tokens[..., q:, 1] = (x.view(b, k, p, -1) for x in (keys, values))

        back, which, asked = self._ask(b, random)
        tokens[..., :q, 0] = ASK * asked
        tokens[..., :q, 1] = keys.gather(1, which).view_as(asked) * asked
        tokens[:, 0, 0, 0, 0] = BOS  # nothing can be asked there yet

        # The value is the target after the key, but is not in the text: there it would be stated
        # again, nearer.
        targets, distance = torch.full_like(tokens, IGNORE), torch.zeros_like(tokens)
        answer = values.gather(1, which).view_as(asked)
        targets[..., :q, 1] = torch.where(asked, answer, IGNORE)
        distance[..., :q, 1] = back * asked
        depth = torch.arange(k, device=random.device).expand(b, k)
        return Documents(*(x.view(b, k, -1) for x in (tokens, targets, distance)), depth)

    def _ask(self, documents: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Over which distances [B, K, P, Q], for which pairs of a document [B, K P Q], and whether
        it is asked [B, K, P, Q]."""
        k, p, device = self.chunks, self.parts, random.device
        shape = (documents, k, p, self.questions)
        chunk = torch.arange(k, device=device).view(k, 1, 1)
        part = torch.arange(p, device=device).view(p, 1)
        back = (1 + self._random(self.distances, shape, random)) * self._random(2, shape, random)
        # K - d chunks can ask over a distance of d, so shorter distances are dropped more often.
        drawn = torch.rand(shape, generator=random, device=device) * (k - back)
        often = (back == 0) | (drawn < k - self.distances)
        stated = torch.where(back > 0, self.stated, part * self.pairs)  # by that chunk, so far
        asked = often & (back <= chunk) & (stated > 0)
        which = (torch.rand(shape, generator=random, device=device) * stated).long()
        which += (chunk - back).clamp(min=0) * self.stated
        return back, which.flatten(1), asked

    @staticmethod
    def _random(below: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        return torch.randint(below, shape, generator=random, device=random.device)


def train(
    model: I3LM, task: Task, steps: int, documents: int, lr: float, seed: int = 0
) -> Iterator[Tensor]:
    """Train in fp32 (TF32 on a GPU), whole documents as windows; yields the loss of each step."""
    device = model.head.weight.device
    random = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 1.0) * max(0.05, 1 - i / steps)
    )
    on = torch.ones((), device=device)
    for _ in range(steps):
        batch = task.sample(documents, random)
        losses, _ = model(batch.tokens, batch.targets, batch.depth, _empty(model, batch), on)
        loss = losses.sum() / (batch.targets != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.detach()


@torch.no_grad()
def accuracy(model: I3LM, task: Task, documents: int, gate: float = 1.0) -> list[float]:
    """Share of right answers at distance 0, 1, ..., on new documents."""
    device = model.head.weight.device
    batch = task.sample(documents, torch.Generator(device).manual_seed(10**6))
    state, gate_value = _empty(model, batch), torch.tensor(gate, device=device)
    # Not compiled: a shape that nothing else has.
    with torch.compiler.set_stance("force_eager"), mock.patch.object(model, "compiled", False):
        below, _ = model.below(batch.tokens, batch.depth, state)
        hidden = model.norm_out(model.above(below, gate_value))
    asked = batch.targets != IGNORE
    right = model.head(hidden[asked]).argmax(-1) == batch.targets[asked]
    return [
        float(right[batch.distance[asked] == d].double().mean()) for d in range(task.distances + 1)
    ]


def _empty(model: I3LM, batch: Documents) -> LaneState:
    weight = model.head.weight
    return LaneState.empty(len(batch.tokens), model.settings, weight.device, weight.dtype)


def settings(task: Task, width: int, history: int) -> ModelSettings:
    """A small model with 16 tokens per latent, as in the default."""
    return ModelSettings(
        vocab_size=task.vocab,
        d_model=width,
        layers="2xrwkv,2xattention",
        heads=max(1, width // 16),
        chunk_length=task.length,
        latents=task.parts,
        history_chunks=history,
    )


@dataclass(frozen=True)
class Result:
    """What a model has learned after training on this number of pairs."""

    arm: str
    pairs: int  # of a part, so per latent
    answers: int  # over a distance, of this training
    seconds: float
    accuracy: list[float]  # at distance 0, 1, ...
    withheld: list[float]  # the same with history withheld


def measure(
    arm: str, tasks: list[Task], options: argparse.Namespace, device: torch.device
) -> Iterator[Result]:
    """Train an arm on one task after the other, the one with most pairs last, and test it on each.

    Each task continues from the one before: from scratch, many pairs are learned late or not at all
    (docs/history.md).
    """
    sizes = settings(tasks[-1], options.width, options.history)
    with device:
        model = build(arm, sizes, BOS, options.seed)
    if device.type == "cuda":
        model.compile_blocks()
    for task in tasks:
        started = time.perf_counter()
        steps = train(model, task, options.steps, options.documents, options.lr, options.seed)
        for _ in track(steps, f"{arm}, {task.pairs} per latent", total=options.steps):
            pass
        answers = round(options.steps * options.documents * task.distances * task.answers)
        found = [accuracy(model, task, 4 * options.documents, gate) for gate in (1.0, 0.0)]
        yield Result(arm, task.pairs, answers, time.perf_counter() - started, *found)


def show(results: list[Result], chance: float) -> None:
    """Print accuracy by distance."""
    table = Table(title=f"share of right answers by distance in chunks; chance is {chance:.3f}")
    headings = (
        "arm",
        "pairs per latent",
        "own chunk",
        *map(str, range(1, len(results[0].accuracy))),
    )
    for heading in (*headings, "withheld, best", "answers", "s"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for r in results:
        shares = [f"{share:.3f}" for share in r.accuracy]
        withheld = f"{max(r.withheld[1:]):.3f}"
        table.add_row(
            r.arm, str(r.pairs), *shares, withheld, f"{r.answers / 1e6:.1f}M", f"{r.seconds:.0f}"
        )
    Console(width=150).print(table)


def plot(results: list[Result], history: int, chance: float, path: Path) -> None:
    """Accuracy by distance, and against pairs of a latent where those differ."""
    several = len({r.pairs for r in results}) > 1
    figure = Figure(figsize=(11, 4.5) if several else (6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_distance, *others = figure.subplots(1, 1 + several, squeeze=False)[0]
    for r in results:
        label = f"{r.arm}, {r.pairs} per latent" if several else r.arm
        by_distance.plot(range(len(r.accuracy)), r.accuracy, "o-", ms=3, lw=1, label=label)
    by_distance.axvline(history + 0.5, color="gray", lw=0.5, ls=":")
    by_distance.set(xlabel="distance (chunks; 0: its own)", ylabel="share of right answers")
    for by_load in others:
        for arm in dict.fromkeys(r.arm for r in results):
            of = [(r.pairs, r.accuracy[1 : history + 1]) for r in results if r.arm == arm]
            means = [sum(shares) / len(shares) for _, shares in of]
            by_load.plot([pairs for pairs, _ in of], means, "o-", ms=4, lw=1, label=arm)
        by_load.set(xlabel="pairs per latent", ylabel="mean within the history's length")
    for axes in (by_distance, *others):
        axes.axhline(chance, color="gray", lw=0.5, ls="--")
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize="x-small")
    save(figure, path)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--arms", nargs="+", type=named_arm, default=["recipe"], help="(default: recipe)")
    add(
        "--pairs",
        nargs="+",
        type=int,
        default=[1],
        choices=range(1, SLOTS),
        help="per latent; several numbers are learned one after the other (default: 1)",
    )
    add("--chunks", type=int, default=24, help="of a document (default: 24)")
    add("--length", type=int, default=128, help="tokens of a chunk (default: 128)")
    add("--history", type=int, default=8, help="chunks that history holds (default: 8)")
    add("--values", type=int, default=16, help="different values (default: 16)")
    add("--width", type=int, default=128, help="of the model (default: 128)")
    add("--steps", type=int, default=1500, help="of each number of pairs (default: 1500)")
    add("--documents", type=int, default=64, help="of a step (default: 64)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: 3e-3)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--json", type=result_path, metavar="FILE", help="write the results here")
    add("--plot", type=plot_path, metavar="FILE", help="plot them here")
    options = parser.parse_args(arguments)
    if options.chunks <= options.history + 3:
        raise UserError(f"--chunks must be more than --history + 3, which is {options.history + 3}")
    if options.length < 2 * SLOTS or options.length % (2 * SLOTS):
        raise UserError(f"--length {options.length} must be a multiple of {2 * SLOTS}")
    return options


def main(arguments: list[str] | None = None) -> list[Result]:
    """Train and show every arm with every number of pairs."""
    options = parse_arguments(arguments)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasks = [
        Task(options.chunks, options.length, pairs, options.values, options.history + 3)
        for pairs in sorted(options.pairs)
    ]
    results: list[Result] = []
    for arm in options.arms:
        torch._dynamo.reset()
        for result in measure(arm, tasks, options, device):
            results.append(result)
            if options.json:
                text = json.dumps([asdict(r) for r in results], indent=1)
                write_result(options.json, f"{text}\n".encode())
    with printing_beside(options.plot):
        show(results, 1 / options.values)
    if options.plot:
        plot(results, options.history, 1 / options.values, options.plot)
    return results


if __name__ == "__main__":
    with one_line_errors():
        main()
