"""Damaged shards: a named error before any of one is trained on, or a quarantine that says so."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from i3dist.config import ModelSettings, OnDamage, Settings
from i3dist.data.corpus import Corpus
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.data.manifest import TAR_BLOCK, TAR_RECORD, Manifest, member_stride
from i3dist.data.schedule import lanes_of_rank
from i3dist.errors import UserError
from i3dist.ops.cross_entropy import IGNORE
from i3dist.training.continuing import first_conflict
from tests.conftest import QUICK, losses, program

LANES, K = 4, 3
DAMAGED = 2  # number of the shard that every test here damages


def cut_at_a_member(content: bytearray, other: bytes) -> None:
    """A shorter archive, valid as a tar: its last two members are gone."""
    stride = member_stride(512)
    del content[6 * stride : 8 * stride]
    content += bytes(-len(content) % TAR_RECORD)


def cut_in_place(content: bytearray, other: bytes) -> None:
    """The same size, but a member in the middle makes way for zeros at the end."""
    size = len(content)
    del content[3 * member_stride(512) : 4 * member_stride(512)]
    content += bytes(size - len(content))


def header_byte(content: bytearray, other: bytes) -> None:
    content[2 * member_stride(512) + 5] ^= 1


def payload_bit(content: bytearray, other: bytes) -> None:
    content[5 * member_stride(512) + TAR_BLOCK + 77] ^= 0b1000


def swapped(content: bytearray, other: bytes) -> None:
    assert len(content) == len(other)
    content[:] = other


Damage = Callable[[bytearray, bytes], None]
DAMAGES: list[Damage] = [cut_at_a_member, cut_in_place, header_byte, payload_bit, swapped]
every_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)


def damaged_copy(data: Path, target: Path, damage: Damage, number: int = DAMAGED) -> Path:
    shutil.copytree(data, target)
    shards = [target / "train" / shard.name for shard in Manifest.load(target / "train").shards]
    content = bytearray(shards[number].read_bytes())
    damage(content, shards[number + 1].read_bytes())
    shards[number].write_bytes(content)
    return target


def reader(data: Path, on_damage: OnDamage, lanes: range = range(LANES)) -> LaneWindows:
    train = Corpus.open(data, ModelSettings()).train
    schedule = train.schedule(LANES, K, seed=1, version=1)  # whose epochs end in a window
    return LaneWindows(train.folder, train.manifest, schedule, lanes, on_damage)


def one_epoch(lanes: LaneWindows, workers: int = 0) -> list[Batch]:
    count = lanes.schedule.windows_in_epoch(0)
    return list(windows(lanes, 0, count, workers, torch.device("cpu")))


def first_window_of(lanes: LaneWindows, shard: int) -> int:
    for index in range(lanes.schedule.windows_in_epoch(0)):
        for lane in lanes.lanes:
            if any(place and place[0] == shard for place in lanes.schedule.chunks(index, lane)):
                return index
    raise AssertionError("no lane reads that shard")


@every_damage
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_stops_before_any_of_it_is_handed_over(
    data: Path, tmp_path: Path, damage: Damage, workers: int
) -> None:
    """Every window before the one that first needs it arrives; then one line names it."""
    lanes = reader(damaged_copy(data, tmp_path / "data", damage), "stop")
    handed_over = 0
    with pytest.raises(UserError, match=r"shard-000002\.tar.*differs from its manifest") as error:
        for _ in windows(lanes, 0, 999, workers, torch.device("cpu")):
            handed_over += 1
    assert handed_over == first_window_of(lanes, DAMAGED) > 0
    assert "\n" not in str(error.value) and "data.on_damage=quarantine" in str(error.value)


@every_damage
def test_quarantine_costs_that_shard_and_nothing_else(
    data: Path, tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    """Its chunks are padding without targets; all others stand where they stood, bit for bit."""
    whole = reader(data, "stop")
    lanes = reader(damaged_copy(data, tmp_path / "data", damage), "quarantine")
    lost = 0
    for index, (before, after) in enumerate(zip(one_epoch(whole), one_epoch(lanes), strict=True)):
        for lane in range(LANES):
            for k, place in enumerate(lanes.schedule.chunks(index, lane)):
                if place is None or place[0] != DAMAGED:
                    pairs = zip(before, after, strict=True)
                    assert all(torch.equal(a[lane, k], b[lane, k]) for a, b in pairs)
                    continue
                lost += 1
                assert (after.tokens[lane, k] == lanes.manifest.pad_id).all()
                assert (after.targets[lane, k] == IGNORE).all()
                assert after.depth[lane, k] == 0
    assert lost == lanes.manifest.shards[DAMAGED].chunks == 8
    (line,) = [record.getMessage() for record in caplog.records]
    assert "shard-000002.tar is damaged and quarantined: its 8 chunks of 4,096 tokens" in line


@pytest.mark.parametrize(("workers", "ranks"), [(0, 2), (0, 4), (1, 1), (3, 1), (2, 2)])
def test_the_stream_under_quarantine_is_the_same_for_all_ranks_and_workers(
    data: Path, tmp_path: Path, workers: int, ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    bad = damaged_copy(data, tmp_path / "data", payload_bit)
    alone = one_epoch(reader(bad, "quarantine"))
    caplog.clear()
    shares = [
        one_epoch(reader(bad, "quarantine", lanes_of_rank(LANES, rank, ranks)), workers)
        for rank in range(ranks)
    ]
    assert len(caplog.records) == 1, "the rank that knows says it once"
    for batch, *parts in zip(alone, *shares, strict=True):
        for field, *pieces in zip(batch, *parts, strict=True):
            assert torch.equal(torch.cat(pieces), field)


def test_a_short_last_shard_counts_its_own_tokens(data: Path) -> None:
    manifest = Manifest.load(data / "train")
    counts = [manifest.tokens_in(number) for number in range(len(manifest.shards))]
    assert sum(counts) == manifest.tokens
    assert np.all(np.array(counts[:-1]) == 8 * 512) and 0 < counts[-1] <= 8 * 512


def test_a_missing_shard_stops_under_quarantine_too(data: Path, tmp_path: Path) -> None:
    """It may be missing on one host alone, and then ranks would see different streams."""
    bad = damaged_copy(data, tmp_path / "data", payload_bit)
    (bad / "train" / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002\.tar: shard cannot be read"):
        one_epoch(reader(bad, "quarantine"))


def test_a_run_may_go_on_under_quarantine() -> None:
    stopped = Settings()
    going_on = stopped.with_values(**{"data.on_damage": "quarantine"})
    assert first_conflict(going_on, stopped) is None


def test_a_run_under_quarantine_says_what_it_loses(data: Path, tmp_path: Path) -> None:
    first = Corpus.open(data, ModelSettings()).train.schedule(LANES, 2, seed=0).chunks(0, 0)[0]
    assert first is not None
    bad = damaged_copy(data, tmp_path / "data", payload_bit, first[0])
    words = [f"data.path={bad}", f"run.path={tmp_path / 'run'}", "train.steps=2", "train.seed=0"]
    done = program("launch/train.py", *QUICK, *words, "data.on_damage=quarantine")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is damaged and quarantined: its 8 chunks of 4,096 tokens") == 1
    assert f"shard-{first[0]:06d}.tar" in done.stderr
    assert len(losses(tmp_path / "run")) == 2
