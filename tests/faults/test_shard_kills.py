"""data_prep/shard.py killed at random times, and on a disk that is full: the same bytes at last."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT, environment, error_line, program
from tests.data_prep.corpus import text_of, tree_digest

KILLS = 10
SEED = 20
# The tool, but with a part for each file, small as these are.
PROGRAM = """
import sys
from data_prep import shard, sources
from i3dist.errors import one_line_errors
sources._SMALLEST_PART = 4000
if __name__ == "__main__":
    with one_line_errors():
        shard.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files, so eight parts: enough work that a kill can strike anywhere."""
    folder = tmp_path_factory.mktemp("source")
    for part in range(8):
        lines = (json.dumps({"text": text_of(part * 1000 + n)}) + "\n" for n in range(400))
        (folder / f"part-{part}.jsonl").write_text("".join(lines))
    return folder


def command(source: Path, out: Path, workers: int) -> list[object]:
    words = ["-c", PROGRAM, "--source", source, "--out", out, "--workers", workers]
    small = ["--vocab-size", 400, "--chunks-per-shard", 8, "--chunk-length", 64]
    return [*words, *small, "--valid-fraction", 0.2]


class Undisturbed(NamedTuple):
    """What one run makes in one go, and the seconds until it has begun and until it is done."""

    digest: dict[str, str]
    begun: float
    done: float


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, command(source, out, 1))], cwd=ROOT, env=environment()
    )
    while process.poll() is None and not (out / ".work" / "runs").exists():
        time.sleep(0.01)
    begun = time.monotonic() - start
    assert process.wait(60) == 0
    return Undisturbed(tree_digest(out), begun, time.monotonic() - start)


def run_for(seconds: float, words: list[object]) -> int:
    """Run the tool in a session of its own, kill it after a time; returns its exit status."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)  # workers are left to notice by themselves
        return process.wait()


def test_killed_at_random_times_it_ends_with_the_same_bytes(
    source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    expected, begun, done_after = undisturbed
    rng = random.Random(SEED)
    out, killed, attempts, in_work = tmp_path / "out-0", 0, 0, 0
    while killed < KILLS:
        attempts += 1
        seconds = rng.uniform(begun, done_after)
        status = run_for(seconds, command(source, out, rng.choice((1, 2, 3))))
        assert status in (0, -signal.SIGKILL)
        killed += status == -signal.SIGKILL
        in_work += status != 0 and any(out.glob(".work/runs/part-*"))
        if status == 0:  # done in spite of earlier kills: go on with another
            assert tree_digest(out) == expected
            out = tmp_path / f"out-{attempts}"
        assert attempts < 3 * KILLS
    assert in_work >= 3, "some kills strike where work is under way"
    done = program(*command(source, out, 3))
    assert done.returncode == 0, done.stderr
    assert tree_digest(out) == expected


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own that `resize` makes larger or smaller."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_the_work_goes_on_when_there_is_room(
    source: Path, undisturbed: Undisturbed, small_disk: Path
) -> None:
    """Full in every stage: what was finished stays whole, and at last come the same bytes."""
    out = small_disk / "out"
    stages = []
    for workers, kib in ((1, 64), (2, 1024), (1, 5000), (2, 12_000)):
        resize(small_disk, kib)
        done = program(*command(source, out, workers), timeout=60)
        line = error_line(done)
        assert "No space left on device" in line and str(out) in line, line
        assert "Exception ignored" not in done.stderr
        assert not (out / "train" / "manifest.json").exists()
        stages.append("packing" if any(out.glob(".work/splits/*")) else "tokenizing")
    assert stages == ["tokenizing", "tokenizing", "packing", "packing"]
    resize(small_disk, 65_536)
    assert program(*command(source, out, 1)).returncode == 0
    assert tree_digest(out) == undisturbed.digest


def test_a_full_disk_leaves_a_finished_output_alone(
    source: Path, undisturbed: Undisturbed, small_disk: Path
) -> None:
    out = small_disk / "out"
    assert program(*command(source, out, 1)).returncode == 0
    used = sum(path.stat().st_blocks // 2 for path in small_disk.rglob("*"))
    resize(small_disk, used + 64)
    error_line(program(*command(source, small_disk / "other", 1)))
    done = program(*command(source, out, 1))
    assert done.returncode == 0 and "already complete" in done.stdout
    assert tree_digest(out) == undisturbed.digest
