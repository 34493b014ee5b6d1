"""The ledger: what it hashes, what it keeps when a run continues, and what its check finds."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from i3dist.config import ModelSettings
from i3dist.data.schedule import Schedule, lanes_of_rank
from i3dist.distributed import collectives
from i3dist.engine.interface import StepResult
from i3dist.errors import UserError
from i3dist.model.state import LaneState
from i3dist.training import ledger
from i3dist.training.ledger import Entry, first_break, first_difference, samples_hash
from i3dist.training.ledger_writer import LedgerWriter, lane_checksums
from i3dist.training.progress import Progress
from tests.conftest import error_line, program
from tests.model.conftest import SMALL

LANES = 4
SCHEDULE = Schedule((3, 5, 4, 6, 2, 7), LANES, 2, seed=3)
CARRYING = ModelSettings.model_validate(SMALL | {"state_carry": True})


def random_lanes(seed: int, rows: int = LANES) -> LaneState:
    torch.manual_seed(seed)
    empty = LaneState.empty(rows, CARRYING, torch.device("cpu"), torch.bfloat16)
    return empty.map(lambda part: torch.randn(part.shape).to(part.dtype))


@given(data=st.data(), part=st.sampled_from(list(random_lanes(0).tensors())))
def test_any_bit_changes_its_lanes_checksum_and_no_others(data: st.DataObject, part: str) -> None:
    state = random_lanes(1)
    before = lane_checksums(state)
    tensor = state.tensors()[part]
    words = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).flatten()
    place = data.draw(st.integers(0, len(words) - 1))
    words[place] ^= 1 << data.draw(st.integers(0, 8 * tensor.element_size() - 2))
    changed = before != lane_checksums(state)
    assert changed.nonzero().flatten().tolist() == [place // (len(words) // LANES)]


def test_state_that_moves_to_another_place_changes_the_checksum() -> None:
    state = random_lanes(2)
    moved = state._replace(latents=state.latents.roll(1, dims=1))
    assert not (lane_checksums(state) == lane_checksums(moved)).any()


def test_checksums_are_the_same_everywhere() -> None:
    """Numbers of another implementation, in Python's own integers."""

    def splitmix(x: int) -> int:
        mask = (1 << 64) - 1
        x = x * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return (x ^ x >> 31) | 1

    state = random_lanes(3, rows=1)
    total = 0
    for salt, tensor in enumerate(state.tensors().values()):
        kind = torch.int16 if tensor.element_size() == 2 else torch.int32
        words = tensor.contiguous().view(kind).flatten().tolist()
        total += sum(w * splitmix(i + (salt << 40)) for i, w in enumerate(words, start=1))
    assert int(lane_checksums(state)[0]) % (1 << 64) == total % (1 << 64)


def at(step: int, windows: int, lanes: LaneState) -> Progress:
    """A run that stands after `step`."""
    return Progress(99, lanes, torch.tensor(0), step, windows)


def step_of(number: int) -> StepResult:
    return StepResult(True, 0.5 / number, [3.0 * number, 0.0])


