"""The stream is a pure function of seed, epoch, lanes and shard sizes; ranks only share it out."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.data.schedule import Schedule, fixed_subset, lanes_of_rank, permutation
from i3dist.errors import UserError


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    full = draw(st.integers(1, 9))
    shards = draw(st.integers(1, 12))
    last = draw(st.integers(1, full))
    sizes = (full,) * (shards - 1) + (last,)
    return Schedule(
        sizes, draw(st.integers(1, 8)), draw(st.integers(1, 5)), draw(st.integers(0, 99))
    )


def epoch_of_lane(schedule: Schedule, epoch: int, lane: int) -> list[tuple[int, int] | None]:
    first = sum(schedule.windows_in_epoch(e) for e in range(epoch))
    count = schedule.windows_in_epoch(epoch)
    return [place for i in range(first, first + count) for place in schedule.chunks(i, lane)]


@given(schedule=schedules(), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_every_chunk_is_read_exactly_once_an_epoch(schedule: Schedule, epoch: int) -> None:
    read = Counter(
        place
        for lane in range(schedule.lanes)
        for place in epoch_of_lane(schedule, epoch, lane)
        if place is not None
    )
    sizes = schedule.shard_chunks
    assert read == Counter((s, c) for s in range(len(sizes)) for c in range(sizes[s]))


@given(schedule=schedules(), epoch=st.integers(0, 2))
@settings(deadline=None)
def test_a_lane_reads_whole_shards_in_order_then_idles(schedule: Schedule, epoch: int) -> None:
    for lane in range(schedule.lanes):
        read = epoch_of_lane(schedule, epoch, lane)
        busy = [place for place in read if place is not None]
        assert read == busy + [None] * (len(read) - len(busy))
        for before, after in pairwise(busy):
            same_shard = after == (before[0], before[1] + 1)
            next_shard = before[1] + 1 == schedule.shard_chunks[before[0]] and after[1] == 0
            assert same_shard or next_shard


@given(schedule=schedules(), index=st.integers(0, 60))
@settings(deadline=None)
def test_a_window_needs_no_replay(schedule: Schedule, index: int) -> None:
    """A schedule asked for one window only gives what one asked for all of them gives."""
    asked_before = [schedule.chunks(i, 0) for i in range(index + 1)]
    fresh = Schedule(schedule.shard_chunks, schedule.lanes, schedule.window, schedule.seed)
    assert fresh.chunks(index, 0) == asked_before[index]


@given(lanes=st.integers(1, 48), data=st.data())
def test_ranks_share_the_lanes_out(lanes: int, data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from([n for n in range(1, lanes + 1) if lanes % n == 0]))
    shared = [lane for rank in range(ranks) for lane in lanes_of_rank(lanes, rank, ranks)]
    assert shared == list(range(lanes))


def test_indivisible_lanes_name_the_legal_ranks() -> None:
    with pytest.raises(UserError, match=r"train.lanes=12 .* 5 ranks; .*: 1, 2, 3, 4, 6, 12$"):
        lanes_of_rank(12, 0, 5)


def test_permutation_is_fixed_for_all_time() -> None:
    """A run that continues on another machine or library version must read the same stream."""
    assert permutation(0, 0, 8) == [7, 0, 1, 5, 3, 4, 2, 6]
    assert permutation(0, 1, 8) != permutation(0, 0, 8) != permutation(1, 0, 8)


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 9), count=st.integers(0, 200))
def test_permutation_permutes(seed: int, epoch: int, count: int) -> None:
    assert sorted(permutation(seed, epoch, count)) == list(range(count))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9), chunks=st.integers(1, 60))
def test_the_validation_subset_is_whole_shards_and_enough(sizes: list[int], chunks: int) -> None:
    subset = fixed_subset(sizes, chunks, seed=0)
    held = [sizes[i] for i in subset]
    assert sum(held) >= min(chunks, sum(sizes))
    assert sum(held[:-1]) < chunks
    schedule = Schedule(tuple(sizes), 3, 2, 0, subset)
    read = {place[0] for lane in range(3) for place in epoch_of_lane(schedule, 0, lane) if place}
    assert read == set(subset)
