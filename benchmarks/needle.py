"""The needle test by likelihood: does a trained model use what stood far back?

    python benchmarks/needle.py --checkpoint RUN --data DIR [--json FILE] [--plot FILE]
    python benchmarks/needle.py --checkpoint RUN --text BOOK.txt ...

RUN may also be a checkpoint or an export.

A needle is a sentence that states a made-up fact: a key and a value of random common words. It
stands in a held-out text, some distance before a query that repeats its beginning (passkeys:
Mohtashami & Jaggi, 2023, arXiv:2305.16300; values of words: RULER, Hsieh et al., 2024,
arXiv:2404.06654). A base model need not follow instructions for it: nothing is generated. The true
value and wrong ones, those of other needles, follow the query in turn, and their likelihoods are
compared, as in suffix identification (Sun et al., 2021, arXiv:2109.09115). Two figures:

  margin   log-likelihood of the true value minus the mean over wrong ones, nats per value token;
           chance is 0
  found    share of trials in which the true value is the likeliest; chance is one in the number of
           candidates

Three conditions, as in launch/evaluate.py: with history, with history withheld, and with that of
another document, which has no needle. Every trial is measured at every distance and under every
condition, so differences are between pairs. RWKV state restarts with each chunk, so a needle that
stands more than 8 chunks before the query's chunk is out of reach, and its figures are chance
(unless the model has `model.state_carry`).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from needles import Sizes, Tokens, Trial, lay_out, read_documents, sample
from numpy.typing import NDArray
from plots import plot_path, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from i3dist.checkpoint.weights import load_run
from i3dist.cli.model_options import add_model_arguments
from i3dist.cli.paths import result_path, typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.corpus import Corpus
from i3dist.data.tokenizer import Tokenizer
from i3dist.distributed import devices
from i3dist.errors import UserError
from i3dist.files import printing_beside, regular, write_result
from i3dist.inference.evaluate import exchange_history
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState

DISTANCES = [512, 1024, 2048, 3072, 4096, 6144, 8192]
HISTORY, WITHHELD, OTHER = CONDITIONS = ("history", "withheld", "other")
RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Mean:
    """A mean over trials and its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "Mean":
        """Of one value for each trial: the bootstrap's percentiles."""
        rng = np.random.default_rng(0)
        rows = rng.integers(0, len(values), (RESAMPLES, len(values)))
        low, high = np.quantile(values[rows].mean(1), (0.025, 0.975))
        return cls(float(values.mean()), float(low), float(high))

    @classmethod
    def of_share(cls, values: NDArray[np.float64]) -> "Mean":
        """Of 0 or 1 for each trial: Wilson's interval, which has a width where all are equal."""
        share, count, z = float(values.mean()), len(values), 1.96
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        spread = share * (1 - share) / count + z * z / (4 * count * count)
        half = z * spread**0.5 / (1 + z * z / count)
        return cls(share, middle - half, middle + half)


@dataclass(frozen=True)
class Result:
    """What was found at one distance."""

    distance: int  # tokens from the needle's first to the query's first
    within_reach: float  # share of trials whose needle stands in chunks that the query sees
    margin: dict[str, Mean]  # by condition
    found: dict[str, Mean]
    gain: Mean  # margin with history minus that without, trial by trial


@torch.no_grad()
def likelihoods(
    model: I3LM, trials: Sequence[Trial], distances: Sequence[int]
) -> Iterator[dict[str, Tensor]]:
    """Log-likelihood of each candidate of each trial, by condition, for one distance after another.

    Args:
        model: the model.
        trials: B trials.
        distances: of their needles, in tokens.

    Yields:
        [B, V] fp64 for each condition, in nats per value token, the true value first.
    """
    device = model.head.weight.device
    on, off = torch.tensor([1.0, 0.0], device=device)
    others = None
    for distance in distances:
        context, query, last, values, other = (
            torch.from_numpy(part).to(device) for part in lay_out(trials, distance)
        )
        count, words = values.shape[1:]
        if others is None:  # at every distance the same
            others = read(model, other).latents.repeat_interleave(count, 0).unsqueeze(1)
        state = read(model, context).map(lambda x, count=count: x.repeat_interleave(count, 0))
        depth = torch.full((len(query) * count, 1), context.shape[1], device=device)
        below, _ = model.below(query.flatten(0, 1).unsqueeze(1), depth, state)
        seen = {
            HISTORY: (below, on),
            WITHHELD: (below, off),
            OTHER: (exchange_history(below, model.width.pad(others)), on),
        }
        # The token before a word predicts it.
        places = last.unsqueeze(-1) + torch.arange(words, device=device)  # [B, W]
        places, targets = places.repeat_interleave(count, 0), values.flatten(0, 1)  # [B V, W]
        yield {
            name: -value_losses(model, model.above(*given), places, targets).view(-1, count)
            for name, given in seen.items()
        }


