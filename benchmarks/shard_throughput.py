"""Times the whole way from parquet files to finished shards, beside other libraries.

    python benchmarks/shard_throughput.py 'books-*.parquet' --tokenizer FILE [--datatrove PYTHON]

Contestants take turns and use the same tokenizer, the same files and as many processes:

- shard.py: shuffled, hashed and synced shards, an index of documents, a manifest.
- tars: encode_batch_fast and webdataset's TarWriter (benchmarks/peer_tars.py): hashed and synced.
- datatrove: its DocumentTokenizer (benchmarks/peer_datatrove.py): shuffled documents, neither
  hashed nor synced. It is run with the Python of --datatrove, which has it installed; without that
  it is skipped.

Every contestant is a program that is started anew. Figures are medians over rounds: CPU seconds of
all its processes, wall time, and the most memory of one process.
"""

import argparse
import ctypes
import glob
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from i3dist.cli.paths import appended_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError

HERE = Path(__file__).parent
BILLIONS = 10e9  # tokens that the last column is for
SET_CHILD_SUBREAPER = 36  # of prctl(2)


class Run(NamedTuple):
    """What one program took."""

    tokens: int
    cpu_s: float
    wall_s: float
    memory: int  # bytes, of its largest process
    disk: int  # bytes of its output


class Contestant(NamedTuple):
    """A program, and how many tokens its output or its words say that it wrote."""

    command: list[str]
    tokens: Callable[[Path, str], int]

    def run(self, out: Path, log: Path) -> Run:
        """Run it once, into `out`."""
        started = time.perf_counter()
        with log.open("w+") as words:
            command = [part.format(out=out) for part in self.command]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True)
            assert process.stdout is not None
            said = process.stdout.read()
            used = {pid: (status, usage) for pid, status, usage in ended()}
            wall = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(used[process.pid][0])
            if process.returncode:
                words.seek(0)
                raise UserError(f"{command[1]} failed: {words.read()[-2000:]}")
        files = [path for path in out.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        usages = [usage for _, usage in used.values()]
        cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        memory = max(usage.ru_maxrss for usage in usages) * 1024
        return Run(self.tokens(out, said), cpu, wall, memory, size)


def adopt() -> None:
    """Become the parent of processes whose parent ends before them; else they are not counted."""
    ctypes.CDLL(None, use_errno=True).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def ended() -> Iterator[tuple[int, int, resource.struct_rusage]]:
    """Wait for all children; id, status and usage of each, its own children included."""
    with suppress(ChildProcessError):
        while True:
            yield os.wait3(0)


def written(out: Path, _: str) -> int:
    """Tokens of an output of shard.py."""
    return sum(Manifest.load(out / split).tokens for split in ("train", "valid"))


def printed(_: Path, said: str) -> int:
    """The number that a program printed last."""
    return int(said.split()[-1])


def contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    """By name."""
    tokenizer, workers = str(options.tokenizer), str(options.workers)
    ours = [sys.executable, str(HERE.parent / "data_prep" / "shard.py"), "--out", "{out}"]
    ours += ["--tokenizer", tokenizer, "--workers", workers, "--source", options.source]
    words = ["{out}", tokenizer, workers, *options.files]
    found = {
        "shard.py": Contestant(ours, written),
        "tars": Contestant([sys.executable, str(HERE / "peer_tars.py"), *words], printed),
    }
    if options.datatrove:
        command = [options.datatrove, str(HERE / "peer_datatrove.py"), *words]
        found["datatrove"] = Contestant(command, printed)
    return found


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", help="a glob of parquet files with a column `text`")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--workers", type=int, default=2, help="processes of each (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--datatrove", metavar="PYTHON", help="a Python that has datatrove")
    parser.add_argument("--json", type=appended_path, metavar="FILE", help="append all runs here")
    options = parser.parse_args(arguments)
    options.files = sorted(glob.glob(options.source))
    if not options.files:
        raise UserError(f"no file matches {options.source}")
    return options


def table(runs: dict[str, list[Run]], workers: int) -> Table:
    """Medians, with least and most in brackets."""
    first = next(iter(runs.values()))
    shown = Table(title=f"{first[0].tokens:,} tokens, {workers} processes, {len(first)} rounds")
    for heading in ("", "CPU s", "wall s", "M tokens/CPU-s", "GB", "min for 10B"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, each in runs.items():
        cpu, wall = (statistics.median(column) for column in list(zip(*each, strict=True))[1:3])
        tokens = each[0].tokens
        shown.add_row(
            name,
            f"{cpu:.1f} ({min(r.cpu_s for r in each):.1f} to {max(r.cpu_s for r in each):.1f})",
            f"{wall:.1f} ({min(r.wall_s for r in each):.1f} to {max(r.wall_s for r in each):.1f})",
            f"{tokens / cpu / 1e6:.2f}",
            f"{max(r.memory for r in each) / 1e9:.2f}",
            f"{wall / tokens * BILLIONS / 60:.1f}",
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Run every contestant several times, and print what they took."""
    options = parse_arguments(arguments)
    adopt()
    runs: dict[str, list[Run]] = {name: [] for name in contestants(options)}
    for number in range(options.rounds):
        for name, contestant in contestants(options).items():
            with tempfile.TemporaryDirectory(prefix="i3dist-") as folder:
                run = contestant.run(Path(folder) / "out", Path(folder) / "log")
            runs[name].append(run)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps({"name": name, "round": number, **run._asdict()}) + "\n")
    Console(width=130).print(table(runs, options.workers))


if __name__ == "__main__":
    with one_line_errors(output_is_result=True):
        main()
