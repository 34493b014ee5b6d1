"""Speed of generation: i3-4096ctx beside GPTs that keep keys and values of all tokens.

    python benchmarks/generation.py [--only PART ...] [--run RUN] [--out FILE.jsonl]

On a GPU, in bf16, every step is one CUDA graph, sampling included:

  i3         i3-4096ctx at batch 1, 16 and 64. "together": all rows close their chunks at one step;
             "apart": each at another
  gpt        a GPT of equal size with a preallocated cache of keys and values
  gpt-4kv    the same size with 4 heads of keys and values
  prompt     reading a prompt of 32,768 tokens
  start      with --run RUN: from the command to the first token, launch/generate.py

On a CPU, in fp32:

  pairs      i3-4096ctx at batch 1: the batched decoder and the simple one, in turns
  closing    a token that closes a chunk, and the one after it, in turns
  crossing   the context from which i3-4096ctx takes less time for a token than a GPT of GPT-2's
             shape (124M parameters) does; both in turns

Weights are random, which changes no time. Times are medians; "slowest" is the slowest of --steps
tokens, in which every row closes a chunk. "share" is the bytes of weights and cache that a step
must read, over its time, over the bandwidth that copying a large tensor reached in the same run.
Every row is written to --out as it arrives, as a line of JSON.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gpt_decoder
import kernels
import torch
from generation_results import Row, gpu_figures, table
from gpt_decoder import CachedGPT
from measure import free, mark, milliseconds
from results import Figure, figure_table
from rich.console import Console

from i3dist.cli.paths import appended_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import ModelSettings
from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.decoder import Decoder
from i3dist.inference.prompt import read_prompt
from i3dist.inference.sampling import Sampling
from i3dist.inference.steps import AttentionStep
from i3dist.inference.token_stream import TokenStream
from i3dist.model.lm import I3LM

BOS, EOS = 2, 3
GPU, CPU = ["i3", "gpt", "gpt-4kv", "prompt", "start"], ["pairs", "closing", "crossing"]
LAUNCH = Path(__file__).parent.parent / "launch"


@dataclass(frozen=True)
class Sizes:
    """What is compared."""

    model: ModelSettings
    equal: gpt_decoder.Shape
    grouped: gpt_decoder.Shape
    small: gpt_decoder.Shape
    contexts: tuple[int, int, int, int]  # short, medium, long, longest
    batches: tuple[int, int, int]
    copied: int  # bytes


def card(layers: str) -> Sizes:
    """The default model, with these layers, and GPTs."""
    return Sizes(
        ModelSettings(vocab_size=32_000, layers=layers),
        gpt_decoder.EQUAL,
        gpt_decoder.GROUPED,
        gpt_decoder.SMALL,
        (100, 4096, 32_768, 100_000),
        (1, 16, 64),
        2**30,
    )


def toy(layers: str) -> Sizes:
    """Everything small, to test the program."""
    model = ModelSettings(
        vocab_size=64, d_model=24, layers=layers, heads=4, chunk_length=16, latents=4
    )
    tiny = gpt_decoder.Shape(2, 32, 4, 4, 64, 64)
    grouped = gpt_decoder.Shape(2, 32, 4, 2, 64, 64)
    return Sizes(model, tiny, grouped, tiny, (5, 40, 80, 200), (1, 2, 4), 2**16)


class Bench:
    """The contestants, on one device."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.sizes = (toy if options.toy else card)(options.layers)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.compiled = self.device.type == "cuda"
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        self.bandwidth = copy_bandwidth(self.sizes.copied, self.device, self.clock)
        # The shapes of one function; beyond this number it would not be compiled.
        torch._dynamo.config.recompile_limit = 64
        self.figures: list[Figure] = []
        if options.out:
            options.out.write_text("")

    def rows(self) -> Iterator[Row]:
        """Measure what is asked for."""
        short, medium, long, longest = self.sizes.contexts
        one, some, many = self.sizes.batches
        cases = [(many, medium), (some, long)]
        for part in self.options.only:
            if part == "i3":
                ends = [(one, longest), (one, medium), (many, short)]
                for batch, context in [(one, short), *cases, *ends]:
                    yield self.i3("i3 together", batch, [context] * batch)
                apart = [
                    medium + row * self.sizes.model.chunk_length // many for row in range(many)
                ]
                yield self.i3("i3 apart", many, apart)
            elif part in ("gpt", "gpt-4kv"):
                shape = self.sizes.equal if part == "gpt" else self.sizes.grouped
                for batch, context in [(one, short), *cases, (one, medium)]:
                    yield self.gpt(part, shape, batch, context)
            elif part == "prompt":
                yield from self.prompts(long)
            elif part == "start" and self.options.run:
                yield self.start()
            elif part == "pairs":
                yield from self.pairs()
            elif part == "closing":
                yield from self.closing()
            elif part == "crossing":
                yield from self.crossing()

    def model(self) -> I3LM:
        """i3-4096ctx with random weights."""
        torch.manual_seed(0)
        with self.device:
            model = I3LM(self.sizes.model, BOS)
        return model.to(self.dtype).eval().requires_grad_(False)

    def prompt(self, length: int) -> torch.Tensor:
        """One document's beginning."""
        tokens = torch.randint(EOS + 1, self.sizes.model.vocab, (length,), device=self.device)
        tokens[0] = BOS
        return tokens

    def i3(self, name: str, batch: int, contexts: list[int]) -> Row:
        """i3 after prompts of these lengths."""
        decoder = BatchDecoder(
            self.model(), [self.prompt(length) for length in contexts], self.compiled
        )
        stream = TokenStream(decoder, Sampling(), 0, EOS)
        # Every closing of a chunk is recorded when it comes the second time.
        warm_up = 2 * self.sizes.model.chunk_length + 10
        weights, cache = i3_bytes(decoder)
        return self.timed(name, batch, contexts[0], stream.next, warm_up, weights, cache)

    def gpt(self, name: str, shape: gpt_decoder.Shape, batch: int, context: int) -> Row:
        """A GPT whose cache is filled by each step."""
        with self.device:
            model = CachedGPT(shape, batch, context, self.compiled).to(self.dtype)
        model.begin(Sampling())
        return self.timed(name, batch, context, model.advance, 10, *model.bytes_read())

    def timed(
        self,
        name: str,
        batch: int,
        context: int,
        step: Callable[[], object],
        warm_up: int,
        weights: int,
        cache: int,
    ) -> Row:
        """Time a step."""
        times, memory = time_calls(step, warm_up, self.options.steps)
        if self.options.profile:
            found = kernels.kernels(lambda: [step() for _ in range(100)])
            kernels.show(found, f"{name}, batch {batch}, context {context:,}, 100 tokens")
        ms, each = statistics.median(times), statistics.fmean(times)
        share = (weights + cache) / (ms / 1e3) / self.bandwidth
        speed = 1e3 * batch / each
        return Row(name, batch, context, ms, max(times), speed, weights, cache, share, memory)

    @torch.no_grad()
    def prompts(self, length: int) -> Iterator[Row]:
        """i3 and the GPT of equal size at a long prompt."""
        i3, tokens = BatchDecoder(self.model(), [self.prompt(1)]).model, self.prompt(length)
        with self.device:
            gpt = CachedGPT(self.sizes.equal, 1, 1, compiled=False).to(self.dtype)
        calls: dict[str, Callable[[], object]] = {
            "i3 prompt": partial(read_prompt, i3, tokens),
            "gpt prompt": partial(gpt.read, tokens.unsqueeze(0)),
        }
        for name, call in calls.items():
            times, memory = time_calls(call, 2, 5)
            ms = statistics.median(times)
            yield Row(name, 1, length, ms, max(times), 1e3 * length / ms, memory_gib=memory)

    def start(self) -> Row:
        """From the command to the end of a run that writes one token."""
        words = ["--checkpoint", str(self.options.run), "--prompt", "Once", "--tokens", "1"]
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, LAUNCH / "generate.py", *words], check=True, capture_output=True
        )
        ms = 1e3 * (time.perf_counter() - begun)
        return Row("first token", 1, 1, ms, ms, 1e3 / ms)

    def pairs(self) -> Iterator[Row]:
        """The batched decoder and the simple one, token by token in turns."""
        model, prompt = self.model(), self.prompt(self.sizes.contexts[0])
        batched, simple = BatchDecoder(model, [prompt]), Decoder(model)
        simple.feed(prompt)
        token = torch.tensor([EOS + 1])
        calls = [partial(batched.feed, token), partial(simple.feed, token)]
        times = in_turns(calls, self.options.rounds, self.clock)
        for name, each in zip(["i3 batched", "i3 simple"], times, strict=True):
            yield self.in_fp32(name, len(prompt), each, *i3_bytes(batched))
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        self.figures.append(Figure("batched decoder / simple one", ratio, ".1f", least=5))

    def closing(self) -> Iterator[Row]:
        """A token that closes a chunk, and the one after it."""
        prompt = self.prompt(self.sizes.model.chunk_length)
        decoder, token = BatchDecoder(self.model(), [prompt]), torch.tensor([EOS + 1])

        def close() -> None:
            decoder.filled = [len(prompt)]  # the same chunk again
            decoder.feed(token)

        times = in_turns([close, partial(decoder.feed, token)], self.options.rounds, self.clock)
        for name, each in zip(["i3 closing", "i3 next"], times, strict=True):
            yield self.in_fp32(name, len(prompt), each, *i3_bytes(decoder))
        ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
        self.figures.append(Figure("token that closes a chunk / the next", ratio, ".2f", most=2))

    def crossing(self) -> Iterator[Row]:
        """A token of i3, and one of a GPT of GPT-2's shape at several contexts."""
        contexts = list(self.sizes.contexts[:3])
        decoder = BatchDecoder(self.model(), [self.prompt(contexts[0])])
        calls: list[Callable[[], object]] = [partial(decoder.feed, torch.tensor([EOS + 1]))]
        models = [CachedGPT(self.sizes.small, 1, n, False, tied=True) for n in contexts]
        for gpt in models:
            gpt.begin(Sampling(0))
            calls.append(gpt.advance)
        i3, *times = in_turns(calls, self.options.rounds, self.clock)
        yield self.in_fp32("i3 batched", contexts[0], i3, *i3_bytes(decoder))
        for context, gpt, each in zip(contexts, models, times, strict=True):
            yield self.in_fp32("gpt-2 shape", context, each, *gpt.bytes_read())
        slope, least = statistics.linear_regression(contexts, [*map(statistics.median, times)])
        tokens = (statistics.median(i3) - least) / slope
        self.figures.append(Figure("context where i3 becomes faster, tokens", tokens, ",.0f"))

    def in_fp32(self, name: str, context: int, times: list[float], weights: int, cache: int) -> Row:
        """A row of times that were taken in turns."""
        ms = statistics.median(times)
        share = (weights + cache) / (ms / 1e3) / self.bandwidth
        return Row(name, 1, context, ms, max(times), 1e3 / ms, weights, cache, share)