def write(folder: Path, ranks: int, steps: range, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ledger of so many ranks, one after the other: sums over ranks are made up here."""
    folder.mkdir(exist_ok=True)
    sums: dict[int, Tensor] = {}
    writers = [
        LedgerWriter(folder, SCHEDULE, 3, lanes_of_rank(LANES, rank, ranks))
        for rank in range(ranks)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            collectives, "all_sum", lambda part: sums.setdefault(0, part.clone()).add_(part)
        )
        sums[0] = torch.zeros(len(steps), LANES, dtype=torch.int64)
        for writer in reversed(writers):  # the first one writes when all sums are in
            for number in steps:
                rows = random_lanes(number).rows(writer.lanes.start, writer.lanes.stop)
                targets = torch.tensor(2.0 * number)
                writer.add(at(number, 3 * number, rows), targets, step_of(number), None)
            writer.flush()
    return folder / ledger.LEDGER


def test_it_is_the_same_for_every_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, *others = (
        write(tmp_path / str(ranks), ranks, range(1, 6), monkeypatch).read_text()
        for ranks in (1, 2, 4)
    )
    assert others == [one, one]
    entries = ledger.read(tmp_path / "1")
    assert first_break(entries) is None
    assert ledger.first_misread(entries, SCHEDULE, 3) is None
    assert [entry.loss for entry in entries] == [1.5] * 5
    assert len({entry.samples for entry in entries} | {entry.lanes for entry in entries}) == 10
    other = Schedule(SCHEDULE.shard_chunks, LANES, 2, seed=4)
    assert "step 1 read other samples" in str(ledger.first_misread(entries, other, 3))


def test_a_skipped_step_is_told_from_one_that_was_not(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, SCHEDULE, 3, range(LANES))
    stepped = StepResult(False, float("inf"), [float("nan"), 0.0])
    writer.add(at(1, 3, random_lanes(1)), torch.tensor(0), stepped, "not finite")
    writer.flush()
    (entry,) = ledger.read(tmp_path)
    assert (entry.loss, entry.gradient_norm, entry.skipped) == (None, None, "not finite")


def test_a_window_that_was_left_out_is_found(tmp_path: Path) -> None:
    """Of windows that were read, not of those that should have been."""
    writer = LedgerWriter(tmp_path, SCHEDULE, 3, range(LANES))
    for step, windows in ((1, 3), (2, 6), (3, 10), (4, 13)):
        progress = at(step, windows, random_lanes(step))
        writer.add(progress, torch.tensor(2.0), step_of(step), None)
    writer.flush()
    fault = ledger.first_misread(ledger.read(tmp_path), SCHEDULE, 3)
    assert fault is not None and fault.startswith("step 3 read other samples")


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "sam', b'{"step": 6}\n', b"\xff\n"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_continued_run_writes_its_steps_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, torn: bytes
) -> None:
    path = write(tmp_path, 1, range(1, 6), monkeypatch)
    undisturbed = path.read_bytes()
    path.write_bytes(undisturbed + torn)
    LedgerWriter(tmp_path, SCHEDULE, 3, range(LANES)).resume(cut, random_lanes(cut))
    assert len(ledger.read(tmp_path)) == cut
    write(tmp_path, 1, range(cut + 1, 6), monkeypatch)
    assert path.read_bytes() == undisturbed


def test_a_broken_line_stays_for_the_check_to_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 1, range(1, 6), monkeypatch)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b'{"step": 2, "samples}\n'
    path.write_bytes(b"".join(lines))
    LedgerWriter(tmp_path, SCHEDULE, 3, range(LANES)).resume(4, random_lanes(4))
    assert path.read_bytes() == b"".join(lines[:4])
    with pytest.raises(UserError, match="after step 1: line 2 is not an entry"):
        ledger.read(tmp_path)


def test_lanes_that_the_ledger_does_not_know_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, range(1, 6), monkeypatch)
    writer = LedgerWriter(tmp_path, SCHEDULE, 3, range(LANES))
    with pytest.raises(UserError, match="step 3 differs") as error:
        writer.resume(3, random_lanes(4))
    assert "\n" not in str(error.value)
    assert len(ledger.read(tmp_path)) == 5, "nothing is cut off"


def entries(count: int) -> list[Entry]:
    return [
        Entry(step=n, samples=f"s{n}", lanes=f"l{n}", loss=1 / n, gradient_norm=2.0, skipped=None)
        for n in range(1, count + 1)
    ]


@given(count=st.integers(1, 20), data=st.data())
def test_the_first_break_is_named(count: int, data: st.DataObject) -> None:
    whole = entries(count)
    assert first_break(whole) is None
    place = data.draw(st.integers(0, count - 1))
    twice = [*whole[: place + 1], *whole[place:]]
    assert first_break(twice) == f"step {place + 1} comes again after step {place + 1}"
    without = whole[:place] + whole[place + 1 :]
    if place < count - 1:
        assert f"step {place + 1} is missing" in str(first_break(without))
    elif not without:
        assert first_break(without) == "it holds no step"


CHANGES = {"samples": "x", "lanes": "x", "loss": 9.0, "gradient_norm": None, "skipped": "spike"}


@given(count=st.integers(1, 20), data=st.data(), field=st.sampled_from(list(CHANGES)))
def test_the_first_difference_is_named(count: int, data: st.DataObject, field: str) -> None:
    one = entries(count)
    assert first_difference(one, one) is None
    place = data.draw(st.integers(0, count - 1))
    other = [
        entry.model_copy(update={field: CHANGES[field]}) if n >= place else entry
        for n, entry in enumerate(one)
    ]
    assert f"step {place + 1} differs in {field}:" in str(first_difference(one, other))
    assert f"step {place + 1} is only in the first" == first_difference(one, one[:place])


def test_a_tolerance_is_for_figures() -> None:
    one = entries(3)
    near = [e.model_copy(update={"loss": 1.001 / e.step, "lanes": "other"}) for e in one]
    assert first_difference(one, near, tolerance=0.01) is None
    assert "in loss" in str(first_difference(one, near, tolerance=1e-4))
    far = [e.model_copy(update={"samples": "other"}) for e in one]
    assert "in samples" in str(first_difference(one, far, tolerance=0.01))


def test_the_schedule_decides_the_samples() -> None:
    """Steps of several windows join the windows' chunks; ranks appear nowhere."""
    hashes = [samples_hash(SCHEDULE, windows, 2) for windows in range(2, 18, 2)]
    assert len(set(hashes)) == 8
    assert hashes[0] != samples_hash(SCHEDULE, 3, 3)


def test_the_program_says_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    path = write(one, 1, range(1, 6), monkeypatch)
    write(other, 2, range(1, 6), monkeypatch)
    result = program("launch/ledger.py", one, other)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{one}: unbroken, 5 steps, 0 skipped",
        f"{other}: the same steps",
    ]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    assert "step 3 is missing" in error_line(program("launch/ledger.py", one))
    path.write_text("".join([*lines[:3], lines[3].replace('"loss": 1.5', '"loss": 1.25')]))
    line = error_line(program("launch/ledger.py", one, other))
    assert "step 4 differs in loss: 1.25 and 1.5" in line
    path.write_text("".join(lines)[:-9])
    assert "after step 4: line 5 is torn" in error_line(program("launch/ledger.py", one))
    path.write_text("".join(lines))
    (one / "checkpoints" / "step-00000008").mkdir(parents=True)
    assert "the checkpoint is of step 8" in error_line(program("launch/ledger.py", one))
    assert "cannot be read" in error_line(program("launch/ledger.py", tmp_path))
    assert json.loads(lines[0])["step"] == 1
