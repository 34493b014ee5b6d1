"""Run by each of two ranks: losses of both engines, from a start and from each other's state."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.engine import setup
from i3dist.engine.interface import Engine
from tests.engine.steps import ENGINES, backward, batch, build

LANES = 4


def losses(engine: Engine, rank: int, seeds: range, lr: float) -> list[float]:
    """Sums of losses of the job's steps; a rank has half of the lanes, in two micro-batches."""
    rows, sums = slice(LANES // 2 * rank, LANES // 2 * (rank + 1)), []
    for seed in seeds:
        whole = batch(LANES, seed)
        mine = tuple(part[rows] for part in whole)
        loss = backward(engine, mine, 1, targets=whole[0].numel())
        sums += engine.step(lr, loss.view(1)).sums
    return sums


def whole_state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """What all ranks' snapshots hold together, as a checkpoint's reader joins it."""
    parts = [
        part for share in collectives.gather_objects(list(engine.snapshot())) for part in share
    ]
    parts.sort(key=lambda part: part.start)
    return {
        name: {
            key: torch.cat([part.tensors[key] for part in parts if part.name == name])
            for key in next(part.tensors for part in parts if part.name == name)
        }
        for name in {part.name for part in parts}
    }


def close(got: list[float], want: list[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance * b for a, b in zip(got, want, strict=True))


def check(rank: int, optimizer: str, bf16: bool, steps: int) -> None:
    """To 2e-3 in bf16: DeepSpeed's own reduction rounds each sum over ranks to bf16."""
    lr, tolerance = {"adamw": 1e-2, "lion": 1e-3}[optimizer], 2e-3 if bf16 else 1e-4

    def fresh(kind: Callable[..., Engine], seed: int = 0) -> Engine:
        return build(2, bf16, seed=seed, kind=kind, clip=0.5, optimizer=optimizer)

    ours, stock = (fresh(kind) for kind in ENGINES.values())
    want, got = (losses(engine, rank, range(steps), lr) for engine in (ours, stock))
    assert close(got, want, tolerance), (optimizer, bf16, got, want)
    states = [whole_state(engine) for engine in (ours, stock)]
    later = range(steps, steps + 1)
    want = losses(ours, rank, later, lr)
    for kind, state in itertools.product(ENGINES.values(), states):
        continued = fresh(kind, seed=1)
        continued.load(state, steps)
        got = losses(continued, rank, later, lr)
        bound = 0.0 if kind is ENGINES["zero2"] and state is states[0] else 10 * tolerance
        assert close(got, want, bound), (optimizer, bf16, kind, got, want)


def main() -> None:
    job = Job.detect()
    torch.set_num_threads(1)
    setup.start(job)
    check(job.rank, "adamw", bf16=True, steps=20)
    check(job.rank, "lion", bf16=False, steps=2)
    collectives.leave_group()
    print(f"rank {job.rank} agrees", flush=True)


if __name__ == "__main__":
    main()
