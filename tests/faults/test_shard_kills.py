"""data_prep/shard.py killed at random times, and on a disk that is full: the same bytes at last."""

import itertools
import json
import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from data_prep.reading import files
from data_prep.shard import main
from i3dist.errors import UserError
from i3dist.files import write_whole
from tests.conftest import ROOT, environment, error_line, program
from tests.data_prep.corpus import text_of, tree_digest

KILLS = 10
SEED = 20
# The tool, but with a part for each file, small as these are, and packing shared out among workers.
PROGRAM = """
import sys
from data_prep import ranges, shard
from data_prep.reading import files
from i3dist.cli.program import one_line_errors
files._SMALLEST_PART = 4000
ranges.RANGE_TOKENS, ranges.WORKER_TOKENS = 50_000, 1
if __name__ == "__main__":
    with one_line_errors():
        shard.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files, so eight parts: enough work that a kill can strike anywhere."""
    folder = tmp_path_factory.mktemp("source")
    for part in range(8):
        lines = (json.dumps({"text": text_of(part * 1000 + n)}) + "\n" for n in range(150))
        (folder / f"part-{part}.jsonl").write_text("".join(lines))
    return folder


def arguments(source: Path, out: Path, workers: int) -> list[str]:
    words: list[object] = ["--source", source, "--out", out, "--workers", workers]
    words += ["--vocab-size", 400, "--chunks-per-shard", 8, "--chunk-length", 64]
    return [str(word) for word in [*words, "--valid-fraction", 0.2]]


def command(source: Path, out: Path, workers: int) -> list[str]:
    return ["-c", PROGRAM, *arguments(source, out, workers)]


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
        [sys.executable, *command(source, out, 1)], cwd=ROOT, env=environment()
    )
    while process.poll() is None and not (out / ".work" / "runs").exists():
        time.sleep(0.01)
    begun = time.monotonic() - start
    assert process.wait(60) == 0
    return Undisturbed(tree_digest(out), begun, time.monotonic() - start)


def run_for(seconds: float, words: list[str], out: Path | None = None) -> int:
    """Run the tool, kill it so long after it has started, or has begun a part of the work in `out`;
    returns its exit status."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = time.time()
    while out is not None and process.poll() is None and not begun_since(started, out):
        time.sleep(0.01)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)  # workers are left to notice by themselves
        return process.wait()


def begun_since(moment: float, out: Path) -> bool:
    """Whether a part of the work has been begun since."""
    with suppress(FileNotFoundError):  # one may be taken away meanwhile
        return any(part.stat().st_mtime > moment for part in out.glob(".work/runs/part-*"))
    return False


def test_killed_at_random_times_it_ends_with_the_same_bytes(
    source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    expected, begun, done_after = undisturbed
    rng = random.Random(SEED)
    out, killed, attempts, in_work = tmp_path / "out-0", 0, 0, 0
    while killed < KILLS:
        attempts += 1
        words = command(source, out, rng.choice((1, 1, 2)))
        if attempts % 2:  # however busy the machine is, these strike at work
            status = run_for(rng.uniform(0, (done_after - begun) / 2), words, out)
        else:
            status = run_for(rng.uniform(begun, done_after), words)
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
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def full(disk: Path, left: int = 0) -> Iterator[None]:
    """Leave so many bytes free meanwhile, a multiple of 4096."""
    with (disk / "filler").open("ab", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(1 << 20)):
                pass
        file.truncate(file.tell() - left)
    try:
        yield
    finally:
        (disk / "filler").unlink()


def test_a_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    path = small_disk / "file"
    write_whole(path, b"old")
    with full(small_disk, 4096), pytest.raises(OSError, match="No space left on device"):
        write_whole(path, bytes(10_000))
    assert path.read_bytes() == b"old" and list(small_disk.iterdir()) == [path]


# Every kind of file that the tool makes, in this order: which call of what writes it.
WRITES = [
    ("data_prep.output.write_first", 1),  # shard.json
    ("data_prep.output.write_whole", 2),  # what was found of the source
    ("data_prep.output.write_first", 2),  # tokenizer.json
    ("data_prep.plan.write_whole", 1),  # how the source is cut into parts
    ("data_prep.shuffle.write_run", 3),  # a run of documents
    ("data_prep.shuffle.write_whole", 2),  # the summary of a part
    ("data_prep.output.write_whole", 1),  # shard.json again
    ("data_prep.pack.write_shard", 9),
    ("data_prep.pack.IndexWriter.close", 1),
    ("data_prep.output.write_whole", 3),  # what was read of the source
    ("data_prep.output.Manifest.write", 1),  # of the validation split
    ("data_prep.output.Manifest.write", 2),  # of the other
]


@contextmanager
def full_at(disk: Path, place: str, call: int) -> Iterator[None]:
    """Have the disk full when something is called for the `call`-th time."""
    real, calls = pkgutil.resolve_name(place), itertools.count(1)

    def write(*arguments: object) -> object:
        if next(calls) < call:
            return real(*arguments)
        with full(disk):
            return real(*arguments)

    with mock.patch(place, write):
        yield


def finished(out: Path) -> dict[str, str]:
    """SHA-256 of the files that a reader, or the tool itself, takes for whole."""
    return {
        name: digest
        for name, digest in tree_digest(out).items()
        if not Path(name).name.startswith(".") and "/making/" not in name
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `PROGRAM` does, in this process."""
    monkeypatch.setattr(files, "_SMALLEST_PART", 4000)


@pytest.mark.usefixtures("small_parts")
def test_no_file_has_its_name_before_it_is_whole(
    source: Path, undisturbed: Undisturbed, small_disk: Path
) -> None:
    """Whatever finds no room: what is there under its name never changes again."""
    out = small_disk / "out"
    words = arguments(source, out, 1)
    seen: dict[str, str] = {}
    for place, call in WRITES:
        with full_at(small_disk, place, call), pytest.raises(UserError) as error:
            main(words)
        line = str(error.value)
        assert "No space left on device" in line and str(out) in line, (place, line)
        there = finished(out)
        assert all(seen.get(name, digest) == digest for name, digest in there.items()), place
        assert "train/manifest.json" not in there
        seen |= there
    main(words)
    done = finished(out)
    assert all(seen.get(name, digest) == digest for name, digest in done.items())
    assert done == undisturbed.digest


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_leaves_a_finished_output_alone(
    source: Path, undisturbed: Undisturbed, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(source, small_disk / "out", 1))
    with full(small_disk, left=1 << 16):
        with pytest.raises(UserError, match="No space left on device"):
            main(arguments(source, small_disk / "other", 1))
        main(arguments(source, small_disk / "out", 1))
    assert capsys.readouterr().out.endswith("is already complete\n")
    assert tree_digest(small_disk / "out") == undisturbed.digest


@pytest.mark.parametrize(
    ("stage", "workers", "left"), [("tokenizing", 2, 1 << 18), ("packing", 1, 1 << 21)]
)
def test_a_full_disk_is_one_line_and_the_work_goes_on_when_there_is_room(
    source: Path,
    undisturbed: Undisturbed,
    small_disk: Path,
    stage: str,
    workers: int,
    left: int,
) -> None:
    out = small_disk / "out"
    with full(small_disk, left):
        done = program(*command(source, out, workers), timeout=60)
    line = error_line(done)
    assert "No space left on device" in line and str(out) in line, line
    assert "Exception ignored" not in done.stderr
    assert any(out.glob(".work/packed/*")) == (stage == "packing")
    assert program(*command(source, out, 1)).returncode == 0
    assert tree_digest(out) == undisturbed.digest
