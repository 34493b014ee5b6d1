"""The command line of shard.py."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from data_prep.hub import DATASET, HUB_NAME
from data_prep.readers import SUFFIXES_IN_WORDS
from data_prep.tokenizer import DEFAULT_VOCABULARY, LARGEST_VOCABULARY, SMALLEST_VOCABULARY
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser


def number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high`, both included."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low:,} to {high:,}")
        return value

    return parse


def source(text: str) -> str:
    """The name or path of a source. Which of the two it is depends on the registered names."""
    typed_path(text)
    return text


def add_text_options(parser: ArgumentParser) -> None:
    """Options on what is read and written, and on how text becomes tokens."""
    add = parser.add_argument
    add(
        "--source",
        type=source,
        default=DATASET,
        help=f"a file, a folder or a glob of {SUFFIXES_IN_WORDS}; or `stdlib`, the text of this "
        f"Python's standard library (default: {HUB_NAME}, streamed from the hub)",
    )
    add(
        "--out",
        type=typed_path,
        default=Path("data/fineweb-edu"),
        help="folder (default: %(default)s)",
    )
    add("--tokenizer", type=typed_path, help="a tokenizer.json to use (default: train one)")
    add(
        "--vocab-size",
        type=number(int, SMALLEST_VOCABULARY, LARGEST_VOCABULARY),
        help=f"entries of the vocabulary (default: --tokenizer's, else {DEFAULT_VOCABULARY})",
    )
    add(
        "--tokenizer-sample-mb",
        type=number(int, 1, 10_000),
        default=200,
        metavar="MB",
        help="train the tokenizer on the first MB of text (default: %(default)s)",
    )
    add(
        "--workers",
        type=number(int, 1, 1024),
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize (default: one per core, here %(default)s)",
    )


def add_shard_options(parser: ArgumentParser) -> None:
    """Options on how tokens become shards."""
    add = parser.add_argument
    add(
        "--chunk-length",
        type=number(int, 2, 1 << 16),
        default=512,
        help="tokens per chunk (default: %(default)s)",
    )
    add(
        "--chunks-per-shard",
        type=number(int, 1, 1_000_000),
        default=256,
        help="use fewer for a small corpus, so that every lane has shards (default: %(default)s)",
    )
    add(
        "--valid-fraction",
        type=number(float, 0.0, 0.9),
        default=0.005,
        help="share of documents for validation; 0: no such split (default: %(default)s)",
    )
    add(
        "--seed",
        type=number(int, 0, (1 << 63) - 1),
        default=0,
        help="of the shuffle and the split (default: %(default)s)",
    )
