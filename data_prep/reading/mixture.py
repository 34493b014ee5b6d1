"""Several sources as one, each with a weight: how many times its documents are taken.

A document of a source of weight 2.5 is taken twice, and once more if its hash is in the lower half.
So what is taken follows from seed, source and document alone, and a smaller weight takes some of
the documents of a larger one. Each copy has a place of its own in the shuffled order.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from data_prep.arguments import ALONE, TaskShare
from data_prep.evidence import State
from data_prep.reading.joined import JoinedPart
from data_prep.reading.validation import PairOfSources
from data_prep.shuffle import PartSummary
from data_prep.sources import SOURCES, NamedFile, Part, Share, Source
from i3dist.data.manifest import SourceCounts
from i3dist.errors import UserError

SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1000.0
MOST_SOURCES = 100
_LONGEST_NAME = 2000
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


class Weighted(NamedTuple):
    """A source and its weight."""

    source: Source
    weight: float


def split_weight(text: str) -> tuple[str, float]:
    """What `--source PATH:WEIGHT` names, and the weight; 1 where none is given.

    A name or path that exists is taken as it is, also with a colon in it.

    Raises:
        UserError: the weight is not in the range.
    """
    head, colon, tail = text.rpartition(":")
    is_number = head and colon and _NUMBER.fullmatch(tail)
    is_port = re.fullmatch(r"[^:/]+://[^/?#]*", head)
    if not is_number or is_port or text in SOURCES or os.path.lexists(text):
        return text, 1.0
    weight = float(tail)
    if not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:
        raise UserError(
            f"--source {text}: a weight is a number from {SMALLEST_WEIGHT:f} to "
            f"{LARGEST_WEIGHT:.0f}, not {tail}"
        )
    return head, weight


@dataclass(frozen=True)
class MixedPart(JoinedPart):
    """A part of one of the sources."""

    share: Share
    source: str


class Mixture(Source):
    """Sources in the order in which they were given."""

    def __init__(self, members: Sequence[Weighted]) -> None:
        if len(members) > MOST_SOURCES:
            raise UserError(
                f"{len(members)} sources are more than {MOST_SOURCES}: put files of equal weight "
                "into one folder"
            )
        self.members = members
        self.name = _name(members)
        left_out = (f"{m.source.name}: {m.source.left_out}" for m in members if m.source.left_out)
        self.left_out = "; ".join(left_out)

    @cached_property
    def files(self) -> Sequence[NamedFile]:  # type: ignore[override]
        """The files of all sources."""
        return [file for member in self.members for file in member.source.files]

    @cached_property
    def states(self) -> tuple[State, ...]:
        """The states of all files when they were first asked for."""
        return tuple(state for member in self.members for state in member.source.states)

    @property
    def revision(self) -> str:
        """The revisions of all sources."""
        return json.dumps([member.source.revision for member in self.members])

    @property
    def outline(self) -> str:
        """The outlines of all sources."""
        return json.dumps([member.source.outline for member in self.members])

    def outline_at(self, states: Sequence[State]) -> str:
        """The outlines of all sources when their files had these states."""
        left = iter(states)
        each = [(m.source, islice(left, len(m.source.files))) for m in self.members]
        return json.dumps([source.outline_at(tuple(own)) for source, own in each])

    def pin(self, revision: str) -> None:
        """Stay at the revisions of all sources."""
        for member, pinned in zip(self.members, json.loads(revision), strict=True):
            member.source.pin(pinned)

    def keep_in(self, folder: Path, share: TaskShare = ALONE) -> None:
        """Keep what took long to find out, a folder for each source."""
        for number, member in enumerate(self.members):
            member.source.keep_in(folder / f"{number:03d}", share)

    @property
    def license(self) -> str | None:
        """The licenses of all sources that state one."""
        found = dict.fromkeys(member.source.license for member in self.members)
        return ", ".join(filter(None, found)) or None

    def chosen(self, where: str) -> "Mixture":
        """The sources without the rows of which the expression `where` is not true."""
        return Mixture([m._replace(source=m.source.chosen(where)) for m in self.members])

    def parts(self) -> Sequence[MixedPart]:
        """The parts of all sources."""
        return self._parts([member.source.parts() for member in self.members])

    def parts_with_broken(self) -> Sequence[MixedPart]:
        """As `parts`, but what cannot be opened is a part whose `records` raises the error."""
        return self._parts([member.source.parts_with_broken() for member in self.members])

    def _parts(self, given: Sequence[Sequence[Part]]) -> Sequence[MixedPart]:
        firsts = accumulate((len(member.source.files) for member in self.members), initial=0)
        return [
            MixedPart(part, first, Share(number, member.weight), member.source.name)
            for number, (member, first) in enumerate(zip(self.members, firsts, strict=False))
            for part in given[number]
        ]


def _name(members: Sequence[Weighted]) -> str:
    name = " + ".join(f"{source.name}:{_short(weight)}" for source, weight in members)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{len(members)} sources {hashlib.sha256(name.encode()).hexdigest()}"


def _short(weight: float) -> str:
    return repr(weight).removesuffix(".0")


def mixed(members: Sequence[Weighted]) -> Source:
    """The sources as one; a single one of weight 1 is itself."""
    first, *others = members
    return Mixture(members) if others or first.weight != 1 else first.source


def count_sources(
    source: Source, parts: Sequence[Part], summaries: Sequence[PartSummary]
) -> tuple[SourceCounts, ...] | None:
    """What the output holds of each source, but for one that is for validation.

    None where the source is a single one of weight 1.
    """
    if isinstance(source, PairOfSources):
        source = source.training
    if not isinstance(source, Mixture):
        return None
    documents, tokens, usable = ([0] * len(source.members) for _ in range(3))
    for part, summary in zip(parts, summaries, strict=True):
        if part.share is None:
            continue
        number = part.share.source
        documents[number] += summary.documents
        tokens[number] += summary.tokens + 2 * summary.documents
        usable[number] += summary.usable
    return tuple(
        SourceCounts(
            name=member.source.name[:_LONGEST_NAME],
            weight=member.weight,
            usable=usable[number],
            documents=documents[number],
            tokens=tokens[number],
        )
        for number, member in enumerate(source.members)
    )
