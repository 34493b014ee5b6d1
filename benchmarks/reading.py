"""Times how fast one process reads chunks from local shards, beside other libraries.

    python benchmarks/reading.py [--shards 160] [--rounds 5] [--json FILE]

It makes shards of 256 chunks of 512 tokens. Contestants take turns, each in a process of its own,
and read all of them from the page cache:

- windows: what a loader process of a run does. Shards are verified by SHA-256, and batches of lanes
  are made of tokens, targets and depths.
- shards: the part of it that verifies shards and reads their tokens.
- webdataset: `WebDataset` over the same files; each sample as an array of tokens.
- streaming: MosaicML's `StreamingDataset` over the same chunks, converted to MDS first, read in
  order. Skipped where it is not installed (pip install mosaicml-streaming).

Figures are medians over rounds: chunks per second, and CPU seconds per million tokens, which other
programs on the machine disturb less.
"""

import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import synthetic

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.corpus import Split
from i3dist.data.lanes import LaneWindows
from i3dist.data.manifest import Manifest
from i3dist.data.shards import read_shard
from i3dist.errors import UserError
from i3dist.files import write_result

LANES, WINDOW = 4, 8
VOCABULARY, LENGTH, PER_SHARD = 32_000, 512, 256
FORK = multiprocessing.get_context("fork")
# Reads everything, and returns the number of chunks and the sum of all tokens.
Contestant = Callable[[], tuple[int, int]]


def read_windows(split: Split) -> tuple[int, int]:
    """Read one epoch as a loader process does."""
    schedule = split.schedule(LANES, WINDOW, seed=0, version=1)
    windows = LaneWindows(split.folder, split.manifest, schedule, range(LANES))
    chunks = total = 0
    pad = split.manifest.pad_id
    for index in range(schedule.windows_in_epoch(0)):  # type: ignore[attr-defined]
        reading = windows[index]
        if isinstance(reading, UserError):
            raise reading
        tokens = reading[0].tokens.numpy()
        places = [place for lane in range(LANES) for place in schedule.chunks(index, lane)]
        chunks += len(places) - places.count(None)
        total += int(tokens.sum()) - pad * int((tokens == pad).sum())
    return chunks, total


def counted(chunks: Iterator[np.ndarray], pad: int) -> tuple[int, int]:
    """Number of chunks, and the sum of their tokens without padding."""
    count = total = 0
    for chunk in chunks:
        count += len(chunk) if chunk.ndim == 2 else 1
        total += int(chunk.sum(dtype=np.int64)) - pad * int((chunk == pad).sum())
    return count, total


def read_shards(split: Split) -> tuple[int, int]:
    """Read all shards one after the other."""
    manifest = split.manifest
    numbers = range(len(manifest.shards))
    tokens = (read_shard(split.folder, manifest, number).tokens for number in numbers)
    return counted(tokens, manifest.pad_id)


def read_webdataset(split: Split) -> tuple[int, int]:
    """Read all samples of plain webdataset."""
    import webdataset

    urls = [str(Path(str(split.folder)) / shard.name) for shard in split.manifest.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False)
    return counted((np.frombuffer(s["u16"], "<u2") for s in samples), split.manifest.pad_id)


def read_streaming(folder: Path, pad: int) -> tuple[int, int]:
    """Read all samples of an MDS folder by index."""
    from streaming.base.dataset import StreamingDataset

    samples = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    read = (np.frombuffer(samples[n]["tokens"], "<u2") for n in range(len(samples)))
    return counted(read, pad)


def find_streaming() -> str | None:
    """Make MosaicML Streaming's modules importable; its version, or None without it.

    Its package imports a class of torchvision for image sets; the modules for chunks do not.
    """
    found = importlib.util.find_spec("streaming")
    if found is None or found.submodule_search_locations is None:
        return None
    package = types.ModuleType("streaming")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["streaming"] = package
    return version("mosaicml-streaming")


def write_mds(split: Split, folder: Path) -> None:
    """Write the chunks of a split as MDS."""
    from streaming.base.format.mds.writer import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "bytes"}) as writer:
        for number in range(len(split.manifest.shards)):
            for chunk in read_shard(split.folder, split.manifest, number).tokens:
                writer.write({"tokens": chunk.astype("<u2").tobytes()})


def measure(contestant: Contestant) -> tuple[float, float, tuple[int, int]]:
    """Wall seconds, CPU seconds and result of one reading, in a process of its own."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run(answer: Connection) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        result = contestant()
        answer.send((time.perf_counter() - wall, time.process_time() - cpu, result))

    process = FORK.Process(target=run, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise UserError("a contestant failed; its traceback says why") from None
    finally:
        process.join()


def main() -> None:
    """Print a table, and write the figures as JSON."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=160, help="of 256 chunks each")
    parser.add_argument("--rounds", type=int, default=5, help="readings of each contestant")
    parser.add_argument("--json", type=result_path, help="write all readings here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.Data.write(folder, VOCABULARY, LENGTH, options.shards, PER_SHARD)
        split = Split(folder, Manifest.load(folder))
        contestants: dict[str, Contestant] = {
            "windows": partial(read_windows, split),
            "shards": partial(read_shards, split),
            "webdataset": partial(read_webdataset, split),
        }
        if streaming := find_streaming():
            write_mds(split, folder / "mds")
            pad = split.manifest.pad_id
            contestants["streaming"] = partial(read_streaming, folder / "mds", pad)
        else:
            print("streaming is skipped: mosaicml-streaming is not installed")
        readings = take_turns(contestants, options.rounds)
    versions = {"webdataset": version("webdataset"), "streaming": streaming}
    print(f"{split.manifest.chunks:,} chunks of {split.manifest.chunk_length} tokens; {versions}")
    print_table(readings, split.manifest)
    if options.json:
        content = {"versions": versions, "readings": readings}
        write_result(options.json, f"{json.dumps(content, indent=1)}\n".encode())


def take_turns(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[list[float]]]:
    """Wall and CPU seconds of every reading; a first round, which fills caches, is not counted.

    Raises:
        UserError: contestants read other tokens.
    """
    readings: dict[str, list[list[float]]] = {name: [] for name in contestants}
    results = set()
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            wall, cpu, result = measure(contestant)
            results.add(result)
            if number:
                readings[name].append([wall, cpu])
    if len(results) > 1:
        raise UserError(f"contestants read different chunks or tokens: {sorted(results)}")
    return readings


def print_table(readings: dict[str, list[list[float]]], manifest: Manifest) -> None:
    """Print medians, with the range of chunks per second."""
    print(f"{'':12}{'chunks/s':>10}{'lowest':>10}{'highest':>10}{'CPU s per million tokens':>28}")
    for name, pairs in readings.items():
        rates = sorted(manifest.chunks / wall for wall, _ in pairs)
        cpu = statistics.median(cpu for _, cpu in pairs) / (manifest.tokens / 1e6)
        rate = statistics.median(rates)
        print(f"{name:12}{rate:10,.0f}{rates[0]:10,.0f}{rates[-1]:10,.0f}{cpu:28.4f}")


if __name__ == "__main__":
    with one_line_errors():
        main()
