"""Files as a source: a file, a folder, a glob, or this Python's standard library.

Files are grouped into parts of about equal size. A large parquet file is cut between row groups,
and a large jsonl file between lines. The output does not depend on where parts are cut.
"""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from data_prep.arguments import ALONE, TaskShare
from data_prep.evidence import Piece, State, state_of
from data_prep.formats import FORMATS
from data_prep.reading.listing import Listing, named, walk
from data_prep.reading.readers import (
    JSON_LINES,
    PARQUET,
    SUFFIXES,
    SUFFIXES_IN_WORDS,
    SourceFile,
    Span,
    lines_of,
    naming,
    spans_of,
    spans_or_error,
)
from data_prep.reading.row_filter import for_sample, no_columns
from data_prep.reading.where import Where
from data_prep.sources import (
    CHAT,
    SOURCES,
    TEXT,
    NamedFile,
    Part,
    Place,
    Record,
    Source,
    clean_file_name,
)
from i3dist.errors import UserError
from i3dist.files import regular

STDLIB = "stdlib"
_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
)
_SMALLEST_PART, _LARGEST_PART = 1 << 22, 1 << 26
_PARTS_WANTED = 64
_SHORTEST_RANGE = 1 << 22
"""Bytes of jsonl that are worth a part of their own."""
_HASHED_WHOLE, _HASHED_END = 1 << 26, 1 << 23


@dataclass(frozen=True)
class FilePart(Part):
    """Some consecutive files or row groups."""

    spans: tuple[Span, ...]

    def records(self) -> Generator[Record, None, tuple[Piece, ...]]:
        """Read the documents in order; returns the piece that was read of each span."""
        pieces = []
        for span in self.spans:
            pieces.append((yield from span.records()))
        return tuple(pieces)

    @property
    def size(self) -> int:
        """Bytes of the files, or of the row groups before compression."""
        return sum(span.size for span in self.spans)

    @property
    def files(self) -> frozenset[int]:
        """Numbers of the files that it reads."""
        return frozenset(span.file.number for span in self.spans)

    @property
    def places(self) -> tuple[Place, ...]:
        """The file and the bounds of each span."""
        return tuple((span.file.number, span.start, span.stop) for span in self.spans)

    def is_made_of(self, pieces: Sequence[Piece]) -> bool:
        """Whether these are the pieces of files that this part reads.

        A part may have been cut in another way: by another version, or before the file changed.
        """
        return self.places == tuple((p.file, p.start, p.stop) for p in pieces)

    def split(self) -> Sequence["FilePart"]:
        """A part for each span."""
        return [FilePart((span,)) for span in self.spans]

    def of(self, parts: Sequence["FilePart"]) -> "FilePart":
        """All their spans."""
        return FilePart(tuple(span for part in parts for span in part.spans))


@dataclass
class FileSource(Source):
    """Files in the order of their names below the root."""

    name: str
    files: tuple[NamedFile, ...]
    scheme: str = ""
    left_out: str = ""
    format: str = TEXT
    column: str = FORMATS[TEXT].key
    kept: Path | None = field(default=None, compare=False)
    """The folder for what took long to find out."""
    share: TaskShare = field(default=ALONE, compare=False)
    where: Where | None = None

    @cached_property
    def states(self) -> tuple[State, ...]:
        """The states of the files when they were first asked for."""
        states = []
        for path, _ in self.files:
            with naming(path):
                states.append(state_of(path))
        return tuple(states)

    @cached_property
    def outline(self) -> str:
        """A digest of every file's name and size."""
        return self.outline_at(self.states)

    def outline_at(self, states: Sequence[State]) -> str:
        """The outline with the sizes of these states; without more or fewer of them."""
        digest = hashlib.sha256()
        for (_, name), (size, _, _) in zip(self.files, states, strict=False):
            digest.update(f"{os.fsencode(name).hex()} {size}\n".encode())
        return f"names and sizes {digest.hexdigest()}"

    @property
    def revision(self) -> str:
        """A digest of every file's name, size and content."""
        digest = hashlib.sha256()
        for path, name in self.files:
            with naming(path):
                line = f"{os.fsencode(name).hex()} {_content_digest(path)}\n"
            digest.update(line.encode())
        return digest.hexdigest()

    def sample_parts(self, parts: Sequence[Part]) -> Sequence[Part]:
        """The parts with no jsonl file cut, as older versions had them: so a sample stays equal."""
        spans = [span for part in parts if isinstance(part, FilePart) for span in part.spans]
        whole = [span.uncut() for span in spans if span.row_group is not None or not span.start]
        return [FilePart(group) for group in grouped(whole, _part_size(whole))]

    def with_text_column(self, column: str) -> "FileSource":
        """The source with another column, or key, as its text."""
        return replace(self, name=f"{self.name}, column {column}", column=column)

    def chosen(self, where: str) -> "FileSource":
        """The source without the rows of which the expression `where` is not true.

        Raises:
            UserError: a file has no columns, or the expression is wrong.
        """
        for path, name in self.files:
            if not name.lower().endswith((PARQUET, *JSON_LINES)):
                raise no_columns(path)
        return replace(self, where=Where.parse(where))

    def keep_in(self, folder: Path, share: TaskShare = ALONE) -> None:
        """Keep the numbers of lines of large jsonl files; count those of a share of files first."""
        self.kept, self.share = folder, share

    def _file(self, number: int, path: Path, name: str, state: State) -> SourceFile:
        return SourceFile(
            name, number, path, state, scheme=self.scheme, column=self.column, where=self.where
        )

    def parts(self) -> Sequence[FilePart]:
        """Parts of about equal size, small enough that every worker has some."""
        return self._parts(spans_of)

    def parts_with_broken(self) -> Sequence[FilePart]:
        """As `parts`, but what cannot be opened is a span whose `records` raises the error."""
        return self._parts(spans_or_error)

    def _parts(self, spans_of: Callable[[SourceFile], Sequence[Span]]) -> Sequence[FilePart]:
        files = enumerate(zip(self.files, self.states, strict=True))
        spans = [
            span
            for number, ((path, name), state) in files
            for span in spans_of(self._file(number, path, name, state))
        ]
        if self.where:
            spans = _with_columns_of_lines(spans, self.where)
        limit = _part_size(spans)
        shortest = max(limit, _SHORTEST_RANGE)
        # In an order of its own, so that tasks side by side do not all count the same lines.
        order = self.share.first(range(len(spans)))
        lines = {number: lines_of(spans[number], shortest, self.kept) for number in order}
        cut = (piece for number in range(len(spans)) for piece in lines[number])
        return [FilePart(group) for group in grouped(cut, limit)]


