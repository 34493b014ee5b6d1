"""What waits for the tracking store: every entry once and in order, however long, torn or late."""

from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.tracking import outbox
from i3dist.tracking.outbox import Outbox

AT_ONCE = 64  # bytes, in place of READ_BYTES

TEXTS = st.integers(0, 3 * AT_ONCE).map("x".__mul__) | st.text(max_size=9)


def take_all(box: Outbox) -> list[dict[str, Any]]:
    """Send everything, as a tracker does; it ends, as each call gives something or the end."""
    taken: list[dict[str, Any]] = []
    while True:
        entries, end = box.unsent()
        if not entries:
            return taken
        taken += entries
        box.sent("run", end)


@settings(max_examples=40)  # each is synced to disk again and again
@given(texts=st.lists(TEXTS, max_size=12), pauses=st.sets(st.integers(0, 11)))
def test_entries_of_any_length_arrive_once_and_in_order(
    texts: list[str], pauses: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    box, taken = Outbox(folder), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox, "READ_BYTES", AT_ONCE)
        box.begin("run")
        for number, text in enumerate(texts):
            box.put({"step": number, "text": text})
            if number in pauses:
                taken += take_all(box)
            if number == 6:  # another process goes on
                box = Outbox(folder)
                box.begin("run")
        taken += take_all(box)
    assert taken == [{"step": number, "text": text} for number, text in enumerate(texts)]
    assert box.is_empty


def test_a_torn_line_of_any_length_costs_itself_only(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.begin("run")
    box.put({"step": 1})
    with box.path.open("ab") as file:
        file.write(b'{"step": 2, "text": "' + b"x" * 3 * outbox.READ_BYTES)
    assert take_all(box) == [{"step": 1}]
    assert not box.is_empty
    box.put({"step": 3})
    assert take_all(box) == [{"step": 3}]
    assert box.is_empty


def test_a_long_entry_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen times as long as what is read at once, and nothing else with it."""
    read = 0
    opened = Path.open

    class Counting(BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            return self._count(super().read(size))

        def readline(self, size: int | None = -1, /) -> bytes:
            return self._count(super().readline(size))

        def _count(self, data: bytes) -> bytes:
            nonlocal read
            read += len(data)
            return data

    def counting(path: Path, mode: str = "r", *rest: Any, **options: Any) -> IO[Any]:
        file = opened(path, mode, *rest, **options)
        return Counting(file.detach()) if path == box.path and mode == "rb" else file

    box = Outbox(tmp_path)
    box.begin("run")
    for _ in range(3):
        box.put({"text": "x" * 16 * outbox.READ_BYTES})
    monkeypatch.setattr(Path, "open", counting)
    assert len(take_all(box)) == 3
    monkeypatch.undo()
    assert read == box.path.stat().st_size
