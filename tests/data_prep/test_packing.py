"""Packing in ranges and blocks: byte for byte what one naive loop makes, after any interruption."""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import merge, packing, ranges
from data_prep.arguments import ALONE, TaskShare
from data_prep.pack import Framing, write_shard
from data_prep.packing import PackPlan
from data_prep.shuffle import HASH_END
from i3dist.data.manifest import Shard
from i3dist.data.token_types import TOKEN_TYPES
from i3dist.errors import UserError
from tests.data_prep.corpus import tree_digest
from tests.data_prep.runs import (
    BOS,
    EOS,
    PAD,
    Made,
    halves,
    naive,
    pack,
    pack_all,
    plan_of,
    some,
    write_run,
    write_runs,
)

FRAMING = Framing(4, 3, BOS, EOS, PAD)


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: these tests write thousands of little files."""
    for place in ("data_prep.packing.sync", "i3dist.files.sync"):
        monkeypatch.setattr(place, lambda path: None)


@contextmanager
def constants(**values: int) -> Iterator[None]:
    """Small ranges, workers and groups."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in values.items():
            patched.setattr(merge if hasattr(merge, name) else ranges, name, value)
        yield


def outcome(folder: Path) -> dict[str, str]:
    """What is published, by name: all shards and indexes."""
    return tree_digest(folder / "splits")


def compare(
    documents: list[Made], framing: Framing, range_tokens: int, runs: int, workers: int
) -> None:
    with TemporaryDirectory() as name, constants(RANGE_TOKENS=range_tokens, WORKER_TOKENS=1):
        folder = Path(name)
        expected = naive(folder / "naive", documents, halves(), framing)
        (folder / "runs").mkdir()
        paths = write_runs(folder / "runs", documents, runs, framing.token_type)
        plan = plan_of(folder / "out", paths, documents, halves(), framing)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(packing, "run_jobs", one_after_the_other)
            shards = pack_all(plan, paths, workers)
        assert {name: list(found) for name, found in shards.items()} == expected
        assert outcome(folder / "out") == tree_digest(folder / "naive")


def one_after_the_other(task, jobs, workers, report):  # type: ignore[no-untyped-def]
    """All jobs in this process, the last block first: they do not depend on each other."""
    work = task.start(report)
    return [work(job) for job in reversed(jobs)]


lengths = st.one_of(st.integers(1, 12), st.integers(1, 90))
made_documents = st.lists(
    st.tuples(
        st.one_of(st.integers(0, HASH_END - 1), st.sampled_from([0, 7, HASH_END - 1])),
        st.integers(0, HASH_END - 1),
        st.integers(0, HASH_END - 1),
        lengths,
    ).filter(lambda made: made[:2] not in ((0, 1), (0, 2))),
    max_size=40,
    unique_by=lambda made: made[:2],
).map(
    lambda rows: [
        Made(0, 1, 0, 1000, 3),  # neither split is empty
        Made(0, 2, HASH_END - 1, 1001, 5),
        *(Made(*row[:3], number, row[3]) for number, row in enumerate(rows)),
    ]
)


@settings(deadline=None, max_examples=60)
@given(
    made_documents,
    st.integers(2, 9),
    st.integers(1, 8),
    st.integers(3, 400),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(list(TOKEN_TYPES)),
)
def test_any_cut_gives_the_bytes_of_one_loop(
    documents: list[Made],
    length: int,
    per_shard: int,
    range_tokens: int,
    runs: int,
    workers: int,
    dtype: str,
) -> None:
    """Ranges smaller than a shard, documents longer than shards and ranges, and empty ranges."""
    framing = Framing(length, per_shard, BOS, EOS, PAD, dtype)
    compare(documents, framing, range_tokens, runs, workers)


