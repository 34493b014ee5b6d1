"""A shard that one rank alone misses: the whole job stops at once, and that rank says why."""

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.schedule import lanes_of_rank
from tests.conftest import QUICK, ROOT, environment, free_port

LANES, K = 4, 2


def second_shard_of_rank_1(data: Path) -> Path:
    """A shard that a lane of rank 1 opens after some steps, and no lane of rank 0 in that time."""
    train = Corpus.open(data, ModelSettings()).train
    schedule = train.schedule(LANES, K, seed=0)
    lane = lanes_of_rank(LANES, 1, 2)[0]
    read = [place for window in range(9) for place in schedule.chunks(window, lane) if place]
    number = next(shard for shard, _ in read if shard != read[0][0])
    return train.folder / train.manifest.shards[number].name


def test_every_rank_stops_within_seconds_and_one_says_why(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "data"
    shutil.copytree(data, bad)
    missing = second_shard_of_rank_1(bad)
    missing.unlink()
    words = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    words += ["launch/train.py", *QUICK, f"data.path={bad}", f"run.path={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [*words, "train.steps=99", "train.seed=0"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    guard = threading.Timer(200, process.kill)
    guard.start()
    lines, last_step = [], 0.0
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("step "):
            last_step = time.monotonic()
    status = process.wait()
    guard.cancel()
    output = "\n".join(lines)
    assert last_step, f"training began: {output[-3000:]}"
    assert time.monotonic() - last_step < 30
    assert status not in (0, -9), output[-3000:]
    assert "Traceback" not in output
    told = [line for line in lines if "shard cannot be read" in line]
    assert len(told) == 1 and missing.name in told[0]
    assert re.match(r"\[rank 1\] error: .*restore it or make the data again", told[0])
