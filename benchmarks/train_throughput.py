"""Training throughput of i3-4096ctx on one GPU, beside a GPT of its size and other forms of itself.

    python benchmarks/train_throughput.py [--only NAME ...] [--json FILE]

Every contestant takes full optimizer steps on packed documents of random tokens: forward, backward,
gradient clipping, AdamW in fp32 on bf16 parameters. Contestants:

  engine          i3-4096ctx through the ZeRO-2 engine, windows of 8 chunks, history on: the card's
                  step of 4 lanes, and --shapes
  letter          the card to the letter: 4 lanes, windows of 1 chunk, 8 accumulated
  no-history      engine at its best shape, a model without compressor and history
  data            engine at its best shape, reading shards from disk with one worker
  bare            the same model in a plain PyTorch loop, at the card's and the best shape
  gpt-512         a GPT of equal parameter count, or of --gpt-ff, rows of 512 tokens, causal over
                  whole rows
  gpt-4096        the same, rows of 4,096
  gpt-4096-masks  the same, each token seeing its own document only
  one-chunk       engine, 4 lanes, windows of 1 chunk
  scripted        bare, not compiled, with WKV as a TorchScript loop over time: same shape

"Best" is the engine's fastest of --shapes in this run or in --json FILE. Times are medians. Except
in `data` the batch stays the same, and a loss that does not fall ends the program. MFU is against
the data sheet (i3dist/tracking/mfu.py); beside it is the share of the best bf16 matrix product of
the same run.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import flops
import kernels
import results
import synthetic
import torch
from bare_loop import BareLoop
from gpt import GPT, document_mask
from i3_steps import I3Steps, Loop, Shape, WithoutHistory, in_bare_loop, in_engine, scripted_wkv
from measure import Case, Prepared, free, measure
from results import Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.config import ModelSettings, OptimizerSettings, TrainSettings
from i3dist.data.lanes import windows
from i3dist.distributed import collectives
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.ops.cross_entropy import IGNORE
from i3dist.tracking.mfu import per_token

LR = 2e-4
CARD_STEP, LETTER, ONE_CHUNK = Shape(4, 4), Shape(4, 4, 1, 8), Shape(4, 4, 1)
CONTESTANTS = [
    *("engine", "letter", "no-history", "data", "bare", "gpt-512", "gpt-4096", "gpt-4096-masks"),
    *("one-chunk", "scripted"),
]


@dataclass(frozen=True)
class Sizes:
    """What is compared, and on how much data."""

    model: ModelSettings
    gpt: dict[str, int]
    cube: int  # side of the square matrix product
    shards: int
    chunks_per_shard: int

    def tokens(self, chunks: int) -> int:
        """Tokens of so many chunks."""
        return chunks * self.model.chunk_length


ATTENTIONS = ("dual-attention", "attention")  # layer kinds; the first is the default's
CARD = Sizes(ModelSettings(vocab_size=32_000), {}, 8192, 64, 256)
TOY = Sizes(
    ModelSettings(
        vocab_size=64,
        d_model=24,
        layers="2xrwkv,2xdual-attention",
        heads=4,
        chunk_length=16,
        latents=4,
    ),
    {"vocab": 64, "layers": 2, "width": 64, "heads": 4, "feed_forward": 256},
    cube=64,
    shards=8,
    chunks_per_shard=64,
)


class Bench:
    """The contestants, on one device."""

    def __init__(self, options: argparse.Namespace, folder: Path, rows: list[Row]):
        self.options = options
        self.rows = rows
        sizes = TOY if options.toy else CARD
        layers = sizes.model.layers.replace(ATTENTIONS[0], options.attention)
        update = {"sub_latents": options.sub_latents, "layers": layers}
        model = sizes.model.model_copy(update=update)
        self.sizes = s = replace(sizes, model=model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vocab, length = s.model.vocab, s.model.chunk_length
        self.data = synthetic.Data.write(folder, vocab, length, s.shards, s.chunks_per_shard)

    @property
    def best(self) -> Shape:
        """The engine's fastest shape; the last of --shapes where none is measured yet."""
        fastest = results.fastest(self.rows, "engine")
        for shape in self.options.shapes:
            if fastest is not None and str(shape) == fastest.shape:
                return shape
        if fastest is not None:
            raise UserError(f"--shapes lacks the engine's fastest, which is {fastest.shape}")
        return self.options.shapes[-1]

    def cases(self, contestant: str) -> Iterator[Case]:
        """What is to be measured of one contestant."""
        gpt = partial(self.gpt_cases, contestant)
        bare = partial(in_bare_loop, compiled=self.device.type == "cuda")
        plain = partial(in_bare_loop, compiled=False)
        match contestant:
            case "engine":
                for shape in self.options.shapes:
                    yield self.i3_case(contestant, shape, in_engine)
            case "letter":
                yield self.i3_case(contestant, LETTER, in_engine)
            case "no-history":
                yield self.i3_case(contestant, self.best, in_engine, WithoutHistory)
            case "data":
                yield Case(contestant, str(self.best), partial(self.from_disk, self.best))
            case "bare":
                for shape in dict.fromkeys([CARD_STEP, self.best]):
                    yield self.i3_case(contestant, shape, bare)
            case "gpt-512":
                yield from gpt(1, self.options.gpt_512)
            case "gpt-4096":
                yield from gpt(8, self.options.gpt_4096)
            case "gpt-4096-masks":
                yield from gpt(8, self.options.gpt_4096, masks=True)
            case "one-chunk":
                yield self.i3_case(contestant, ONE_CHUNK, in_engine)
            case "scripted":
                yield self.i3_case(contestant, ONE_CHUNK, plain, scripted=True)

    def i3_case(
        self,
        contestant: str,
        shape: Shape,
        loop: Loop,
        kind: type[I3LM] = I3LM,
        scripted: bool = False,
    ) -> Case:
        """An i3 of some kind in some loop."""
        prepare = partial(self.prepare_i3, shape, loop, kind, scripted)
        return Case(contestant, str(shape), prepare, few=scripted)

    def prepare_i3(self, shape: Shape, loop: Loop, kind: type[I3LM], scripted: bool) -> Prepared:
        """Steps over one and the same batch."""
        steps = self.i3_steps(shape, loop, kind)
        reader = self.data.lane_windows(shape.lanes, shape.window)
        batches = synthetic.batches(reader, shape.accumulation, self.device)

        def step() -> Tensor:
            with scripted_wkv() if scripted else nullcontext():
                return steps(batches, LR, synthetic.PAD)

        needed = per_token(steps.model, batches[0]).flops
        tokens = self.sizes.tokens(shape.chunks)
        return Prepared(steps.model, step, tokens, needed, close=steps.close)

    def from_disk(self, shape: Shape) -> Prepared:
        """Steps of the engine over batches as they come from a loader with one worker."""
        steps, waits = self.i3_steps(shape, in_engine, I3LM), []
        reader = self.data.lane_windows(shape.lanes, shape.window)
        count = self.options.warm_up + self.options.steps + kernels.PROFILED
        batches = windows(reader, 0, count, workers=1, device=self.device)

        def step() -> Tensor:
            started = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - started)
            return steps([batch], LR, synthetic.PAD)

        needed = per_token(steps.model, synthetic.batches(reader, 1, self.device)[0]).flops
        tokens = self.sizes.tokens(shape.chunks)
        return Prepared(steps.model, step, tokens, needed, waits, steps.close)

    def i3_steps(self, shape: Shape, loop: Loop, kind: type[I3LM]) -> I3Steps:
        """A new model in a loop."""
        torch.manual_seed(0)
        with self.device:
            model = kind(self.sizes.model, synthetic.BOS)
        return loop(model, shape, self.device)

    def gpt_cases(
        self, contestant: str, chunks: int, counts: list[int], masks: bool = False
    ) -> Iterator[Case]:
        """Rows of `chunks` chunks; each number of rows in each variant."""
        length = self.sizes.tokens(chunks)
        kernel = "flex" if masks else "flash"
        sizes = {f", ff {ff}": self.sizes.gpt | {"feed_forward": ff} for ff in self.options.gpt_ff}
        for rows, (name, size) in product(counts, (sizes or {"": self.sizes.gpt}).items()):
            prepare = partial(self.prepare_gpt, size, rows, length, masks)
            yield Case(contestant, f"{rows} rows, {kernel}, blocks{name}", prepare)

    def prepare_gpt(self, size: dict[str, int], rows: int, length: int, masks: bool) -> Prepared:
        """Steps of the GPT in the bare loop over one and the same batch."""
        torch.manual_seed(0)
        with self.device:
            model = GPT(length, **size)
        if self.device.type == "cuda":
            model.compile_blocks()
        loop = BareLoop(model, OptimizerSettings(), TrainSettings().clip)
        tokens, targets = (part.to(self.device) for part in self.data.rows(rows, length))
        flash = self.device.type == "cuda" and not masks

        def step() -> Tensor:
            count = (targets != IGNORE).sum()
            mask = document_mask(tokens, synthetic.BOS) if masks else None
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
                losses = loop(tokens, targets, mask)
                loop.backward(losses.sum(), count)
            loop.step(LR)
            return losses.detach().sum() / count

        needed = flops.of_gpt(model, tokens, synthetic.BOS if masks else None).flops
        return Prepared(model, step, tokens.numel(), needed)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add = partial(parser.add_argument, metavar="N", type=int)
    names, only = {"metavar": "NAME", "type": str}, "measure these contestants (default: all)"
    add("--only", nargs="+", **names, choices=CONTESTANTS, default=CONTESTANTS, help=only)
    add(
        "--shapes",
        metavar="LIST",
        type=shapes,
        default="8,16,32x16",
        help="engine's steps beside the card's: lanes, or lanes x lanes at once "
        "(default: %(default)s)",
    )
    add("--gpt-512", nargs="+", default=[64, 128], help="rows of its batches (default: 64 128)")
    add("--gpt-4096", nargs="+", default=[8, 16], help="rows of its batches (default: 8 16)")
    add(
        "--gpt-ff",
        nargs="+",
        default=[],
        help="channels of its feed-forward (targets are for the default, which gives it i3's size)",
    )
    parts = CARD.model.sub_latents
    add("--sub-latents", default=parts, help=f"of each of i3's latents (default: {parts})")
    kinds = {"metavar": "KIND", "type": str, "choices": ATTENTIONS, "default": ATTENTIONS[0]}
    add("--attention", **kinds, help=f"of i3: {' or '.join(ATTENTIONS)} (default: the first)")
    add("--warm-up", default=5, help="steps before the clock starts (default: %(default)s)")
    add("--steps", default=20, help="steps that are timed (default: %(default)s)")
    add(
        "--json",
        metavar="FILE",
        type=result_path,
        help="write the results here; rows of contestants not measured now stay",
    )
    flag = partial(parser.add_argument, action="store_true")
    flag("--profile", help="print afterwards where the GPU's time goes, by kernel")
    flag("--toy", help="models of a few thousand parameters, to check that everything runs")
    options = parser.parse_args(arguments)
    if min(options.warm_up, options.steps) < 1:
        raise UserError("--warm-up and --steps must be 1 or more")
    if not options.toy and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here; --toy runs everything at a small size")
    return options


