"""Times data_prep/verify.py beside reading and hashing alone.

    python benchmarks/verifying.py DIR [--rounds N] [--workers N]

DIR is a sound output of data_prep/shard.py, which should fit into the page cache. Each round reads
and hashes every file of DIR in a plain loop, in as many processes, then verifies DIR. The first
round, which fills the cache, does not count. Figures are medians; CPU time includes that of
workers. The speed of verifying is relative to the plain loop of the same round.
"""

import argparse
import hashlib
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from data_prep.checks.verification import Verification
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import UserError


def read_and_hash(folder: Path, workers: int) -> None:
    """Read and hash every file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if workers == 1:
        for path in paths:
            hash_file(path)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(hash_file, paths, chunksize=16))


def hash_file(path: Path) -> bytes:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).digest()


def verify(folder: Path, workers: int) -> None:
    """Verify a folder, which has to be sound."""
    for damage in Verification(folder, workers).damages():
        raise UserError(f"{folder} is not sound: {damage}")


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a call."""
    before, start = cpu_seconds(), time.perf_counter()
    call()
    return cpu_seconds() - before, time.perf_counter() - start


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=typed_path, metavar="DIR", help="a sound output of shard.py")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="(default: 1)")
    options: argparse.Namespace = parser.parse_args()
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    contestants: dict[str, Callable[[], None]] = {
        "read and hash": lambda: read_and_hash(options.folder, options.workers),
        "verify": lambda: verify(options.folder, options.workers),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(options.rounds + 1):
        for name, call in contestants.items():
            times[name].append(timed(call))
    plain, verified = (list(zip(*measured[1:], strict=True)) for measured in times.values())
    for kind, alone, whole in zip(("CPU", "wall"), plain, verified, strict=True):
        for name, seconds in zip(contestants, (alone, whole), strict=True):
            middle = statistics.median(seconds)
            print(
                f"{name:<14} {kind:<4} {middle:7.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
                f"   {size / 1e9 / middle:.3f} GB/s"
            )
        speed = statistics.median(a / b for a, b in zip(alone, whole, strict=True))
        print(f"speed of verify, {kind}: {speed:.0%}")


if __name__ == "__main__":
    with one_line_errors(output_is_result=True):
        main()
