"""A validation split of one's own: the option --valid.

The parts of its source come first, then those of the source of training. So with --deduplicate a
document for training that is a duplicate of one for validation is dropped, and not the other.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.arguments import ALONE, TaskShare
from data_prep.evidence import State
from data_prep.output_settings import TRAIN, VALID
from data_prep.reading.joined import JoinedPart
from data_prep.sources import NamedFile, Part, Share, Source
from i3dist.errors import UserError


@dataclass(frozen=True)
class PartOfPair(JoinedPart):
    """A part of either source."""

    is_validation: bool

    @property
    def source(self) -> str:  # type: ignore[override]
        """Name of its source, where a split has several."""
        return self.part.source

    @property
    def share(self) -> Share | None:  # type: ignore[override]
        """That of the part."""
        return self.part.share


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

    def validation_at(self, states: Sequence[State]) -> str:
        """That of the source of validation, when the files of both had these states."""
        return self.validation.outline_at(states[: len(self.validation.files)])

    def keep_in(self, folder: Path, share: TaskShare = ALONE) -> None:
        """Keep what took long to find out, a folder for each source."""
        self.validation.keep_in(folder / VALID, share)
        self.training.keep_in(folder / TRAIN, share)

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
