"""Text files at URLs that fsspec opens. They are read in place, parquet by row groups.

Of parquet only the columns that are needed are fetched, a row group at a time. Every request that
fails is sent again, with growing pauses; so a reader goes on in the middle of a file.
"""

import hashlib
import io
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from data_prep.reading.files import grouped
from data_prep.reading.readers import (
    JSON_LINES,
    PARQUET,
    SUFFIXES,
    SUFFIXES_IN_WORDS,
    TextFile,
    naming,
    open_parquet,
    read_rows,
    read_text_file,
    row_groups,
)
from data_prep.reading.row_filter import for_sample, no_columns
from data_prep.reading.streams import PACKINGS, HashedFile, encoding_of
from data_prep.reading.where import Where
from data_prep.retries import retried, why
from data_prep.sources import Part, Record, Source, clean_file_name
from i3dist.data.download import shown
from i3dist.errors import UserError

_BLOCK = 1 << 22
"""Bytes of a request, at the most: what is fetched again after a failure."""

_FIRST_BLOCK = 1 << 13
_PART = 1 << 26
_THREADS = 16
_SOCKET_SECONDS = 30
_SIZED = ("http", "https", "hf")  # whose files can be opened without a request for their size
_HIDDEN = (".", "_", "~$")


@dataclass(frozen=True)
class RemoteFile(TextFile):
    """A file at a URL, without the protocol where `path` has none."""

    url: str
    path: str
    size: int

    @property
    def place(self) -> str:
        """Its URL, without a password."""
        return shown(self.url)

    @property
    def file_name(self) -> str:
        """The last part of the URL."""
        return posixpath.basename(_url_path(self.path))

    def open(self, block: int = 0) -> BinaryIO:
        """The file, at its start. With a `block` it is read in blocks of so many bytes."""
        raw: Any = _Retried(self)
        return io.BufferedReader(raw, block) if block else raw


class _Retried(io.RawIOBase):
    """A file at a URL. It is fetched as it is read, and nothing is kept."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._place = 0
        self._handle: Any = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, which costs nothing."""
        self._place = offset + (0, self._place, self._file.size)[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Fetch so many bytes, or all up to the end."""
        size = self._file.size if size < 0 else size
        parts = []
        while size > 0 and (part := super().read(min(size, _BLOCK))):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Fetch bytes into `target`; returns their number."""
        length = max(0, min(len(target), self._file.size - self._place, _BLOCK))
        if length:
            data = retried(lambda: self._fetch(length), self._file.place)
            target[:length] = data
            self._place += length
        return length

    def _fetch(self, length: int) -> bytes:
        if self._handle is None:
            self._handle = _open(self._file)
        self._handle.seek(self._place)
        data: bytes = self._handle.read(length)
        if len(data) != length:
            raise OSError(f"{len(data):,} bytes came instead of {length:,}")
        return data


def _open(file: RemoteFile) -> Any:
    filesystem, path = _filesystem(file.url)
    options: dict[str, Any] = {"cache_type": "none", "block_size": _BLOCK}
    if urlsplit(file.url).scheme in _SIZED:
        options["size"] = file.size
    return filesystem.open(path, "rb", **options)


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and its path there."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if urlsplit(url).scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        limits = {"sock_connect": _SOCKET_SECONDS, "sock_read": _SOCKET_SECONDS}
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, **limits)}
    try:
        filesystem, path = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot open --source {shown(url)}: {why(error)}; install what it asks for, or "
            "copy the files to a folder and name that"
        ) from None
    return filesystem, path


@dataclass(frozen=True)
class RemoteSpan:
    """A row group of a parquet file, or all of another file. `size` estimates the bytes of text."""

    file: RemoteFile
    size: int
    row_group: int | None = None
    first_row: int = 0


