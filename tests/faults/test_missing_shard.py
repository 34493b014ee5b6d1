"""A shard that is missing: found before the first step; one that goes later stops the whole job."""

import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.schedule import lanes_of_rank
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.training.startup import preflight
from tests.conftest import QUICK, ROOT, environment, error_line, free_port, program, run_ranks

LANES, K = 4, 2


def later_shard_of_rank_1(data: Path) -> Path:
    """A shard that a lane of rank 1 opens after some steps, and no lane of rank 0 in that time."""
    train = Corpus.open(data, ModelSettings()).train
    schedule = train.schedule(LANES, K, seed=0)
    lane = lanes_of_rank(LANES, 1, 2)[0]
    read = [place for window in range(30) for place in schedule.chunks(window, lane) if place]
    number = list(dict.fromkeys(shard for shard, _ in read))[5]
    return train.folder / train.manifest.shards[number].name


def test_it_is_found_before_the_first_step_and_ends_every_rank(data: Path, tmp_path: Path) -> None:
    """Of either split, also where damaged shards are quarantined; nothing is made of the run."""
    bad, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, bad)
    (bad / "valid" / "shard-000001.tar").unlink()
    words = [*QUICK, f"data.path={bad}", f"run.path={run}", "data.on_damage=quarantine"]
    result = run_ranks(*words)
    line = error_line(result)
    assert f"{bad / 'valid' / 'shard-000001.tar'}: shard cannot be read" in line
    assert "step " not in result.stdout and not run.exists()


def test_a_program_that_evaluates_finds_it_too(data: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "valid" / "shard-000001.tar").unlink()
    words = ["--checkpoint", whole, "--data", tmp_path / "data", "--device", "cpu"]
    line = error_line(program("launch/evaluate.py", *words))
    assert "shard-000001.tar: shard cannot be read" in line


def test_where_it_is_missing_on_one_host_every_rank_hears_of_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank of each host looks, and the line says which host it was."""
    shutil.copytree(data, tmp_path / "data")
    corpus = Corpus.open(tmp_path / "data", ModelSettings())
    (corpus.train.folder / "shard-000004.tar").unlink()
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    job = replace(Job.detect({}), rank=2, world_size=4, local_world_size=2)
    with pytest.raises(UserError, match=r"shard-000004\.tar: .* \(on node7\)$"):
        preflight(corpus, "stop", job)
    preflight(corpus, "stop", replace(job, rank=3, local_rank=1))  # hears by the exchange


def test_every_rank_stops_within_seconds_and_one_says_why(data: Path, tmp_path: Path) -> None:
    """It goes while the job runs, on one host say."""
    bad = tmp_path / "data"
    shutil.copytree(data, bad)
    missing = later_shard_of_rank_1(bad)
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
            missing.unlink(missing_ok=True)
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
