"""Every rank learns the figures of all; the slowest and the fastest are told where they differ."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i3dist.config import Settings
from i3dist.data.lanes import StepCounts
from i3dist.distributed.job import Job
from i3dist.tracking import stragglers
from i3dist.tracking.interval import Figures, Interval
from i3dist.tracking.metrics import measure
from i3dist.tracking.report import straggler_line
from i3dist.tracking.stragglers import RankFigures, Stragglers
from i3dist.training.startup import decide

ONE = torch.tensor(1.0)
SECONDS = st.floats(0.0625, 128, width=32)
STEPS = st.integers(1, 5).flatmap(
    lambda ranks: st.lists(
        st.lists(SECONDS, min_size=ranks, max_size=ranks), min_size=2, max_size=4
    )
)


@given(steps=STEPS)
def test_each_rank_knows_the_means_of_all(steps: list[list[float]]) -> None:
    """Of all steps but the last, whose times travel with the next; alone it knows the last, too."""
    ranks = len(steps[0])
    with pytest.MonkeyPatch.context() as patch:
        hosts = [f"node{rank // 2}" for rank in range(ranks)]
        patch.setattr(stragglers, "gather_objects", lambda _: hosts)
        gpus = iter([(1000.0 + rank, 50.0 + rank) for rank in range(ranks)] * 2)
        patch.setattr(stragglers, "_gpu_state", lambda: next(gpus))
        all_ranks = [
            Stragglers(Job(rank, ranks, rank, ranks, "host", 1, "slurm")) for rank in range(ranks)
        ]
        for seconds in steps:
            summed = torch.stack([rank.share(ONE) for rank in all_ranks]).sum(0).tolist()
            for rank, own in zip(all_ranks, seconds, strict=True):
                rank.add(summed, own)
        known = steps[:-1] if ranks > 1 else steps[1:]
        for one in all_ranks:
            found = one.figures()
            assert [(f.rank, f.host) for f in found] == list(enumerate(hosts))
            for f in found:
                mean = sum(step[f.rank] for step in known) / len(known)
                assert f.seconds == pytest.approx(mean, rel=1e-5)
                assert (f.clock, f.temperature) == (1000.0 + f.rank, 50.0 + f.rank)


def figures(*ranks: RankFigures) -> Figures:
    counted = Interval()
    counted.add(3.0, StepCounts(ONE, ONE, ONE, ONE), 1.0)
    settings = decide(Settings().with_values(**{"train.steps": 1000}), 1, 32_000)
    return dataclasses.replace(counted.figures(7, settings, 1, 0), ranks=ranks)


def test_slowest_and_fastest_are_named_with_their_hosts_if_they_differ_by_a_tenth() -> None:
    fast = RankFigures(0, "node1", 0.2, 1980.0, 61.0)
    slow = RankFigures(3, "node2", 0.22 + 1e-9, 1410.0, 87.0)
    one, two = figures(fast, slow), figures(fast, dataclasses.replace(slow, seconds=0.219))
    assert straggler_line(one) == (
        "rank    7/1000  slowest 3 on node2: 220 ms, 1410 MHz, 87 C  "
        "fastest 0 on node1: 200 ms, 1980 MHz, 61 C"
    )
    assert straggler_line(two) is None and straggler_line(figures()) is None
    found = measure(one)
    assert (found["slowest_rank"], found["fastest_compute"]) == (3, 0.2)
    assert (found["gpu_clock"], found["gpu_temperature"]) == (1410.0, 87.0)
    alone = measure(figures(RankFigures(0, "laptop", 0.5, 0.0, 0.0)))
    assert alone["slowest_compute"] == 0.5
    assert not {"slowest_rank", "gpu_clock", "gpu_temperature"} & set(alone)
