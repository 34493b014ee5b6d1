"""SIGKILL of one of two ranks at random moments of saving: the last published checkpoint is whole.

About 20 s.
"""

import random
import socket
import time
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as torch_dist

from i3dist.checkpoint import store, verify, writer
from i3dist.checkpoint.format import Fragment, read_state
from i3dist.checkpoint.reader import OptimizerReader, read_lanes
from i3dist.config import CheckpointSettings, ModelSettings
from i3dist.distributed.job import Job
from i3dist.files import clear_partials
from i3dist.model.state import LaneState
from i3dist.optim import adamw
from tests.checkpoint.test_format import state_of
from tests.model.conftest import SMALL

KILLS = 12
ELEMENTS = 400_000  # of a rank: writing and hashing takes as long as meeting does
ALONE = Job.detect({})
EMPTY = LaneState.empty(1, ModelSettings.model_validate(SMALL), torch.device("cpu"), torch.half)


def save(folder: Path, job: Job, step: int) -> None:
    """A checkpoint all of whose tensors hold the step."""
    tensors = {key: torch.full((ELEMENTS,), float(step)) for key in ("weight", *adamw.STATES)}
    lanes = EMPTY.map(lambda part: torch.full(part.shape, float(step), dtype=part.dtype))
    part = Fragment("w", job.rank * ELEMENTS, tensors)
    owned = (range(job.rank, job.rank + 1), lanes)
    writer.save(folder, job, state_of(step), [part], owned, CheckpointSettings(keep=2), b"{}")


def save_on_and_on(folder: Path, rank: int, port: int, first: int, said: Connection) -> None:
    """One of two ranks: saves step after step, and says each that is published."""
    job = Job(rank, 2, rank, 2, "127.0.0.1", port, "deepspeed")
    job.export()
    torch_dist.init_process_group("gloo")
    for step in range(first, first + 10_000):
        save(folder, job, step)
        said.send(step)


def killed_at_random(folder: Path, chance: random.Random, first: int) -> int:
    """Start both ranks, kill one somewhere, end the other; returns the last step that was said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hear, say = Pipe(duplex=False)
    ranks = [
        get_context("fork").Process(target=save_on_and_on, args=(folder, rank, port, first, say))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    assert hear.poll(60), "the first checkpoint is published"
    time.sleep(chance.uniform(0, 0.4))
    ranks[chance.randrange(2)].kill()
    time.sleep(chance.uniform(0, 0.1))  # the other one goes on for as long as it can
    for process in ranks:
        process.kill()
        process.join(30)
    published = first
    while hear.poll():
        published = max(published, hear.recv())
    hear.close()
    say.close()
    return published


def test_the_last_published_checkpoint_is_whole(tmp_path: Path) -> None:
    chance = random.Random(5)
    unfinished = published = 0
    for _ in range(KILLS):
        published = killed_at_random(tmp_path, chance, published + 1)
        path, refused = store.first_whole(
            store.candidates(tmp_path), lambda path: verify.fault(path, ALONE)
        )
        assert path is not None and not refused, "what latest names is whole"
        step = read_state(path).step
        assert step in (published, published + 1)
        read = OptimizerReader(path)["w"]
        assert all(t.shape == (2 * ELEMENTS,) and t.eq(step).all() for t in read.values())
        lanes = read_lanes(path, range(2), EMPTY)
        assert lanes.latents.eq(step).all()
        unfinished += len(list(tmp_path.glob(".*.partial")))
        clear_partials(tmp_path)
        assert not list(tmp_path.glob(".*"))
        published = step
    assert unfinished > KILLS // 3, "most kills strike while something is unfinished"