@dataclass(frozen=True)
class RemotePart(Part):
    """Some consecutive files or row groups; `revision` is that of the source."""

    spans: tuple[RemoteSpan, ...]
    revision: str

    def records(self) -> Iterator[Record]:
        """Read the documents in order."""
        for file, spans in groupby(self.spans, file_of):
            with _naming(file):
                yield from _read_parquet(file, spans) if file.is_a(PARQUET) else _read_text(file)

    @property
    def size(self) -> int:
        """Bytes of the files, or of the row groups before compression."""
        return sum(span.size for span in self.spans)

    @property
    def identity(self) -> str:
        """The revision, and what is read of which file."""
        places = [f"{span.file.number} {span.row_group} {span.first_row}" for span in self.spans]
        return hashlib.sha256("\n".join((self.revision, *places)).encode()).hexdigest()


def file_of(span: RemoteSpan) -> RemoteFile:
    """The file of a span."""
    return span.file


def _read_parquet(file: RemoteFile, spans: Iterable[RemoteSpan]) -> Iterator[Record]:
    with file.open() as handle, open_parquet(handle, file.column) as parquet:
        for span in spans:
            if span.row_group is not None:
                with _naming(file, f", row group {span.row_group}"):
                    yield from read_rows(parquet, file, span.row_group, span.first_row)


def _read_text(file: RemoteFile) -> Iterator[Record]:
    with file.open(_FIRST_BLOCK) as start:
        encoding = encoding_of(start, file.file_name)
    if not file.size and file.is_a(*PACKINGS[1:]):
        raise EOFError("it is empty")
    with file.open(_BLOCK) as handle:
        yield from read_text_file(file, HashedFile(handle), encoding, 0)


@contextmanager
def _naming(file: RemoteFile, where: str = "") -> Iterator[None]:
    with naming(f"{file.place}{where}"):
        yield


@dataclass(frozen=True)
class RemoteSource(Source):
    """Files at URLs, in the order of their names. `tags` say which content they have."""

    name: str
    remote_files: tuple[RemoteFile, ...]
    tags: tuple[str, ...]
    left_out: str = ""

    @cached_property
    def revision(self) -> str:
        """A digest of every file's name, size and tag."""
        digest = hashlib.sha256()
        for file, tag in zip(self.remote_files, self.tags, strict=True):
            digest.update(f"{file.name.encode().hex()} {file.size} {tag}\n".encode())
        return f"names, sizes and tags {digest.hexdigest()}"

    def parts(self) -> Sequence[RemotePart]:
        """Parts of about equal size."""
        return remote_parts(self.remote_files, self.revision)

    def chosen(self, where: str) -> "RemoteSource":
        """See `Source.chosen`.

        Raises:
            UserError: a file has no columns, or the expression is wrong.
        """
        for file in self.remote_files:
            if not file.is_a(PARQUET, *JSON_LINES):
                raise no_columns(file.place)
        condition = Where.parse(where)
        files = tuple(replace(file, where=condition) for file in self.remote_files)
        return replace(self, remote_files=files)

    def with_text_column(self, column: str) -> "RemoteSource":
        """The source with another column, or key, as its text."""
        files = tuple(replace(file, column=column) for file in self.remote_files)
        return replace(self, name=f"{self.name}, column {column}", remote_files=files)