def shapes(text: str) -> list[Shape]:
    """The card's step and others, joined by commas."""
    return list(dict.fromkeys([CARD_STEP, *map(Shape.parse, text.split(","))]))


def machine() -> dict[str, str]:
    """What the results depend on besides the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__}


def run(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure what is asked for; results are written as they arrive."""
    bench = Bench(options, folder, results.load(options.json))
    rows = bench.sizes.tokens(CARD_STEP.chunks)
    products = flops.products(bench.sizes.cube, rows, bench.sizes.model)
    peak = flops.matrix_product_rate(products, bench.device)
    for contestant in options.only:
        for case in bench.cases(contestant):
            free()
            started = time.perf_counter()
            try:
                row = measure(case, options.warm_up, options.steps, peak, options.profile)
            except torch.OutOfMemoryError:
                print(f"{case.contestant}, {case.shape}: does not fit into the GPU's memory")
                continue
            bench.rows = results.merge(bench.rows, row)
            bench.rows.sort(key=lambda row: CONTESTANTS.index(row.contestant))
            seconds = time.perf_counter() - started
            print(
                f"{row.contestant}, {row.shape}: {row.tokens_per_s:,.0f} tokens/s "
                f"({seconds:.0f} s in all)",
                flush=True,
            )
            if options.json:
                merits = results.figures(bench.rows, str(CARD_STEP))
                results.store(options.json, bench.rows, merits, machine())
    return bench.rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print, and write JSON where asked."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options, Path(folder))
    title = "Training, {device}, PyTorch {torch}".format(**machine())
    results.show(rows, results.figures(rows, str(CARD_STEP)), title)
    collectives.leave_group()
    return rows


if __name__ == "__main__":
    with one_line_errors():
        main()