@pytest.mark.parametrize(
    "documents",
    [
        pytest.param([Made(5, 1, 0, 0, 1), Made(5, 0, HASH_END - 1, 1, 1)], id="two tiny ones"),
        pytest.param(some(60, 9, highs=1), id="all in the first range"),
        pytest.param([*some(5, 9), Made(1 << 61, 0, HASH_END - 1, 9, 2000)], id="one long one"),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_odd_corpora(documents: list[Made], workers: int) -> None:
    compare(documents, FRAMING, 20, 3, workers)
    compare(documents, FRAMING, 1 << 25, 3, workers)


def test_equal_keys_in_one_run_are_ordered_by_their_split(tmp_path: Path) -> None:
    documents = [Made(5, 5, split, split % 89, 4) for split in (9, 3, HASH_END - 1, 4)]
    (tmp_path / "runs").mkdir()
    runs = [write_run(tmp_path / "runs" / "0.arrow", documents)]
    naive(tmp_path / "naive", documents, halves(), FRAMING)
    pack_all(plan_of(tmp_path, runs, documents, halves(), FRAMING), runs)
    assert outcome(tmp_path) == tree_digest(tmp_path / "naive")


def test_processes_make_the_same_bytes(tmp_path: Path) -> None:
    documents = some(300, 60)
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs", documents, 4)
    naive(tmp_path / "naive", documents, halves(), FRAMING)
    with constants(RANGE_TOKENS=500, WORKER_TOKENS=1):
        pack_all(plan_of(tmp_path, runs, documents, halves(), FRAMING), runs, 3)
    assert outcome(tmp_path) == tree_digest(tmp_path / "naive")


@pytest.mark.parametrize("workers", [1, 4])
def test_merged_runs_make_the_same_bytes(tmp_path: Path, workers: int) -> None:
    """They are gone once they are packed, and made again for a range that is damaged later."""
    documents = some(400, 60)
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs", documents, 30)
    naive(tmp_path / "naive", documents, halves(), FRAMING)
    with constants(RANGE_TOKENS=500, WORKER_TOKENS=1 << 20, MAX_RUNS=8, GROUP_RUNS=7):
        plan = plan_of(tmp_path, runs, documents, halves(), FRAMING)
        assert plan.layout.partitions > 3
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(packing, "run_jobs", lambda *_: None)
            pack(plan, runs, workers)
        held = {path: path.stat().st_mtime_ns for path in merged_runs(plan)}
        damaged = next(iter(held))
        damaged.unlink()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(packing.PackTask, "_release", lambda *_: None)
            patched.setattr(packing, "run_jobs", one_after_the_other)
            pack_all(plan, runs, workers)
        again = {path for path in held if path.stat().st_mtime_ns != held[path]}
        assert again == {damaged}, "only what is missing is merged again"
        assert outcome(tmp_path) == tree_digest(tmp_path / "naive")
        plan.work.record(3).unlink()
        assert packed_ranges(plan, runs) == [3]
        left = len(merged_runs(plan))
        assert 0 < left < len(held), "of one partition they are gone"
        for number in range(plan.layout.ranges):
            plan.work.record(number).unlink()
        pack_all(plan, runs, workers)
        assert not merged_runs(plan)
        assert outcome(tmp_path) == tree_digest(tmp_path / "naive")


def merged_runs(plan: PackPlan) -> list[Path]:
    return [path for path in plan.work.merged(ALONE).glob("*.arrow") if path.stat().st_size]


@pytest.mark.parametrize("groups", [1, 8], ids=["whole", "merged"])
def test_tasks_share_ranges_out(tmp_path: Path, groups: int) -> None:
    """Each packs its own ranges only, whatever there are of other tasks, and reads no more."""
    documents = some(400, 60)
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs", documents, 30)
    naive(tmp_path / "naive", documents, halves(), FRAMING)
    with constants(RANGE_TOKENS=500, WORKER_TOKENS=1 << 20, MAX_RUNS=64 // groups, GROUP_RUNS=7):
        plan = plan_of(tmp_path, runs, documents, halves(), FRAMING)
        assert bool(plan.layout.groups) == (groups > 1)
        records: set[Path] = set()
        for task in (TaskShare(3, 3), TaskShare(1, 3), TaskShare(2, 4), TaskShare(2, 3)):
            share = plan.layout.share(task)
            assert 0 < len(share) < plan.layout.ranges
            expected = {plan.work.record(n) for n in share} | records
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(packing, "run_jobs", one_after_the_other)
                pack(plan, runs, 2, task)
            records = set(tmp_path.glob("ranges/*.json"))
            assert records == expected
        assert packed_ranges(plan, runs) == []
        assert outcome(tmp_path) == tree_digest(tmp_path / "naive")


def test_a_count_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    documents = some(100, 60)
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs", documents, 4)
    sound = plan_of(tmp_path, runs, documents, halves(), FRAMING)
    (path,) = tmp_path.glob("counts/*")
    data = path.read_bytes()
    for damaged in (data[:-9], b"", data.replace(data[200:208], b"\1" * 8)):
        path.write_bytes(damaged)
        again = plan_of(tmp_path, runs, documents, halves(), FRAMING)
        assert str(again.splits) == str(sound.splits) and path.read_bytes() == data


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Raise at the `call`-th of all writes and syncs of packing."""
    calls = itertools.count(1)
    with pytest.MonkeyPatch.context() as patched:
        for place in ("data_prep.pack.write_shard", "data_prep.packing.write_whole"):
            patched.setattr(place, _deadly(place, calls, call))
        for place in ("data_prep.packing.sync", "data_prep.records.write_whole"):
            patched.setattr(place, _deadly(place, calls, call))
        patched.setattr("data_prep.pack.IndexWriter.close", _deadly("close", calls, call))
        yield


def _deadly(place: str, calls: Iterator[int], at: int):  # type: ignore[no-untyped-def]
    import pkgutil

    real = pkgutil.resolve_name("data_prep.pack.IndexWriter.close" if place == "close" else place)

    def write(*arguments: object) -> object:
        if next(calls) == at:
            raise Killed
        return real(*arguments)

    return write


def test_killed_at_random_points_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """What is recorded is not packed again."""
    documents = some(200, 40)
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs", documents, 3)
    naive(tmp_path / "naive", documents, halves(), FRAMING)
    rng = random.Random(3)
    with constants(RANGE_TOKENS=300, WORKER_TOKENS=1):
        for attempt in range(6):
            out = tmp_path / f"out-{attempt}"
            plan = plan_of(out, runs, documents, halves(), FRAMING)
            done = 0
            while True:
                try:
                    with killed_at(rng.randint(1, 300)), pytest.MonkeyPatch.context() as patched:
                        patched.setattr(packing, "run_jobs", one_after_the_other)
                        pack_all(plan, runs, rng.randint(1, 4))
                    break
                except Killed:
                    records = len(list(out.glob("ranges/*.json")))
                    assert records >= done
                    done = records
            assert outcome(out) == tree_digest(tmp_path / "naive")


def packed_ranges(plan: PackPlan, runs: list[Path]) -> list[int]:
    """Pack, and tell which ranges that took."""
    blocks: list[range] = []

    def run(task, jobs, workers, report):  # type: ignore[no-untyped-def]
        blocks.extend(jobs)
        return one_after_the_other(task, jobs, workers, report)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "run_jobs", run)
        pack_all(plan, runs)
    return [number for block in blocks for number in block]


def test_only_what_is_missing_or_damaged_is_packed_again(tmp_path: Path) -> None:
    documents = some(200, 40)
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs", documents, 3)
    with constants(RANGE_TOKENS=500, WORKER_TOKENS=1):
        plan = plan_of(tmp_path, runs, documents, halves(), FRAMING)
        count = plan.layout.ranges
        assert packed_ranges(plan, runs) == list(range(count)) and count > 6
        whole = outcome(tmp_path)
        assert packed_ranges(plan, runs) == []
        record = plan.work.recorded(2, plan.digest)
        assert record
        shard = plan.work.split("train") / record.shards["train"][1].name
        for damage in (
            lambda: shard.unlink(),
            lambda: shard.write_bytes(shard.read_bytes()[:-1]),
            lambda: shard.write_bytes(shard.read_bytes()[:-20_000] + bytes(20_000)),
            lambda: plan.work.record(2).write_text("{"),
            lambda: plan.work.record(2).unlink(),
            lambda: plan.work.index(2, "train").write_bytes(b"x"),
        ):
            damage()
            assert packed_ranges(plan, runs) == [2]
            assert outcome(tmp_path) == whole
        shard.touch()  # the same bytes
        assert packed_ranges(plan, runs) == []


def test_a_small_split_does_not_keep_ranges_from_being_recorded(tmp_path: Path) -> None:
    """Its only shard begins in the first range and ends in the last."""
    documents = [made._replace(split=HASH_END - 1) for made in some(200, 40)]
    documents += [Made(high, 0, 0, 900 + high % 9, 2) for high in (1, HASH_END - 1)]
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs", documents, 3)
    naive(tmp_path / "naive", documents, halves(), FRAMING)
    with constants(RANGE_TOKENS=500, WORKER_TOKENS=1):
        plan = plan_of(tmp_path, runs, documents, halves(), FRAMING)
        count = plan.layout.ranges
        last = plan.splits[1].shards(range(count), FRAMING)[-1]
        with pytest.MonkeyPatch.context() as patched:

            def write(folder: Path, number: int, chunks: object, real=write_shard) -> Shard:  # type: ignore[no-untyped-def]
                if number == last:
                    raise Killed
                return real(folder, number, chunks)

            patched.setattr("data_prep.pack.write_shard", write)
            with pytest.raises(Killed):
                pack(plan, runs)
        assert packed_ranges(plan, runs) == [0, count - 2, count - 1] and count > 6
        assert outcome(tmp_path) == tree_digest(tmp_path / "naive")


def test_a_damaged_run_is_one_line(tmp_path: Path) -> None:
    documents = some(20, 40)
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs", documents, 1)
    runs[0].write_bytes(runs[0].read_bytes()[:-9])
    with pytest.raises(UserError, match=r"0\.arrow is damaged: delete .* and make it again"):
        plan_of(tmp_path, runs, documents, halves(), FRAMING)
