"""A preflight of real processes: two ranks, each with a host name of its own. 10 s of CPU."""

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.preflight.facts import free_bytes
from i3dist.preflight.measure import token_in
from i3dist.training.preflight import wanted
from tests.conftest import QUICK, ROOT, environment, free_port

ALONE = Job(0, 1, 0, 1, "127.0.0.1", 1, "python")
NAMED = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')


def other_host(folder: Path) -> Path:
    """A checkout that is not quite this one: a comment more, and another engine file."""
    for name in ("i3dist", "launch", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "i3dist" / "model" / "lm.py").open("a") as file:
        file.write("# not committed\n")
    engine = json.loads((ROOT / "configs" / "zero2.json").read_text())
    engine["zero_optimization"]["reduce_bucket_size"] = 4321
    (folder / "configs" / "zero2.json").write_text(json.dumps(engine))
    return folder


def start(host: str, folder: Path, rank: int, port: int, *words: object) -> subprocess.Popen[str]:
    """Start one rank of two on a host of this name."""
    environ = environment() | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(folder)}
    environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name leads nowhere
    Job(rank, 2, 0, 1, "127.0.0.1", port, "torchrun").export(environ)
    command = [*NAMED, host, sys.executable, *words]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run([*NAMED, "x", "true"]).returncode != 0,
    reason="to give a process a host name takes root",
)
def test_every_rank_refuses_a_host_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    """train.py refuses before it makes a folder; the table names all that is wrong on node2."""
    places, port = (ROOT, other_host(tmp_path / "node2")), free_port()
    words = ["launch/train.py", "--deepspeed", "configs/zero2.json", *QUICK, f"data.path={data}"]
    ranks = [
        start(f"node{rank + 1}", place, rank, port, *words, "run.path=.preflight-test/run")
        for rank, place in enumerate(places)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    table, error = said[0]
    for line in (
        "node2: other code (commit unknown",
        "node2: another engine file than node1",
        "node2: run.path=.preflight-test/run is not the folder in which rank 0 on node1 writes",
    ):
        assert f"preflight: {line}" in table
    assert "clocks" in table and "GB/s" in table and "step" not in table
    assert error.startswith("error: preflight: node2: other code")
    assert "(and 2 more, above); --no-preflight" in error
    assert said[1] == ("", ""), "rank 0 has spoken for both"
    assert not (ROOT / ".preflight-test").exists()


def test_several_hosts_begin_with_it_unless_it_is_skipped() -> None:
    hosts = Job(3, 4, 1, 2, "127.0.0.1", 1, "slurm")
    assert wanted(Namespace(no_preflight=False), hosts)
    assert not wanted(Namespace(no_preflight=True), hosts)
    assert not wanted(Namespace(no_preflight=False), ALONE)


def test_the_token_leaves_nothing_behind_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a" / "b")
    with token_in(tmp_path / "link", ALONE) as (read, unwritable):
        assert read is not None and unwritable is None
        assert len(list((tmp_path / "disk" / "a" / "b").iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"link"}


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    began = time.monotonic()
    with token_in(tmp_path / "file" / "run", ALONE) as (read, unwritable):
        assert read is None and unwritable is not None and "file" in unwritable
    assert time.monotonic() - began < 1


def test_a_rank_that_can_read_the_folder_and_not_write_there_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one host mounts a file system to be read only."""
    (tmp_path / "first").write_text("word")
    monkeypatch.setattr(collectives, "gather_objects", lambda _: [("first", None)])
    second = replace(ALONE, rank=1, world_size=2)
    with token_in(tmp_path, second) as (read, unwritable):
        assert read == "word" and unwritable is None
    monkeypatch.setattr(Path, "touch", mock.Mock(side_effect=OSError(30, "Read-only")))
    with token_in(tmp_path, second) as (read, unwritable):
        assert read == "word" and unwritable == "Read-only"
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_room_is_that_of_the_disk_that_a_new_folder_will_be_on(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.1
    )
