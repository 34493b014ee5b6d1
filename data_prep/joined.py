"""A part of one of several sources that are read as one."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.evidence import Piece
from data_prep.sources import Part, Record


@dataclass(frozen=True)
class JoinedPart(Part):
    """A part whose source's files are numbered from `first_file` on among the files of all."""

    part: Part
    first_file: int

    def records(self) -> Generator[Record, None, tuple[Piece, ...]]:
        """Read the documents in order; returns the pieces of files that were read."""
        read: Any = self.part.records()
        return tuple(_shifted((yield from read) or (), self.first_file))

    @property
    def size(self) -> int:
        """About how many bytes it has, each counted once."""
        return self.part.size

    @property
    def identity(self) -> str:
        """Text that differs where the part reads something else."""
        return self.part.identity

    @property
    def files(self) -> frozenset[int]:
        """Numbers of the files that it reads."""
        return frozenset(self.first_file + number for number in self.part.files)

    def is_made_of(self, pieces: Sequence[Piece]) -> bool:
        """Whether these are the pieces of files that this part reads."""
        return self.part.is_made_of(_shifted(pieces, -self.first_file))


def _shifted(pieces: Sequence[Piece], by: int) -> list[Piece]:
    return [piece.model_copy(update={"file": piece.file + by}) for piece in pieces]
