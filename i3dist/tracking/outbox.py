"""What is on its way to a store that may be away: a file that grows, and how far it was sent.

    RUN/tracking.jsonl        every entry, one JSON object a line
    RUN/tracking.sent.json    the store's name for the run, and the bytes of tracking.jsonl it has

An entry is in the file before anyone tries to send it, so neither an outage nor the end of the
process loses one. An entry that was sent is sent again only if the process ends before that is
written down. A run that the store has lost gets everything anew.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from i3dist.files import write_whole
from i3dist.tracking.metrics_log import append_line

READ_BYTES = 1 << 18


class Outbox:
    """The entries of one run. `put` may be called while another thread takes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tracking.jsonl"
        self._mark = folder / "tracking.sent.json"
        self._sent = 0

    def clear(self) -> None:
        """Forget everything: another run begins in the folder."""
        self.path.unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)

    def put(self, entry: dict[str, Any]) -> None:
        """Append one entry.

        Raises:
            OSError: the file cannot be written.
        """
        append_line(self.path, json.dumps(entry, allow_nan=False).encode())

    def begin(self, run_id: str) -> None:
        """Go on where the run `run_id` stopped taking, or at the first entry if it is a new one."""
        self._sent = 0
        with suppress(OSError, ValueError, TypeError, KeyError):
            mark = json.loads(self._mark.read_bytes())
            if mark["run_id"] == run_id and mark["bytes"] <= self.path.stat().st_size:
                self._sent = int(mark["bytes"])

    def unsent(self) -> tuple[list[dict[str, Any]], int]:
        """The next entries, and where in the file they end; none where all were sent."""
        end = self._sent
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            while lines := _whole_lines(file, end):
                end += len(lines)
                if entries := [entry for entry in map(_parse, lines.splitlines()) if entry]:
                    return entries, end
        return [], self._sent

    def sent(self, run_id: str, end: int) -> None:
        """Write down that the run has all entries up to `end`."""
        write_whole(self._mark, json.dumps({"run_id": run_id, "bytes": end}).encode())
        self._sent = end

    @property
    def is_empty(self) -> bool:
        """Whether all was sent."""
        return not self.path.exists() or self.path.stat().st_size <= self._sent


def _whole_lines(file: BinaryIO, start: int) -> bytes:
    """Lines of a file from a byte on: about `READ_BYTES` of them, or one that is longer."""
    file.seek(start)
    data = file.read(READ_BYTES)
    if b"\n" not in data:
        data += file.readline()
    return data[: data.rfind(b"\n") + 1]


def _parse(line: bytes) -> dict[str, Any] | None:
    """An entry, or None where a killed process tore the line."""
    with suppress(ValueError):
        entry = json.loads(line)
        return entry if isinstance(entry, dict) else None
    return None
