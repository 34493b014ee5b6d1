"""Ranks that torchrun starts again on one host, or does not. 30 s."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

# Ranks form a group beside that of all, as DeepSpeed does, and the first attempt asks for another.
# In that one rank 1 is late, so that rank 0 would find where rank 1 listened before.
RANK = """
import os, sys, time
import torch
from torch import distributed
from i3dist.distributed.job import Job
from i3dist.engine import setup
job, attempt = Job.detect(), os.environ["TORCHELASTIC_RESTART_COUNT"]
peers = setup.start(job)
if attempt == "1" and job.rank == 1:
    time.sleep(1)
group = distributed.new_group([0, 1])
total = torch.ones(1)
distributed.all_reduce(total, group=group)
print(f"attempt {attempt}: {total.item():.0f}", flush=True)
distributed.barrier()
peers.close()
os._exit(75 if attempt == "0" else 0)
"""


@pytest.mark.parametrize("options", [[], ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]])
def test_ranks_that_are_started_again_find_each_other(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    words = ["launch/torchrun.py", "--nproc-per-node=2", "--max-restarts=1", *options]
    result = subprocess.run(
        [sys.executable, *words, tmp_path / "rank.py"],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = sorted(re.findall(r"attempt \d+: \d", result.stdout))  # two ranks may share a line
    assert said == ["attempt 0: 2"] * 2 + ["attempt 1: 2"] * 2


# Says that it is there, and ends with 75 when it is told to stop.
TOLD = """
import signal, sys
signal.signal(signal.SIGHUP, lambda *_: sys.exit(75))
print("here", flush=True)
signal.pause()
"""


def test_ranks_that_are_told_to_stop_are_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(TOLD)
    words = ["launch/torchrun.py", "--nproc-per-node=1", "--max-restarts=3", tmp_path / "rank.py"]
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environ, stdout=pipe, stderr=pipe, text=True
    ) as agent:
        assert agent.stdout is not None and agent.stdout.readline() == "here\n"
        agent.send_signal(signal.SIGHUP)
        try:
            said, _ = agent.communicate(timeout=60)
        finally:
            agent.kill()
    assert (agent.returncode, said) == (75, "")
