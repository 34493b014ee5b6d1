"""Tokens per CPU-second of packing (counting, sorting, shards, hashes, index), without tokenizing.

    python benchmarks/packing.py --source FILE --tokenizer FILE --out DIR

The source is tokenized into DIR once. Then its runs are packed again and again.
"""

import argparse
import io
import os
import resource
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_prep.options import CORES
from data_prep.output import Output
from data_prep.output_settings import OutputSettings
from data_prep.passes import SpillPlan, spill_all
from data_prep.progress import pass_bar
from data_prep.reading.files import file_source
from data_prep.second_pass import SecondPass
from data_prep.shuffle import PartSummary
from i3dist.data.tokenizer import Tokenizer


def tokenize(options: argparse.Namespace, output: Output) -> OutputSettings:
    """Tokenize the parts that are not tokenized yet; returns the settings to pack with."""
    tokenizer = Tokenizer.load(options.tokenizer)
    settings = OutputSettings(
        source=str(options.source),
        revision="",
        tokenizer=tokenizer.sha256,
        tokenizer_sample_mb=0,
        vocab_size=tokenizer.vocab_size,
        chunk_length=512,
        chunks_per_shard=options.chunks_per_shard,
        valid_fraction=0.005,
        seed=0,
    )
    output.begin(settings, tokenizer.data, None)
    parts = file_source(options.source).parts()
    with pass_bar(Console(), "tokenize", "parts", len(parts)) as report:
        spill_all(SpillPlan(parts, output.tokenizer, output.runs, 0), CORES, report)
    return settings


def pack(
    settings: OutputSettings, output: Output, summaries: Sequence[PartSummary], workers: int
) -> tuple[int, float, float]:
    """Pack once; returns tokens, CPU-seconds and seconds."""
    shutil.rmtree(output.folder / ".work" / "packed", ignore_errors=True)
    start, before = time.monotonic(), sum(os.times()[:4])
    console = Console(file=io.StringIO())
    manifests = SecondPass(settings, output, summaries, console, workers).finish(None, {})
    spent = sum(os.times()[:4]) - before
    return sum(m.tokens for m in manifests.values()), spent, time.monotonic() - start


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and shards")
    parser.add_argument("--chunks-per-shard", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    output = Output(options.out)
    settings = tokenize(options, output)
    found = (PartSummary.load(path) for path in sorted(output.runs.glob("part-*.json")))
    summaries = [summary for summary in found if summary]
    rates = []
    for _ in range(options.rounds):
        tokens, cpu, seconds = pack(settings, output, summaries, options.workers)
        rates.append(tokens / cpu / 1e6)
        print(f"{tokens:,} tokens, {cpu:.2f} CPU-s, {seconds:.2f} s, {rates[-1]:.1f} M/CPU-s")
    print(f"median {statistics.median(rates):.1f} M tokens/CPU-s")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"most memory of this process: {most:.0f} MB")


if __name__ == "__main__":
    main()
