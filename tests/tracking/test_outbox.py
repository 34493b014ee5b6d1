"""What waits for the tracking store: every line once and in order, however long, torn or late."""

import json
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.tracking import outbox
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.tracking.outbox import EARLIER, LOGS, Outbox

AT_ONCE = 64  # bytes, in place of READ_BYTES
NAMES = sorted(LOGS)

LENGTHS = st.integers(0, 3 * AT_ONCE)


def begin(folder: Path, run_id: str = "run") -> Outbox:
    box = Outbox(folder)
    box.begin(run_id)
    return box


def put(folder: Path, step: int, length: int = 1, name: str = "metrics.jsonl") -> None:
    """Log a step, in a line that is about so long."""
    MetricsLog(folder / name).append(step, {"x" * max(1, length): step})


def take_all(box: Outbox, run_id: str = "run") -> list[int]:
    """Send everything, as a tracker does; the steps that were sent."""
    taken: list[int] = []
    while True:
        entries, ends = box.unsent()
        box.sent(run_id, ends)
        if not entries:
            return taken
        assert all(list(entry["values"].values()) == [entry["step"]] for entry in entries)
        taken += [entry["step"] for entry in entries]


@settings(max_examples=40)  # each is synced to disk again and again
@given(
    lines=st.lists(st.tuples(LENGTHS, st.sampled_from(NAMES)), max_size=12),
    pauses=st.sets(st.integers(0, 11)),
)
def test_lines_of_any_length_arrive_once_and_in_the_order_of_their_log(
    lines: list[tuple[int, str]], pauses: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    box, taken = begin(folder), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox, "READ_BYTES", AT_ONCE)
        for number, (length, name) in enumerate(lines):
            put(folder, number, length, name)
            if number in pauses:
                taken += take_all(box)
            if number == 6:  # another process goes on
                box = begin(folder)
        taken += take_all(box)
    assert sorted(taken) == list(range(len(lines)))
    for name in NAMES:
        steps = [number for number, (_, log) in enumerate(lines) if log == name]
        assert [step for step in taken if step in steps] == steps
    assert box.is_empty


def test_a_torn_line_of_any_length_costs_itself_only(tmp_path: Path) -> None:
    box = begin(tmp_path)
    put(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "text": "' + b"x" * 3 * outbox.READ_BYTES)
    assert take_all(box) == [1]
    assert not box.is_empty
    put(tmp_path, 3)
    assert take_all(box) == [3]
    assert box.is_empty


def test_a_long_line_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen times as long as what is read at once, and nothing else with it."""
    read = 0
    opened = Path.open
    path = tmp_path / "metrics.jsonl"

    class Counting(BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            return self._count(super().read(size))

        def readline(self, size: int | None = -1, /) -> bytes:
            return self._count(super().readline(size))

        def _count(self, data: bytes) -> bytes:
            nonlocal read
            read += len(data)
            return data

    def counting(self: Path, mode: str = "r", *rest: Any, **options: Any) -> IO[Any]:
        file = opened(self, mode, *rest, **options)
        return Counting(file.detach()) if self == path and mode == "rb" else file

    box = begin(tmp_path)
    for step in range(3):
        put(tmp_path, step, 16 * outbox.READ_BYTES)
    monkeypatch.setattr(Path, "open", counting)
    assert len(take_all(box)) == 3
    monkeypatch.undo()
    assert read == path.stat().st_size


def begin_earlier(folder: Path, steps: range, sent: int) -> None:
    """Make the files of a run that an earlier version began: of `steps` it had sent the first."""
    lines = [
        json.dumps({"step": step, "time_ms": 1000 + step, "values": {"train/loss": float(step)}})
        for step in steps
    ]
    (folder / EARLIER).write_text("\n".join(lines) + "\n")
    done = sum(len(line) + 1 for line in lines[:sent])
    (folder / "tracking.sent.json").write_text(json.dumps({"run_id": "run", "bytes": done}))
    logged = [json.dumps({"step": step, "loss": float(step)}) for step in steps]  # no time
    (folder / "metrics.jsonl").write_text("\n".join(logged) + "\n")


def test_a_run_of_an_earlier_version_loses_nothing_and_sends_nothing_twice(tmp_path: Path) -> None:
    begin_earlier(tmp_path, range(10), sent=7)
    box = begin(tmp_path)
    put(tmp_path, 10)
    entries, ends = box.unsent()
    assert [entry["time_ms"] for entry in entries] == [1007, 1008, 1009]
    assert entries[0]["values"] == {"train/loss": 7.0}
    box.sent("run", ends)
    assert take_all(box) == [10]
    assert box.is_empty
    put(tmp_path, 11)
    assert take_all(begin(tmp_path)) == [11], "by the process after that"


def test_another_run_in_the_store_gets_all_of_an_earlier_versions_run(tmp_path: Path) -> None:
    """A copy of the folder, or a run that the store has lost."""
    begin_earlier(tmp_path, range(10), sent=7)
    put(tmp_path, 10)
    assert take_all(begin(tmp_path, "another"), "another") == list(range(11))
    assert take_all(begin(tmp_path, "another"), "another") == []


@pytest.mark.parametrize(
    "mark",
    [b"", b"[]", b'{"run_id": "run"}', b'{"run_id": "run", "bytes": {"metrics.jsonl": 99999}}'],
)
def test_a_mark_that_makes_no_sense_has_everything_sent(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "tracking.sent.json").write_bytes(mark)
    put(tmp_path, 1)
    assert take_all(begin(tmp_path)) == [1]


def test_what_mlflow_gets_of_a_line() -> None:
    """Few figures, in groups; derived ones, nulls and what is not a number are left out."""
    line = {"step": 1, "time": 2.0, "loss": 3.0, "perplexity": 20.1, "tokens_per_second": 5}
    more = {"elapsed": 4.0, "mine": 0.5, "none": None, "text": "x", "huge": 10**400}
    assert outbox.mlflow_values("train", line | more) == {
        "train/loss": 3.0,
        "train_speed/tokens_per_second": 5.0,
        "train/mine": 0.5,
    }
    chunks = [
        {"index": 0, "tokens": 9, "loss": 3.0, "loss_without_history": 3.0},
        {"index": 3, "tokens": 9, "loss": 2.5, "loss_without_history": 3.0},
        {"index": 12, "tokens": 9, "loss_without_history": 2.0, "loss_other_history": 1.5},
    ]
    assert outbox.mlflow_values("valid", {"loss": 2.5, "tokens": 27, "by_chunk": chunks}) == {
        "valid/loss": 2.5,
        "valid_history_gain/chunk_03": 0.5,
    }
