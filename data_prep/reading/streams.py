"""The bytes of a text file: hashed as they are read, decompressed, and turned into UTF-8.

A compressed file may consist of several members, one after the other. All are read. A damaged
member, or anything else between members, is an error: the readers of most libraries end there
silently.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

import zstandard

PACKINGS = ("", ".gz", ".zst", ".bz2", ".xz")
_BUFFER = 1 << 17
# Bytes decompressed at a time: few, because a few bytes of zstd may stand for 128 KiB.
_INPUT = 1 << 13
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` makes
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class HashedFile(io.RawIOBase):
    """The next `length` bytes of a file, or all; hashes what is read."""

    def __init__(self, file: BinaryIO, length: int = sys.maxsize) -> None:
        self._file = file
        self._left = length
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Read into `target`; returns the number of bytes."""
        data = self._file.read(min(len(target), self._left))
        self._left -= len(data)
        self._digest.update(data)
        target[: len(data)] = data
        return len(data)

    def sha256(self) -> str:
        """SHA-256 of all of it; reads what is left."""
        while self.read(_BUFFER):
            pass
        return self._digest.hexdigest()


class _Parts(io.RawIOBase):
    """A file of the bytes that an iterator yields."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Read into `target`; returns the number of bytes."""
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _members(file: BinaryIO, begin: Callable[[], Any], *limit: int) -> Iterator[bytes]:
    """Decompress all members of a file, a little at a time.

    `begin` makes the decompressor of one member. `limit` is the most bytes that it may return at
    once; a decompressor of zstd takes no limit.
    """
    packed = file.read(_INPUT)
    while packed:
        if packed.startswith(b"\0"):  # lzma takes many zeros for a member of its oldest format
            raise EOFError("there are zeros where a member should begin")
        member = begin()
        while not member.eof:
            if getattr(member, "needs_input", True):
                packed = packed or file.read(_INPUT)
                if not packed:
                    raise EOFError("it ends inside a member")
            yield member.decompress(packed, *limit)
            packed = b""
        packed = member.unused_data
        if isinstance(member, lzma.LZMADecompressor):
            packed = _after_padding(file, packed)
        packed = packed or file.read(_INPUT)


def _after_padding(file: BinaryIO, packed: bytes) -> bytes:
    """What follows the zeros after a member of xz. Zeros beyond a multiple of 4 stay: an error."""
    zeros = 0
    while packed := packed or file.read(_INPUT):
        rest = packed.lstrip(b"\0")
        zeros += len(packed) - len(rest)
        packed = rest
        if rest:
            break
    return bytes(zeros % 4) + packed


def read_text(file: HashedFile, name: str, encoding: str | None) -> bytes:
    """All of a text file in UTF-8, without its byte-order mark.

    `encoding` is that of `encoding_of`. Bytes that cannot be decoded stay as they are.
    """
    data = decompressed(file, name).read().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode(encoding).encode() if encoding else data
    except UnicodeError:
        return data


def read_lines(file: HashedFile, name: str, encoding: str | None) -> Iterator[bytes]:
    """The lines of a text file in UTF-8; only LF ends a line. See `encoding_of` for `encoding`."""
    stream = decompressed(file, name)
    if encoding is None:
        yield from stream
    else:
        lines = io.TextIOWrapper(stream, encoding, "surrogatepass", newline="\n")
        yield from map(partial(str.encode, encoding="utf-8", errors="surrogatepass"), lines)


def encoding_of(file: BinaryIO, name: str) -> str | None:
    """The encoding named by a byte-order mark at the start; None for UTF-8, marked or not.

    `file` stands at its start, and is closed afterwards.
    """
    start = decompressed(file, name).read(4)
    # A mark with nothing after it does not count: two such bytes are no text in any encoding.
    return next((code for mark, code in _MARKS if start.startswith(mark) and len(start) == 4), None)


def decompressed(file: BinaryIO | HashedFile, name: str) -> io.BufferedReader:
    """The file's bytes, decompressed as the end of its name says."""
    kind = name.lower()
    raw: Any = file
    if kind.endswith(".gz"):
        raw = gzip.GzipFile(fileobj=raw)
    elif kind.endswith(".zst"):
        # The reader of zstandard takes a truncated file for a whole one.
        frames = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        raw = _Parts(_members(raw, frames.decompressobj))
    elif kind.endswith(".bz2"):
        raw = _Parts(_members(raw, bz2.BZ2Decompressor, _BUFFER))
    elif kind.endswith(".xz"):
        raw = _Parts(_members(raw, lzma.LZMADecompressor, _BUFFER))
    return io.BufferedReader(raw, _BUFFER)
