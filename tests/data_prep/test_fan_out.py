"""How packing grows with the corpus: files opened, memory, and steps; planned without any data."""

from collections import Counter
from pathlib import Path

import pytest

from data_prep import merge, packing, ranges, runs
from data_prep.arguments import TaskShare
from data_prep.merge import MAX_RUNS, Layout
from data_prep.pack import Framing
from data_prep.ranges import Partition, blocks, number_of_ranges
from i3dist.data.manifest import MAX_SHARDS, archive_size
from tests.data_prep.runs import BOS, EOS, PAD, halves, pack_all, plan_of, some, write_runs

BILLION = 10**9
SIZES = [10 * BILLION, 40 * BILLION, 160 * BILLION, 1_300 * BILLION]
RUN = 15_000_000
"""Tokens of a run: those of 64 MiB of text."""
SHARD = 2048 * 512


def simulated(tokens: int, workers: int, tasks: int = 1) -> dict[str, int]:
    """What packing so many tokens takes, by the planner's own functions."""
    count = -(-tokens // RUN)
    layout = Layout.of(tokens, count)
    held = layout.groups or count
    names = [Path("run")] * held
    partitions = [Partition(layout.partition(n), names) for n in range(layout.partitions)]
    shares = [layout.share(TaskShare(n + 1, tasks)) for n in range(tasks)]
    jobs = [
        job
        for share in shares
        for job in blocks(partitions, share, tokens * len(share) // layout.ranges, workers)
    ]
    merging = count * tasks + layout.groups * layout.partitions if layout.groups else 0
    return {
        "shards": -(-tokens // SHARD),
        "opens": count + merging + held * len(jobs),
        "maps": max(held, merge.GROUP_RUNS if layout.groups else 0),
        "slices": held * layout.ranges + merge.GROUP_RUNS * layout.partitions * layout.groups,
        "jobs": len(jobs),
        "merged": tokens // (layout.groups * layout.partitions) if layout.groups else 0,
    }


@pytest.mark.parametrize(("workers", "tasks"), [(2, 1), (16, 1), (64, 1), (16, 4), (16, 32)])
@pytest.mark.parametrize("tokens", SIZES)
def test_opens_are_a_small_multiple_of_the_files_made(
    tokens: int, workers: int, tasks: int
) -> None:
    found = simulated(tokens, workers, tasks)
    assert found["shards"] <= MAX_SHARDS
    assert found["opens"] < 5 * found["shards"]
    assert found["slices"] < 50 * found["shards"], "a slice takes 40 us, packing a shard 20 ms"
    assert found["jobs"] >= min(workers, tokens // ranges.WORKER_TOKENS)
    assert found["maps"] <= MAX_RUNS < 65_530, "more files cannot be mapped by default"


def test_ten_billion_tokens_make_fewer_than_10000_files() -> None:
    assert simulated(10 * BILLION, 2)["shards"] == 9_537


@pytest.mark.parametrize("tokens", SIZES)
def test_a_process_needs_less_than_a_gigabyte(tokens: int) -> None:
    """A range, or a merged run, is in memory twice, and its pages in the file once."""
    most = max(tokens / number_of_ranges(tokens), simulated(tokens, 1)["merged"])
    documents = most / 100
    columns = 8 * documents * (3 + 8)  # keys, splits and offsets, and what is computed of them
    assert 2 * most * 3 + columns + 3 * archive_size(2048, 512) < 500e6


def test_the_real_opens_are_those_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1, 4 and 16 times a tiny corpus, with constants as tiny; the last one is merged."""
    opened: Counter[str] = Counter()

    def init(self: runs.Run, path: Path, real=runs.Run.__init__) -> None:  # type: ignore[no-untyped-def]
        opened[path.suffix] += 1
        real(self, path)

    def here(task, jobs, workers, report):  # type: ignore[no-untyped-def]
        return list(map(task.start(report), jobs))

    monkeypatch.setattr(runs.Run, "__init__", init)
    for module in (merge, packing):
        monkeypatch.setattr(module, "run_jobs", here)
    monkeypatch.setattr(ranges, "RANGE_TOKENS", 400)
    monkeypatch.setattr(ranges, "WORKER_TOKENS", 1)
    monkeypatch.setattr(merge, "MAX_RUNS", 24)
    monkeypatch.setattr(merge, "GROUP_RUNS", 12)
    monkeypatch.setattr("i3dist.files.sync", lambda path: None)
    monkeypatch.setattr("data_prep.packing.sync", lambda path: None)
    ratios = []
    for times in (1, 4, 16):
        folder = tmp_path / str(times)
        (folder / "runs").mkdir(parents=True)
        documents = some(100 * times, 30)
        paths = write_runs(folder / "runs", documents, 5 * times)
        framing = Framing(8, 4, BOS, EOS, PAD)
        opened.clear()
        plan = plan_of(folder, paths, documents, halves(), framing)
        shards = pack_all(plan, paths, 4)
        held = plan.layout.groups or len(paths)
        parts = [Partition(plan.layout.partition(n), []) for n in range(plan.layout.partitions)]
        jobs = blocks(parts, range(plan.layout.ranges), 1 << 40, 4)
        merging = len(paths) if plan.layout.groups else 0
        most = len(paths) + merging + held * len(jobs)
        assert most - len(jobs) <= opened.total() <= most, "a merged run may hold nothing"
        ratios.append(opened.total() / sum(map(len, shards.values())))
    assert plan.layout.partitions > 1
    assert max(ratios) < 2 * ratios[0]
