"""Turns parquet files into tars with encode_batch_fast and webdataset's TarWriter: a peer.

    python benchmarks/peer_tars.py OUT TOKENIZER WORKERS FILE...

Each worker takes every WORKERS-th file, encodes its documents in batches, and writes samples of 512
tokens to tars of 2,048, which are hashed and synced. Nothing is shuffled. It prints the number of
tokens.
"""

import hashlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from webdataset import TarWriter

LENGTH, SAMPLES = 512, 2048


def ids(tokenizer: Path, files: list[str]) -> Iterator[list[int]]:
    """Of every document, with <BOS> and <EOS>."""
    backend = Tokenizer.from_file(str(tokenizer))
    backend.encode_special_tokens = True
    first, last = backend.token_to_id("<BOS>"), backend.token_to_id("<EOS>")
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            for encoding in backend.encode_batch_fast(batch["text"].to_pylist()):
                yield [first, *encoding.ids, last]


def samples(documents: Iterator[list[int]]) -> Iterator[bytes]:
    """Their tokens in rows of `LENGTH`; what is left at the end is dropped."""
    waiting: list[int] = []
    for document in documents:
        waiting += document
        whole = len(waiting) // LENGTH * LENGTH
        rows = np.array(waiting[:whole], "<u2").reshape(-1, LENGTH)
        yield from (row.tobytes() for row in rows)
        waiting = waiting[whole:]


def finish(path: Path) -> str:
    """Hash and sync a tar."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(out: Path, tokenizer: Path, files: list[str], workers: int, worker: int) -> int:
    """Write a worker's tars; returns their tokens."""
    count, writer, path = 0, None, out
    for sample in samples(ids(tokenizer, files[worker::workers])):
        if count % SAMPLES == 0:
            if writer:
                writer.close()
                finish(path)
            path = out / f"{worker}-{count // SAMPLES:06}.tar"
            writer = TarWriter(str(path))
        assert writer is not None
        writer.write({"__key__": f"{count:09}", "tokens": sample})
        count += 1
    if writer:
        writer.close()
        finish(path)
    return count * LENGTH


def main() -> None:
    """Write all tars."""
    out, tokenizer, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    os.environ["RAYON_NUM_THREADS"] = "1"
    out.mkdir(parents=True)
    work = partial(write, out, tokenizer, sys.argv[4:], workers)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        print(sum(pool.map(work, range(workers))))


if __name__ == "__main__":
    main()
