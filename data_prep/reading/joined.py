"""A part of one of several sources that are read as one."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from data_prep.evidence import Piece
from data_prep.sources import Part, Place, Record


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

    @property
    def places(self) -> tuple[Place, ...]:
        """The pieces of files that it reads."""
        places = self.part.places
        return tuple((self.first_file + file, start, stop) for file, start, stop in places)

    def split(self) -> Sequence[Self]:
        """A part for each of its places."""
        return [replace(self, part=part) for part in self.part.split()]

    def of(self, parts: Sequence["JoinedPart"]) -> Self:
        """What reads parts of the same source, one after the other."""
        return replace(self, part=self.part.of([part.part for part in parts]))

    def is_made_of(self, pieces: Sequence[Piece]) -> bool:
        """Whether these are the pieces of files that this part reads."""
        return self.part.is_made_of(_shifted(pieces, -self.first_file))


def _shifted(pieces: Sequence[Piece], by: int) -> list[Piece]:
    return [piece.model_copy(update={"file": piece.file + by}) for piece in pieces]
