"""Measures the encoders that data preparation can use, on the text of parquet files.

    python benchmarks/encoding.py 'books-train-*.parquet' --tokenizer tokenizer.json

Each measurement is a process of its own: it reads the text, then encodes every document once, and
counts the CPU time of that in all its threads. The encoders take turns. Different ids are an error.
"""

import argparse
import glob
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer as HFTokenizer

from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.encoders import ENCODERS
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError

BATCH = 128
"""Documents of a call of `encode_batch_fast`: as many as data preparation reads at a time."""

EncodeAll = Callable[[list[bytes]], list[np.ndarray]]


def encoder(name: str, tokenizer: Path) -> EncodeAll:
    """A function from documents to their ids, [T] each."""
    if name in ENCODERS:
        encode = Tokenizer.load(tokenizer).encoder
        if encode.name != name:
            raise UserError(str(encode))
        return lambda documents: [encode.encode(text) for text in documents]
    backend = HFTokenizer.from_file(str(tokenizer))
    backend.encode_special_tokens = True
    if name == "encode":
        return lambda documents: [
            np.array(backend.encode(text.decode(), add_special_tokens=False).ids, np.uint16)
            for text in documents
        ]

    def in_batches(documents: list[bytes]) -> list[np.ndarray]:
        found = []
        for start in range(0, len(documents), BATCH):
            texts = [text.decode() for text in documents[start : start + BATCH]]
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            found += [np.array(encoding.ids, np.uint16) for encoding in encodings]
        return found

    return in_batches


NAMES = (*ENCODERS, "encode", "encode_batch_fast")


def measure(name: str, files: list[str], tokenizer: Path) -> dict[str, object]:
    """Encode all documents once; returns tokens, CPU seconds and a digest of the ids."""
    documents = [
        text
        for file in files
        for text in pq.read_table(file, columns=["text"])["text"].cast("large_binary").to_pylist()
    ]
    encode = encoder(name, tokenizer)
    start = time.process_time()
    ids = encode(documents)
    seconds = time.process_time() - start
    digest = hashlib.sha256()
    for document in ids:
        digest.update(document.astype("<u2").tobytes())
    return {
        "tokens": sum(map(len, ids)),
        "bytes": sum(map(len, documents)),
        "cpu_s": seconds,
        "sha256": digest.hexdigest(),
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="a glob of parquet files with a column `text`")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--only", choices=NAMES, help="measure one here, and print JSON")
    options = parser.parse_args(arguments)
    options.files = sorted(glob.glob(options.source))
    if not options.files:
        raise UserError(f"no file matches {options.source}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure every encoder several times, and print the rates."""
    options = parse_arguments(arguments)
    if options.only:
        print(json.dumps(measure(options.only, options.files, options.tokenizer)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    command = [sys.executable, __file__, options.source, "--tokenizer", str(options.tokenizer)]
    for name in NAMES * options.repeats:
        done = subprocess.run([*command, "--only", name], stdout=subprocess.PIPE, check=True)
        results[name].append(json.loads(done.stdout))
    if len({found["sha256"] for runs in results.values() for found in runs}) != 1:
        raise UserError("the encoders give different ids")
    total = results["encode"][0]
    print(f"{total['tokens']:,} tokens, {total['bytes']:,} bytes, equal ids in all runs")
    print("million tokens per CPU-second, median (least to most)")
    for name, runs in results.items():
        rates = sorted(found["tokens"] / found["cpu_s"] / 1e6 for found in runs)
        print(f"{name:18} {statistics.median(rates):7.2f} ({rates[0]:.2f} to {rates[-1]:.2f})")


if __name__ == "__main__":
    with one_line_errors():
        main()
