"""Time and memory of the loss of a micro-batch, forward and backward.

    python benchmarks/loss.py [--lanes N ...] [--json FILE] [--profile]

Both forms are compiled and start from the same hidden states, head and targets, in bf16:

    naive   the definition, which keeps the logits of all tokens
    sliced  what training uses

They take turns, and a time is the median of all turns. Memory is the most that a form allocates
beside its inputs. The last columns compare sliced with naive: the mean loss, and the norm of the
difference of a gradient relative to that of the gradient.

On the CPU it runs at a small size, as a test of itself.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import kernels
import torch
from measure import free, mark, milliseconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import UserError
from i3dist.files import write_result
from i3dist.model.lm import OPTIONS
from i3dist.ops.cross_entropy import IGNORE, token_losses, token_losses_naive

FORMS = {"naive": token_losses_naive, "sliced": token_losses}
GIB = 2**30


class Size(NamedTuple):
    """The inputs of a loss: hidden states [lanes, tokens, width], head [vocab, width]."""

    tokens: int  # of a lane
    vocab: int
    width: int


CARD, TOY = Size(8 * 512, 32_000, 1184), Size(64, 1000, 32)


class Agreement(NamedTuple):
    """The results of a form."""

    repeatable: bool  # the same bits twice
    loss: float  # mean
    hidden_difference: float  # of gradients, relative to naive's
    head_difference: float


@dataclass(frozen=True)
class Timing:
    """One form at one number of lanes."""

    lanes: int
    form: str
    ms: float
    gib: float | None  # most that was allocated; None on the CPU
    repeatable: bool  # the same bits twice
    loss: float  # mean
    hidden_difference: float  # of gradients, relative to naive's
    head_difference: float


def make_inputs(lanes: int, size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Normed hidden states, a head as after initialization, targets with a few `IGNORE`."""
    torch.manual_seed(0)
    hidden = torch.randn(lanes, size.tokens, size.width, device=device).bfloat16()
    head = (0.02 * torch.randn(size.vocab, size.width, device=device)).bfloat16()
    targets = torch.randint(0, size.vocab, hidden.shape[:2], device=device)
    targets[torch.rand(targets.shape, device=device) < 0.002] = IGNORE
    return hidden.requires_grad_(), head.requires_grad_(), targets


def forward_and_backward(form: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Mean loss, and its gradients of hidden states and head."""
    losses = form(*inputs)
    loss = losses.sum() / (inputs[2] != IGNORE).sum()
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]


def peak_gib(call: Callable[[], object]) -> float | None:
    """The most memory that a call allocates, beside what is there already."""
    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def take_turns(calls: dict[str, Callable], turns: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each call; in a turn each is timed `repeats` times in a row."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            marks = [mark()]
            for _ in range(repeats):
                call()
                marks.append(mark())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name] += [milliseconds(a, b) for a, b in itertools.pairwise(marks)]
    return {name: statistics.median(found) for name, found in times.items()}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of `theirs`."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def compare(calls: dict[str, Callable]) -> dict[str, Agreement]:
    """What the forms compute, beside naive's.

    Raises:
        UserError: a result is not finite.
    """
    results = {name: call() for name, call in calls.items()}
    found = {}
    for name, call in calls.items():
        loss, *gradients = results[name]
        if not all(bool(part.isfinite().all()) for part in results[name]):
            raise UserError(f"{name}: a result is not finite")
        same = all(a.equal(b) for a, b in zip(call(), results[name], strict=True))
        pairs = zip(gradients, results["naive"][1:], strict=True)
        found[name] = Agreement(same, float(loss), *(difference(a, b) for a, b in pairs))
    return found


def measure(lanes: int, size: Size, options: argparse.Namespace) -> list[Timing]:
    """Both forms at one number of lanes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(lanes, size, device)
    calls = {}
    for name, form in FORMS.items():
        compiled = torch.compile(form, dynamic=False, options=OPTIONS)
        calls[name] = lambda compiled=compiled: forward_and_backward(compiled, inputs)
    agreement = compare(calls)
    memory = {name: peak_gib(call) for name, call in calls.items()}
    times = take_turns(calls, options.turns, options.repeats)
    if options.profile and torch.cuda.is_available():
        for name, call in calls.items():
            kernels.show(kernels.kernels(call), f"{name}, {lanes} lanes", longest=12)
    return [Timing(lanes, name, times[name], memory[name], *agreement[name]) for name in FORMS]


def show(rows: list[Timing], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    numbers = ("lanes", "ms", "GiB", "loss", "hidden's", "head's")
    for heading in ("lanes", "form", "ms", "GiB", "same bits twice", *numbers[3:]):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    for row in rows:
        table.add_row(
            f"{row.lanes}",
            row.form,
            f"{row.ms:.2f}",
            "" if row.gib is None else f"{row.gib:.2f}",
            "yes" if row.repeatable else "no",
            f"{row.loss:.6f}",
            f"{row.hidden_difference:.1e}",
            f"{row.head_difference:.1e}",
        )
    Console(width=100).print(table)


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Measure and print, and write JSON where asked."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    lanes = [16, 32] if cuda else [2]
    parser.add_argument("--lanes", nargs="+", type=int, default=lanes, help=f"(default: {lanes})")
    parser.add_argument("--turns", type=int, default=5 if cuda else 2, help="of each form")
    parser.add_argument("--repeats", type=int, default=4, help="timed calls of a turn")
    parser.add_argument("--profile", action="store_true", help="print the GPU kernels of each form")
    parser.add_argument(
        "--json", type=result_path, metavar="FILE", help="also write the figures here"
    )
    options = parser.parse_args(arguments)
    rows: list[Timing] = []
    for count in options.lanes:
        free()
        rows += measure(count, CARD if cuda else TOY, options)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    show(rows, f"loss, forward and backward, {name}, PyTorch {torch.__version__}")
    if options.json:
        figures = [asdict(row) for row in rows]
        record = {"device": name, "torch": torch.__version__, "rows": figures}
        write_result(options.json, f"{json.dumps(record, indent=1)}\n".encode())
    return rows


if __name__ == "__main__":
    with one_line_errors():
        main()
