"""What a data source is, and the sources that `--source NAME` finds.

A source is a fixed sequence of parts. A part reads documents in a fixed order and independently of
the other parts, so worker processes share the parts out and the output has the same bytes for any
number of them. To add a source, register a `Source` under a name in a file of your own, and run
shard.py with `--extend FILE.py --source NAME`:

    from collections.abc import Iterator
    from dataclasses import dataclass

    from data_prep.sources import SOURCES, Part, Record, Source

    @dataclass(frozen=True)
    class Hundred(Part):
        first: int

        def records(self) -> Iterator[Record]:
            for number in range(self.first, self.first + 100):
                yield Record(f"number {number}", str(number), "", f"{number} is a number")

    @SOURCES.register("numbers")
    class Numbers(Source):
        name, revision = "numbers", "1"

        def parts(self) -> list[Hundred]:
            return [Hundred(first) for first in range(0, 1000, 100)]
"""

import codecs
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data_prep.arguments import ALONE, TaskShare
from data_prep.evidence import Piece, State
from i3dist.errors import UserError
from i3dist.registry import Registry

TEXT: Final = "text"
CHAT: Final = "chat"
"""Formats of documents: see `data_prep/formats.py`."""

NamedFile = tuple[Path, str]
"""A file, and its path below the root of its source."""


Place = tuple[int, int, int]
"""The number of a file, and where a piece of it begins and ends, in bytes."""


@dataclass(frozen=True)
class Record:
    """A document as a source gives it.

    `position` is its place in the source. It decides the document's place in the shuffled order,
    so it differs for every document. `text` is a str or UTF-8 bytes, in the format chat a list of
    messages; a document with anything else is skipped, and counted by reason. A `Skip` as the text
    is that reason. `columns` are all values of a line of jsonl, by name.
    """

    position: str
    id: str
    url: str
    text: object
    columns: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Share:
    """Of a mixture: the number of a source, and how often its documents are taken."""

    source: int
    weight: float


class Part:
    """A part of a source. It is pickled and sent to a worker process."""

    share: Share | None = None
    """Where the source is one of several, or has a weight."""

    source: str = ""
    """Name of its source, where a split has several."""

    is_validation: bool | None = None
    """Whether all its documents are for validation, or none; None if their hashes decide."""

    def records(self) -> Iterable[Record]:
        """Read the documents in order. A generator may return the pieces of files that it read."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """About how many bytes it has, 0 if that is not known; they serve to estimate."""
        return 0

    @property
    def identity(self) -> str:
        """Text that differs where a part reads something else, unless its files tell that."""
        return ""

    @property
    def files(self) -> frozenset[int]:
        """Which of the source's files it reads, by their numbers."""
        return frozenset()

    @property
    def places(self) -> tuple[Place, ...]:
        """Which pieces of the source's files it reads: the number of each file, start and stop."""
        return ()

    def is_made_of(self, pieces: Sequence[Piece]) -> bool:
        """Whether these are the pieces of files that this part reads."""
        return True

    def split(self) -> Sequence["Part"]:
        """A part for each of its `places`."""
        raise NotImplementedError

    def of(self, parts: Sequence[Any]) -> "Part":
        """What reads parts of the same source, as `split` gives them, one after the other."""
        raise NotImplementedError


class Source:
    """A corpus. Only `name`, `revision` and `parts` have no default."""

    name: str
    """What the manifest calls it."""
    files: Sequence[NamedFile] = ()
    """The files in the order of their names, where the content is that of files."""
    format: str = TEXT
    """What its documents are: `TEXT`, or `CHAT` for conversations."""
    left_out: str = ""
    """What `--source` covers and the source does not read, in words."""

    @property
    def license(self) -> str | None:
        """The license of the texts, where the source states one."""
        return None

    @property
    def revision(self) -> str:
        """Text that differs where the content differs. Finding it may mean reading everything."""
        raise NotImplementedError

    @property
    def outline(self) -> str:
        """The revision as far as it can be told without reading."""
        return self.revision

    @property
    def states(self) -> tuple[State, ...]:
        """Size and times of each file when they were first asked for."""
        return ()

    def outline_at(self, states: Sequence[State]) -> str:
        """What the outline was when its files had these states."""
        return self.outline

    def pin(self, revision: str) -> None:
        """Stay at this revision, from which the output was begun."""

    def chosen(self, where: str) -> "Source":
        """The source without the rows of which the expression `where` is not true.

        Raises:
            UserError: its documents have no columns, or the expression is wrong.
        """
        raise UserError(f"--where needs rows with columns, and {self.name} has none: omit --where")

    def parts(self) -> Sequence[Part]:
        """The parts, in order."""
        raise NotImplementedError

    def keep_in(self, folder: Path, share: TaskShare = ALONE) -> None:
        """Keep in a folder what took long to find out, for `parts` of a later run.

        Of several tasks side by side each finds out its `share` first.
        """

    def sample_parts(self, parts: Sequence[Part]) -> Sequence[Part]:
        """What a sample for the tokenizer is taken from; `parts` are all parts."""
        return parts

    def with_text_column(self, column: str) -> "Source":
        """The source with another column, or key, as its text.

        Raises:
            UserError: it has no columns.
        """
        raise UserError(f"--text-column {column}: the source {self.name} has no columns; omit it")

    def parts_with_broken(self) -> Sequence[Part]:
        """As `parts`, but what cannot be opened is a part whose `records` raises the error."""
        return self.parts()


_SLICE = 1 << 22

SOURCES: Registry[Callable[[], Source]] = Registry("data source", names=r"\S+")


class Skip(enum.Enum):
    """Why a document is skipped."""

    NULL = "null"
    EMPTY = "empty"
    NOT_TEXT = "not text"
    UNDECODABLE = "undecodable"
    # Of conversations:
    NOT_MESSAGES = "not messages"
    UNKNOWN_ROLE = "unknown role"
    EMPTY_MESSAGE = "empty message"
    NO_ANSWER = "no answer"
    WHERE = "excluded by --where"
    SHORT = "below --min-tokens"
    LONG = "above --max-tokens"
    DUPLICATE = "duplicate"


def usable_text(raw: object) -> bytes | Skip:
    """The text of `raw` (a str, or UTF-8 bytes) as valid UTF-8, or the reason to skip it."""
    if raw is None:
        return Skip.NULL
    if isinstance(raw, Skip):
        return raw
    if not isinstance(raw, (bytes, str)):
        return Skip.NOT_TEXT
    try:
        text = raw if isinstance(raw, bytes) else raw.encode()
        return Skip.EMPTY if _is_blank(text) else text
    except UnicodeError:
        return Skip.UNDECODABLE


def _is_blank(text: bytes) -> bool:
    """Whether there is only white space. All of the text is decoded; bad UTF-8 is an error."""
    # In slices, because a decoded text may take four times the memory.
    slices = (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))
    parts = codecs.iterdecode(slices, "utf-8") if len(text) > _SLICE else (text.decode(),)
    blank = True
    for part in parts:
        blank = blank and (not part or part.isspace())
    return blank


def clean_file_name(name: str) -> str:
    """A file's name as valid Unicode, still different from other files' names."""
    return name.encode("utf-8", "backslashreplace").decode()
