"""Where documents come from: files, this Python's standard library, or the hub.

A source is a fixed sequence of parts that can be read independently of one another, so that
workers share them out. Where the parts are cut does not show in the output.
"""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_prep.readers import SUFFIXES, Span, naming, parquet_spans
from data_prep.records import Record
from i3dist.errors import UserError

STDLIB = "stdlib"
_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
)
_SMALLEST_PART, _LARGEST_PART = 1 << 22, 1 << 26
_PARTS_WANTED = 64
_HASHED_WHOLE, _HASHED_END = 1 << 26, 1 << 23


class Part(Protocol):
    """A piece of a source; it can be sent to another process."""

    def records(self) -> Iterator[Record]:
        """Read the documents in order."""
        ...


class Source(Protocol):
    """A corpus."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        ...

    @property
    def revision(self) -> str:
        """Differs where the content differs."""
        ...

    def parts(self) -> Sequence[Part]:
        """The pieces, in order."""
        ...


@dataclass(frozen=True)
class FilePart:
    """Some consecutive files or row groups."""

    spans: tuple[Span, ...]

    def records(self) -> Iterator[Record]:
        """Read the documents in order."""
        for span in self.spans:
            yield from span.records()


@dataclass(frozen=True)
class FileSource:
    """Files, given as (path, name below the root), in the order of their names."""

    name: str
    files: tuple[tuple[Path, str], ...]
    scheme: str = ""

    @property
    def revision(self) -> str:
        """A digest of every file's name, size and content."""
        digest = hashlib.sha256()
        for path, name in self.files:
            with naming(path):
                line = f"{os.fsencode(name).hex()} {_content_digest(path)}\n"
            digest.update(line.encode())
        return digest.hexdigest()

    def parts(self) -> Sequence[FilePart]:
        """Parts of about equal size, small enough that every worker has some."""
        spans = [span for path, name in self.files for span in self._spans(path, name)]
        total = sum(span.size for span in spans)
        limit = min(max(total // _PARTS_WANTED, _SMALLEST_PART), _LARGEST_PART)
        return [FilePart(group) for group in _grouped(spans, limit)]

    def _spans(self, path: Path, name: str) -> Iterable[Span]:
        if name.endswith(".parquet"):
            return parquet_spans(path, name)
        with naming(path):
            return [Span(path, name, path.stat().st_size, self.scheme)]


def _content_digest(path: Path) -> str:
    """Digest of the size and the content; of a large file, of its two ends only, to be quick."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE:
            digest.update(file.read())
        else:
            digest.update(file.read(_HASHED_END))
            file.seek(size - _HASHED_END)
            digest.update(file.read())
    return digest.hexdigest()


def _grouped(spans: Iterable[Span], limit: int) -> Iterator[tuple[Span, ...]]:
    group: list[Span] = []
    size = 0
    for span in spans:
        if group and size + span.size > limit:
            yield tuple(group)
            group, size = [], 0
        group.append(span)
        size += span.size
    if group:
        yield tuple(group)


def file_source(spec: str) -> FileSource:
    """The source that `--source spec` names: a file, a folder or a glob; or a `UserError`."""
    path = Path(spec)
    if path.is_file():
        if not spec.endswith(SUFFIXES):
            raise UserError(f"cannot tell what {spec} is: a source ends in {', '.join(SUFFIXES)}")
        return FileSource(path.name, ((path, path.name),))
    if path.is_dir():
        files = _walk(path, SUFFIXES)
        name = path.resolve().name
    elif glob.has_magic(spec):
        files = _matches(spec)
        name = path.name
    else:
        raise UserError(f"no file or folder {spec}: name an existing one with --source, or stdlib")
    if not files:
        raise UserError(f"nothing in {spec} ends in {', '.join(SUFFIXES)}: name another --source")
    return FileSource(name, tuple(files))


def stdlib_source() -> FileSource:
    """The sources and texts of the running Python's standard library, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = _walk(folder, (".py", ".txt"), _LEFT_OUT)
    if not files:
        raise UserError(f"this Python keeps no library sources in {folder}: name a --source")
    return FileSource(f"{STDLIB} of Python {platform.python_version()}", tuple(files), "stdlib:")


def _matches(pattern: str) -> list[tuple[Path, str]]:
    """Files that a glob finds, with their names below its first folder that is no pattern."""
    root = Path(pattern)
    while glob.has_magic(str(root)):
        root = root.parent
    paths = (Path(match) for match in glob.iglob(pattern, recursive=True))
    files = {path for path in paths if path.name.endswith(SUFFIXES) and path.is_file()}
    return _sorted_by_name(files, root)


def _walk(
    root: Path, suffixes: tuple[str, ...], left_out: frozenset[str] = frozenset()
) -> list[tuple[Path, str]]:
    """Files below `root` with one of `suffixes`, outside folders that are `left_out`."""
    files = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        files += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return _sorted_by_name(files, root)


def _sorted_by_name(files: Iterable[Path], root: Path) -> list[tuple[Path, str]]:
    named = ((path, path.relative_to(root).as_posix()) for path in files)
    return sorted(named, key=lambda pair: pair[1])


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror}")
