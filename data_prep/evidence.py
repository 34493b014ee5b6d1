"""What was read of a source, so that a later run can tell whether the source is still the same.

Files are hashed while they are read. A later run compares their sizes and times, and hashes only
the files whose times have changed. So a source that was copied, moved or touched is still the same.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from i3dist.files import regular

_BLOCK = 1 << 20

State = tuple[int, int, int]
"""A file's size in bytes, and the times when its content and its inode last changed, in ns."""


class Saved(BaseModel):
    """What is written to a JSON file of the output, and read back by a later run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read it; None if it is missing or damaged."""
        try:
            return cls.model_validate_json(regular(path).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


class Piece(Saved):
    """Bytes `start` to `stop` of the source's file number `file`, and the SHA-256 they had."""

    file: int
    start: int
    stop: int
    sha256: str

    def is_in(self, path: Path) -> bool:
        """Whether the file still holds these bytes."""
        with regular(path).open("rb") as file:
            return sha256_between(file, self.start, self.stop) == self.sha256


class Evidence(Saved):
    """The state of every file of a source when it was read, and the pieces that were read."""

    states: tuple[State, ...]
    pieces: tuple[Piece, ...] = ()

    def touched(self, states: Sequence[State]) -> frozenset[int]:
        """Numbers of the files whose state has changed."""
        pairs = enumerate(zip(self.states, states, strict=True))
        return frozenset(number for number, (then, now) in pairs if then != now)


def state_of(file: Path | int) -> State:
    """The state of a file, given by its path or an open handle."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sha256_between(file: BinaryIO, start: int, stop: int) -> str:
    """SHA-256 of the bytes from `start` to `stop`, or to the file's end."""
    digest = hashlib.sha256()
    file.seek(start)
    while block := file.read(min(_BLOCK, stop - file.tell())):
        digest.update(block)
    return digest.hexdigest()
