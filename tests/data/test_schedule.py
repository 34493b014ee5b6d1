"""The stream is a pure function of seed, epoch, lanes and shard sizes; ranks only share it out."""

from collections import Counter
from dataclasses import replace
from itertools import chain, islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.data.schedule import (
    EpochSchedule,
    Place,
    Schedule,
    fixed_subset,
    lanes_of_rank,
    permutation,
)
from i3dist.errors import UserError


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, ...]:
    """Chunks of each shard: all alike but the last."""
    full = draw(st.integers(1, 9))
    return (full,) * (draw(st.integers(1, 12)) - 1) + (draw(st.integers(1, full)),)


@st.composite
def epoch_schedules(draw: st.DrawFn) -> EpochSchedule:
    lanes, window, seed = (draw(st.integers(low, high)) for low, high in ((1, 8), (1, 5), (0, 99)))
    return EpochSchedule(draw(sizes()), lanes, window, seed)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    lanes, window, seed = (draw(st.integers(low, high)) for low, high in ((1, 8), (1, 5), (0, 99)))
    return Schedule(draw(sizes()), lanes, window, seed)


def read_of_lane(schedule: Schedule, windows: int, lane: int) -> list[Place | None]:
    return [place for index in range(windows) for place in schedule.chunks(index, lane)]


@given(schedule=schedules(), windows=st.integers(1, 40))
@settings(deadline=None)
def test_no_lane_ever_idles(schedule: Schedule, windows: int) -> None:
    """So every chunk of every step is filled, also at an epoch's end and with few shards."""
    for lane in range(schedule.lanes):
        assert None not in read_of_lane(schedule, windows, lane)


@given(schedule=schedules(), windows=st.integers(1, 30))
@settings(deadline=None)
def test_lanes_take_turns_in_one_sequence_of_whole_epochs(schedule: Schedule, windows: int) -> None:
    """Lane g's shards are places g, g + G, ... of all epochs' permutations put together."""
    count, lanes = len(schedule.shard_chunks), schedule.lanes
    epochs = range(2 + windows * schedule.window * lanes // count)
    sequence = [shard for epoch in epochs for shard in permutation(schedule.seed, epoch, count)]
    for lane in range(lanes):
        expected = (
            (shard, chunk)
            for shard in sequence[lane::lanes]
            for chunk in range(schedule.shard_chunks[shard])
        )
        read = read_of_lane(schedule, windows, lane)
        assert read == list(islice(expected, len(read)))


@given(schedule=schedules(), epochs=st.integers(1, 3))
@settings(deadline=None)
def test_every_chunk_is_read_once_an_epoch(schedule: Schedule, epochs: int) -> None:
    """When all lanes are through the first epochs, each has read its part of them and no more."""
    count, lanes = len(schedule.shard_chunks), schedule.lanes
    read: Counter[Place | None] = Counter()
    for lane in range(lanes):
        shards = len(range(lane, epochs * count, lanes))
        chunks = chain.from_iterable(schedule.chunks(index, lane) for index in range(10**6))
        for _ in range(shards):  # whole ones
            place = next(chunks)
            assert place is not None
            size = schedule.shard_chunks[place[0]]
            read.update([place, *islice(chunks, size - 1)])
    chunks_of = enumerate(schedule.shard_chunks)
    assert read == Counter({(s, c): epochs for s, size in chunks_of for c in range(size)})


def test_both_versions_are_fixed_for_all_time() -> None:
    """A run that continues must read on where it was."""
    shards = (2, 2, 2, 2, 1)
    first, second = EpochSchedule(shards, 2, 2, 7), Schedule(shards, 2, 2, 7)
    assert [first.chunks(3, lane) for lane in (0, 1)] == [[(3, 0), (3, 1)], [(4, 0), (2, 0)]]
    assert [second.chunks(3, lane) for lane in (0, 1)] == [[(2, 0), (2, 1)], [(1, 0), (1, 1)]]


def epoch_of_lane(schedule: EpochSchedule, epoch: int, lane: int) -> list[Place | None]:
    first = sum(schedule.windows_in_epoch(e) for e in range(epoch))
    count = schedule.windows_in_epoch(epoch)
    return [place for i in range(first, first + count) for place in schedule.chunks(i, lane)]


@given(schedule=epoch_schedules(), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_every_chunk_is_read_exactly_once_an_epoch(schedule: EpochSchedule, epoch: int) -> None:
    read = Counter(
        place
        for lane in range(schedule.lanes)
        for place in epoch_of_lane(schedule, epoch, lane)
        if place is not None
    )
    sizes = schedule.shard_chunks
    assert read == Counter((s, c) for s in range(len(sizes)) for c in range(sizes[s]))


@given(schedule=epoch_schedules(), epoch=st.integers(0, 2))
@settings(deadline=None)
def test_a_lane_reads_whole_shards_in_order_then_idles(schedule: EpochSchedule, epoch: int) -> None:
    for lane in range(schedule.lanes):
        read = epoch_of_lane(schedule, epoch, lane)
        busy = [place for place in read if place is not None]
        assert read == busy + [None] * (len(read) - len(busy))
        for before, after in pairwise(busy):
            same_shard = after == (before[0], before[1] + 1)
            next_shard = before[1] + 1 == schedule.shard_chunks[before[0]] and after[1] == 0
            assert same_shard or next_shard


@given(schedule=st.one_of(schedules(), epoch_schedules()), index=st.integers(0, 60))
@settings(deadline=None)
def test_a_window_needs_no_replay(schedule: Schedule | EpochSchedule, index: int) -> None:
    """A schedule asked for one window only gives what one asked for all of them gives."""
    asked_before = [schedule.chunks(i, 0) for i in range(index + 1)]
    fresh = replace(schedule)
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


@given(held=st.lists(st.integers(1, 9), min_size=1, max_size=9), chunks=st.integers(1, 60))
def test_the_validation_subset_is_whole_shards_and_enough(held: list[int], chunks: int) -> None:
    subset = fixed_subset(held, chunks, seed=0)
    chosen = [held[i] for i in subset]
    assert sum(chosen) >= min(chunks, sum(held))
    assert sum(chosen[:-1]) < chunks
    assert len(set(subset)) == len(subset)
