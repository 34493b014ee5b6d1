"""A validation split of one's own: the option --valid.

The parts of its source come first, then those of the source of training. So with --deduplicate a
document for training that is a duplicate of one for validation is dropped, and not the other.
"""

import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.evidence import Piece, State
from data_prep.output import TRAIN, VALID
from data_prep.sources import NamedFile, Part, Record, Share, Source
from i3dist.errors import UserError


@dataclass(frozen=True)
class PartOfPair(Part):
    """A part of either source. Its files are numbered from `first_file` on."""

    part: Part
    first_file: int
    is_validation: bool

    @property
    def source(self) -> str:  # type: ignore[override]
        """Name of its source, where a split has several."""
        return self.part.source

    @property
    def share(self) -> Share | None:  # type: ignore[override]
        """That of the part."""
        return self.part.share

    @property
    def identity(self) -> str:
        """Text that differs where the part reads something else."""
        return self.part.identity

    def records(self) -> Generator[Record, None, tuple[Piece, ...]]:
        """Read the documents in order; returns the pieces of files that were read."""
        read: Any = self.part.records()
        pieces: Iterable[Piece] = (yield from read) or ()
        return tuple(_moved(piece, self.first_file) for piece in pieces)

    @property
    def size(self) -> int:
        """About how many bytes it has."""
        return self.part.size

    @property
    def files(self) -> frozenset[int]:
        """Numbers of the files that it reads."""
        return frozenset(self.first_file + number for number in self.part.files)

    def is_made_of(self, pieces: Sequence[Piece]) -> bool:
        """Whether these are the pieces of files that this part reads."""
        return self.part.is_made_of([_moved(piece, -self.first_file) for piece in pieces])


def _moved(piece: Piece, places: int) -> Piece:
    return piece.model_copy(update={"file": piece.file + places})


class PairOfSources(Source):
    """A source of training, with one for validation. Name, revision and license are the former's.

    Raises:
        UserError: both read the same file.
    """

    def __init__(self, training: Source, validation: Source) -> None:
        self.training, self.validation = training, validation
        self.name = training.name
        self.left_out = ", ".join(filter(None, (validation.left_out, training.left_out)))
        paths = {os.path.realpath(path) for path, _ in training.files}
        for path, _ in validation.files:
            if os.path.realpath(path) in paths:
                raise UserError(
                    f"{path} is in --source and in --valid: move it out of the folder, or the "
                    "glob, of --source"
                )

    @property
    def files(self) -> Sequence[NamedFile]:  # type: ignore[override]
        """The files of both."""
        return (*self.validation.files, *self.training.files)

    @property
    def states(self) -> tuple[State, ...]:
        """The states of their files."""
        return (*self.validation.states, *self.training.states)

    @property
    def revision(self) -> str:
        """That of the source of training."""
        return self.training.revision

    @property
    def outline(self) -> str:
        """That of the source of training."""
        return self.training.outline

    @property
    def license(self) -> str | None:
        """That of the source of training."""
        return self.training.license

    def outline_at(self, states: Sequence[State]) -> str:
        """That of the source of training, when the files of both had these states."""
        return self.training.outline_at(states[len(self.validation.files) :])

    def keep_in(self, folder: Path) -> None:
        """Keep what took long to find out, a folder for each source."""
        self.validation.keep_in(folder / VALID)
        self.training.keep_in(folder / TRAIN)

    def pin(self, revision: str) -> None:
        """Keep the source of training at this revision."""
        self.training.pin(revision)

    def parts(self) -> Sequence[PartOfPair]:
        """The parts for validation, then those for training."""
        return self._parts(self.validation.parts(), self.training.parts())

    def parts_with_broken(self) -> Sequence[PartOfPair]:
        """As `parts`, but what cannot be opened is a part whose `records` raises the error."""
        return self._parts(self.validation.parts_with_broken(), self.training.parts_with_broken())

    def _parts(self, validation: Sequence[Part], training: Sequence[Part]) -> list[PartOfPair]:
        first = len(self.validation.files)
        return [
            *(PartOfPair(part, 0, True) for part in validation),
            *(PartOfPair(part, first, False) for part in training),
        ]

    def sample_parts(self, parts: Sequence[Part]) -> Sequence[Part]:
        """What a sample for the tokenizer is taken from: nothing that is for validation."""
        pairs = (part for part in parts if isinstance(part, PartOfPair))
        return self.training.sample_parts([pair.part for pair in pairs if not pair.is_validation])