def _part_size(spans: Sequence[Span]) -> int:
    total = sum(span.size for span in spans)
    return min(max(total // _PARTS_WANTED, _SMALLEST_PART), _LARGEST_PART)


def _with_columns_of_lines(spans: Sequence[Span], where: Where) -> list[Span]:
    """The spans; those of jsonl with the condition for the columns in a sample of their lines."""
    lines = [span for span in spans if span.file.is_a(*JSON_LINES)]
    firsts = [replace(span, file=span.file.unfiltered()) for span in lines if not span.error]
    if not firsts:
        return list(spans)
    place = firsts[0].file.path if len(firsts) == 1 else "the jsonl"
    where = for_sample(where, [span.records for span in firsts], place)
    return [
        replace(span, file=replace(span.file, where=where)) if span.file.is_a(*JSON_LINES) else span
        for span in spans
    ]


def _content_digest(path: Path) -> str:
    """Digest of a file's size and content. Of a large file only the two ends count, for speed."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with regular(path).open("rb") as file:
        if size > _HASHED_WHOLE:
            digest.update(file.read(_HASHED_END))
            file.seek(size - _HASHED_END)
        digest.update(file.read())
    return digest.hexdigest()


class Sized(Protocol):
    """Something of so many bytes."""

    @property
    def size(self) -> int: ...  # noqa: D102


Some = TypeVar("Some", bound=Sized)


def grouped(spans: Iterable[Some], limit: int) -> Iterator[tuple[Some, ...]]:
    """Consecutive spans in groups of at most `limit` bytes; a larger span is a group of its own."""
    group: list[Some] = []
    size = 0
    for span in spans:
        if group and size + span.size > limit:
            yield tuple(group)
            group, size = [], 0
        group.append(span)
        size += span.size
    if group:
        yield tuple(group)


def file_source(spec: str | Path, documents: str = TEXT) -> FileSource:
    """The files that `--source spec` names: a file, a folder or a glob.

    Args:
        spec: as typed.
        documents: the format of what they hold.

    Raises:
        UserError: there is no such file, or nothing there is a file of text; conversations are
            asked for, and a file is no jsonl.
    """
    source = _file_source(spec)
    if documents == CHAT:
        for file, name in source.files:
            if not name.lower().endswith(JSON_LINES):
                raise UserError(
                    f"{file} is not .jsonl or .ndjson, which conversations are read from: name "
                    "those files alone, for example --source 'FOLDER/*.jsonl'"
                )
    return replace(source, format=documents, column=FORMATS[documents].key)


def _file_source(spec: str | Path) -> FileSource:
    path = Path(spec)
    with naming(path), suppress(FileNotFoundError, NotADirectoryError):
        path.stat()
    if os.path.isfile(path):
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"cannot tell what {path} is: a source ends in {SUFFIXES_IN_WORDS}")
        return FileSource(clean_file_name(path.name), ((path, path.name),))
    if os.path.isdir(path):
        listing = Listing(path)
        listing.add_folder()
        name = path.resolve().name
    elif os.path.lexists(path):
        raise UserError(f"{path} is no file or folder, or leads to none: name another --source")
    elif glob.has_magic(str(path)):
        root = next(parent for parent in path.parents if os.path.isdir(parent))
        listing = Listing(root)
        listing.add_matches(path.relative_to(root).parts)
        name = path.name
    else:
        raise UserError(f"no file or folder {path}: name an existing one with --source, or stdlib")
    left_out = listing.report()
    files = listing.files()
    if not files:
        besides = f" (left out: {left_out})" if left_out else ""
        raise UserError(
            f"nothing in {path} ends in {SUFFIXES_IN_WORDS}{besides}: name another --source"
        )
    return FileSource(clean_file_name(name), files, left_out=left_out)


@SOURCES.register(STDLIB)
def stdlib_source() -> FileSource:
    """The modules and texts of the running Python's standard library, without its tests.

    Raises:
        UserError: there are none.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    walked = walk(folder, lambda path: path.name not in _LEFT_OUT and not path.is_symlink())
    modules = (path for _, paths in walked for path in paths if path.suffix in (".py", ".txt"))
    files = named(modules, folder)
    if not files:
        raise UserError(f"this Python keeps no library sources in {folder}: name a --source")
    return FileSource(f"{STDLIB} of Python {platform.python_version()}", files, "stdlib:")