def value_losses(model: I3LM, x: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Mean loss [N] fp64 of the targets [N, W] that x [N, 1, T, D] predicts at places [N, W]."""
    x = x.squeeze(1)
    x = x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return model.losses(x.unsqueeze(1), targets.unsqueeze(1)).double().mean((1, 2))


def read(model: I3LM, tokens: Tensor) -> LaneState:
    """The state after texts [B, K, T], each of which begins a document."""
    weight, (rows, chunks, _) = model.head.weight, tokens.shape
    state = LaneState.empty(rows, model.settings, weight.device, weight.dtype)
    depth = torch.arange(chunks, device=weight.device).expand(rows, chunks)
    return model.below(tokens, depth, state)[1]


def measure(
    model: I3LM, trials: Sequence[Trial], distances: Sequence[int], rows: int
) -> dict[int, dict[str, NDArray[np.float64]]]:
    """The candidates' log-likelihoods by distance and condition, [trials, V].

    `rows` trials are computed at once. A progress bar is shown on a terminal.
    """
    starts = range(0, len(trials), rows)
    each = (likelihoods(model, trials[start : start + rows], distances) for start in starts)
    console, off = Console(stderr=True), not sys.stderr.isatty()
    total = len(starts) * len(distances)
    flat = track(chain.from_iterable(each), "needles", total, console=console, disable=off)
    found = [{name: part.cpu().numpy() for name, part in parts.items()} for parts in flat]
    return {
        distance: {
            name: np.concatenate([parts[name] for parts in found[number :: len(distances)]])
            for name in CONDITIONS
        }
        for number, distance in enumerate(distances)
    }


def margins(likelihood: NDArray[np.float64]) -> NDArray[np.float64]:
    """[trials, V] -> the true value's minus the mean of the wrong ones', [trials]."""
    return likelihood[:, 0] - likelihood[:, 1:].mean(1)


def hits(likelihood: NDArray[np.float64]) -> NDArray[np.float64]:
    """[trials, V] -> 1 where the true value is the likeliest; of n equal ones each counts 1/n."""
    best = likelihood == likelihood.max(1, keepdims=True)
    return best[:, 0] / best.sum(1)


def summarize(
    trials: Sequence[Trial], distance: int, found: dict[str, NDArray[np.float64]], reach: int
) -> Result:
    """The figures of one distance; `reach` is the chunks C of history."""
    length = trials[0].haystack.shape[1]
    seen = [trial.offset - distance >= -reach * length for trial in trials]
    margin = {name: margins(part) for name, part in found.items()}
    return Result(
        distance,
        float(np.mean(seen)),
        {name: Mean.of(part) for name, part in margin.items()},
        {name: Mean.of_share(hits(part)) for name, part in found.items()},
        Mean.of(margin[HISTORY] - margin[WITHHELD]),
    )


def show(results: Sequence[Result], candidates: int) -> None:
    """Print a row for each distance."""
    title = f"needles by distance in tokens, 95% intervals; found by chance: {1 / candidates:.3f}"
    table = Table(title=title, title_justify="left")
    shown = [f"{figure}, {name}" for figure in ("margin", "found") for name in CONDITIONS]
    for heading in ("distance", "in reach", *shown[:3], "gain", *shown[3:]):
        table.add_column(heading, justify="right")
    for r in results:
        half = (r.gain.high - r.gain.low) / 2
        shares = [f"{r.found[name].mean:.3f}" for name in CONDITIONS]
        shares[0] += f" [{r.found[HISTORY].low:.3f}, {r.found[HISTORY].high:.3f}]"
        table.add_row(
            f"{r.distance:,}",
            f"{r.within_reach:.0%}",
            *(f"{r.margin[name].mean:+.3f}" for name in CONDITIONS),
            f"{r.gain.mean:+.3f} ± {half:.3f}",
            *shares,
        )
    Console(width=120).print(table)


def plot(results: Sequence[Result], candidates: int, reach: int, path: Path) -> None:
    """Both figures against the distance; `reach` in tokens."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    sides = zip(figure.subplots(1, 2), ("margin", "found"), (0.0, 1 / candidates), strict=True)
    for axes, figures, chance in sides:
        for condition in CONDITIONS:
            means = [getattr(r, figures)[condition] for r in results]
            distances = [r.distance for r in results]
            line = axes.plot(distances, [m.mean for m in means], "o-", ms=3, lw=1, label=condition)
            low, high = ([getattr(m, end) for m in means] for end in ("low", "high"))
            axes.fill_between(distances, low, high, alpha=0.2, color=line[0].get_color(), lw=0)
        axes.axhline(chance, color="gray", lw=0.5, ls="--")
        axes.axvline(reach, color="gray", lw=0.5, ls=":")
        axes.set(xlabel="distance (tokens; dotted: the history's length)")
        axes.legend(fontsize="x-small")
    figure.axes[0].set_ylabel("margin (nats per value token)")
    figure.axes[1].set_ylabel("share of true values found")
    save(figure, path)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add, texts = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--data", type=typed_path, metavar="DIR", help="shard.py's output")
    texts.add_argument("--text", type=typed_path, nargs="+", metavar="FILE", help="or documents")
    add("--distances", type=int, nargs="+", default=DISTANCES, help=f"(default: {DISTANCES})")
    add("--trials", type=int, default=200, help="(default: 200)")
    add("--candidates", type=int, default=16, help="values to choose from (default: 16)")
    add("--words", type=int, default=2, help="of a value, one token each (default: 2)")
    add("--rows", type=int, default=8, help="trials computed at once (default: 8)")
    add("--seed", type=int, default=0, help="of needles and haystacks (default: 0)")
    add("--json", type=result_path, metavar="FILE", help="write the results here")
    add("--plot", type=plot_path, metavar="FILE", help="plot them here")
    options = parser.parse_args(arguments)
    for name, least in (("trials", 2), ("candidates", 2), ("words", 1), ("rows", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} should be at least {least}")
    return options


def documents(options: argparse.Namespace, model: I3LM, tokenizer: Tokenizer) -> list[Tokens]:
    """The texts that needles are hidden in."""
    if options.data:
        corpus = Corpus.open(options.data, model.settings, trained_with=tokenizer)
        return list(read_documents(corpus.valid))
    texts = map(text_of, options.text)
    return [np.array(tokenizer.encode(text), dtype=np.int64) for text in texts]


def text_of(path: Path) -> str:
    """What a file of --text holds; a `UserError` if that is no text."""
    try:
        return regular(path).read_text("utf-8")
    except OSError as error:
        raise UserError(f"--text {path} cannot be read: {error.strerror}; name a file") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path} is not UTF-8 text: convert it, or name another") from None


def main(arguments: list[str] | None = None) -> list[Result]:
    """Measure, print, and write what was asked for."""
    options = parse_arguments(arguments)
    model, _, tokenizer = load_run(options.checkpoint, devices.pick_device(options.device))
    settings, distances = model.settings, sorted(set(options.distances))
    length, chunks = settings.chunk_length, settings.history_chunks
    before = -(-distances[-1] // length)
    counts = (options.trials, options.candidates, options.words)
    sizes = Sizes(*counts, before, length, chunks, options.seed)
    trials = sample(documents(options, model, tokenizer), tokenizer, sizes)
    longest = max(trial.query.size + options.words + trial.end.size for trial in trials)
    if distances[0] < longest:
        raise UserError(f"--distances should be at least {longest}, the length of a needle")
    measured = measure(model, trials, distances, options.rows)
    results = [summarize(trials, distance, found, chunks) for distance, found in measured.items()]
    if options.json:
        about = {name: str(getattr(options, name)) for name in ("checkpoint", "data", "text")}
        report = about | asdict(sizes) | {"results": [asdict(result) for result in results]}
        write_result(options.json, f"{json.dumps(report, indent=1)}\n".encode())
    if options.plot:
        plot(results, options.candidates, chunks * length, options.plot)
    with printing_beside(options.json, options.plot):
        show(results, options.candidates)
    return results


if __name__ == "__main__":
    with one_line_errors():
        main()