def remote_parts(files: Sequence[RemoteFile], revision: str) -> list[RemotePart]:
    """Parts of about equal size. The footers of parquet files are read, many at a time."""
    files = _with_columns_of_lines(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        spans = [span for found in pool.map(_spans_of, files) for span in found]
    return [RemotePart(group, revision) for group in grouped(spans, _PART)]


def _with_columns_of_lines(files: Sequence[RemoteFile]) -> Sequence[RemoteFile]:
    """The files; those of jsonl with a condition for the columns in a sample of their lines."""
    lines = [file for file in files if file.where and file.is_a(*JSON_LINES)]
    if not lines or not lines[0].where:
        return files
    readers = [partial(_read_text, file.unfiltered()) for file in lines]
    place = lines[0].place if len(lines) == 1 else "the jsonl"
    where = for_sample(lines[0].where, readers, place)
    return [replace(file, where=where) if file.is_a(*JSON_LINES) else file for file in files]


def _spans_of(file: RemoteFile) -> list[RemoteSpan]:
    if not file.is_a(PARQUET):
        return [RemoteSpan(file, file.size)]
    with _naming(file), file.open() as handle:
        groups = row_groups(handle, file)
    return [
        RemoteSpan(file, group.size, number, group.first_row) for number, group in enumerate(groups)
    ]


def url_source(url: str) -> RemoteSource:
    """The files at a URL: of one file, of a folder, or of a glob.

    Raises:
        UserError: there is no such file, nothing there is a file of text, or it cannot be asked.
    """
    filesystem, path = retried(lambda: _filesystem(url), shown(url))  # ftp connects here
    root, found = retried(lambda: _listed(filesystem, path), shown(url))
    names = {info["name"]: _name_below(root, info["name"]) for info in found}
    wanted = [info for info in found if _is_source(names[info["name"]])]
    if not wanted:
        raise UserError(
            f"nothing at {shown(url)} ends in {SUFFIXES_IN_WORDS}: name another --source"
        )
    wanted.sort(key=lambda info: names[info["name"]])
    files = tuple(
        RemoteFile(
            names[info["name"]], number, filesystem.unstrip_protocol(info["name"]), info["name"],
            _size(filesystem, info),
        )
        for number, info in enumerate(wanted)
    )  # fmt: skip
    others = len(found) - len(wanted)
    left_out = f"hidden and other files ({others:,})" if others else ""
    name = unquote(posixpath.basename(_url_path(path).rstrip("/"))) or shown(url)
    tags = tuple(_tag(info) for info in wanted)
    return RemoteSource(clean_file_name(name), files, tags, left_out)


def _listed(filesystem: Any, path: str) -> tuple[str, list[dict[str, Any]]]:
    """The folder that names are below, and the files there."""
    if _url_path(path).lower().endswith(SUFFIXES) and "*" not in path:
        info = filesystem.info(path)
        if info["type"] == "other":  # on a disk
            raise UserError(f"{path} is no file or folder: name another --source")
        if info["type"] != "directory":  # of sftp also a link
            return posixpath.dirname(path), [info]
    if "*" in path:
        root = path[: path.index("*")].rpartition("/")[0]
        found = filesystem.glob(path, detail=True)
    else:
        root, found = path, filesystem.find(path, detail=True)
    return root, [info for info in found.values() if info["type"] not in ("directory", "other")]


def _name_below(root: str, path: str) -> str:
    """The name of a file below the folder `root`, as it would be on a disk."""
    name = _url_path(path).removeprefix(root).strip("/")
    return clean_file_name(unquote(name, errors="surrogateescape")) if "://" in path else name


def _is_source(name: str) -> bool:
    hidden = (part.startswith(_HIDDEN) and "=" not in part for part in name.split("/")[:-1])
    is_hidden = any(hidden) or posixpath.basename(name).startswith((".", "~$"))
    return not is_hidden and name.lower().endswith(SUFFIXES)


def _url_path(path: str) -> str:
    """A path without the query that one of http may have."""
    return path.partition("?")[0] if "://" in path else path


def _size(filesystem: Any, info: dict[str, Any]) -> int:
    size = info.get("size")
    if size is None:
        place = info["name"]
        size = retried(lambda: filesystem.info(place), shown(place)).get("size")
    if size is None:
        raise UserError(f"{shown(info['name'])} does not say its size: download it, and name it")
    return int(size)


def _tag(info: dict[str, Any]) -> str:
    """What a store says of a file that differs where its content does."""
    keys = ("ETag", "etag", "blob_id", "md5Hash", "generation", "mtime", "LastModified", "created")
    return next((f"{key} {info[key]}" for key in keys if info.get(key)), "")
