"""Times data_prep/verify.py beside reading and hashing alone.

    python benchmarks/verifying.py DIR [--rounds N] [--workers N]

DIR is a sound output of data_prep/shard.py, which should fit into the page cache. Each round reads
and hashes every file of DIR in a plain loop, then verifies DIR. The first round, which fills the
cache, does not count. Figures are medians; CPU time includes that of workers.
"""

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.verification import Verification
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import UserError


def read_and_hash(folder: Path) -> None:
    """Read and hash every file."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            hashlib.sha256(path.read_bytes()).digest()


def verify(folder: Path, workers: int) -> None:
    """Verify a folder, which has to be sound."""
    for damage in Verification(folder, workers).damages():
        raise UserError(f"{folder} is not sound: {damage}")


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a call."""
    before, start = os.times(), time.perf_counter()
    call()
    wall, after = time.perf_counter() - start, os.times()
    return sum(after[:4]) - sum(before[:4]), wall


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=typed_path, metavar="DIR", help="a sound output of shard.py")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="(default: 1)")
    options: argparse.Namespace = parser.parse_args()
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    contestants: dict[str, Callable[[], None]] = {
        "read and hash": lambda: read_and_hash(options.folder),
        "verify": lambda: verify(options.folder, options.workers),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(options.rounds + 1):
        for name, call in contestants.items():
            times[name].append(timed(call))
    for name, measured in times.items():
        for kind, seconds in zip(("CPU", "wall"), zip(*measured[1:], strict=True), strict=True):
            middle = statistics.median(seconds)
            print(
                f"{name:<14} {kind:<4} {middle:7.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
                f"   {size / 1e9 / middle:.3f} GB/s"
            )


if __name__ == "__main__":
    with one_line_errors(output_is_result=True):
        main()