def copy_bandwidth(size: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Bytes per second that copying a tensor of `size` bytes reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    times = time_calls(copy, 3, 20)[0] if source.is_cuda else in_turns([copy], 10, clock)[0]
    return 2 * size / (statistics.median(times) / 1e3)


def time_calls(
    call: Callable[[], object], warm_up: int, timed: int
) -> tuple[list[float], float | None]:
    """Milliseconds of each timed call, and the most GPU memory that was reserved, in GiB."""
    cuda = torch.cuda.is_available()
    for _ in range(warm_up):
        call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    marks = [mark()]
    for _ in range(timed):
        call()
        marks.append(mark())
    if cuda:
        torch.cuda.synchronize()
    times = [milliseconds(a, b) for a, b in itertools.pairwise(marks)]
    return times, torch.cuda.max_memory_reserved() / 2**30 if cuda else None


def in_turns(
    calls: list[Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Milliseconds of each call in each round, after one round that is not timed."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            begun = clock()
            call()
            if number:
                taken.append(1e3 * (clock() - begun))
    return times


def i3_bytes(decoder: BatchDecoder) -> tuple[int, int]:
    """What a step of i3 reads of weights, and of keys, values and state."""
    model = decoder.model
    parts = (*model.lower, *model.upper, model.head)
    weights = sum(p.nbytes for part in parts for p in part.parameters())
    cache = sum(part.nbytes for step in decoder.lower for part in step.state)
    for step in decoder.upper:
        assert isinstance(step, AttentionStep)
        cache += step.keys.nbytes + step.values.nbytes
        cache += 0 if step.latents is None else step.latents.nbytes
    return weights, cache


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parts = GPU if torch.cuda.is_available() else CPU
    parser.add_argument(
        "--only", nargs="+", choices=GPU + CPU, default=parts, metavar="PART", help="parts to run"
    )
    parser.add_argument("--layers", default=ModelSettings().layers, help="model.layers of i3")
    parser.add_argument("--steps", type=int, default=600, help="timed tokens (600)")
    parser.add_argument("--rounds", type=int, default=25, help="rounds on a CPU (25)")
    parser.add_argument("--profile", action="store_true", help="show each row's GPU kernels")
    parser.add_argument("--threads", type=int, help="threads on a CPU (one for each core)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU, take CPU seconds; with --threads 1, where other programs run",
    )
    parser.add_argument("--run", type=Path, help="a finished run, for the time to the first token")
    parser.add_argument("--out", type=appended_path, help="file for the rows, a line of JSON each")
    parser.add_argument("--toy", action="store_true", help="small models, to test the program")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print, and write JSON lines where asked."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[Row] = []
    bench = Bench(options)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = {"device": device, "torch": torch.__version__, "layers": options.layers}
    begun = time.perf_counter()
    for row in bench.rows():
        rows.append(row)
        free()
        name = f"{row.contestant}, batch {row.batch}, context {row.context:,}"
        print(f"{name}: {row.ms:.3f} ms, after {time.perf_counter() - begun:.0f} s")
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(machine | asdict(row)) + "\n")
    console, sizes = Console(width=120), bench.sizes
    console.print(
        table(rows, f"Generation, {device}, PyTorch {torch.__version__}", bench.bandwidth)
    )
    console.print(figure_table(bench.figures + gpu_figures(rows, sizes.contexts, sizes.batches)))
    return rows


if __name__ == "__main__":
    with one_line_errors():
        main()
