"""The bytes of a text file: hashed as they are read, decompressed, and as UTF-8.

Decompression is Python's own where it has one: pyarrow's ends silently after the first member of a
file that was made of several.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

PACKINGS = ("", ".gz", ".zst", ".bz2", ".xz")
_BUFFER = 1 << 17
# A compressed block of a few bytes may stand for 128 KiB, so little is decompressed at a time.
_ZSTD_INPUT = 1 << 13
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` makes
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class HashedFile(io.RawIOBase):
    """A file that hashes what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Read into `target`; returns the number of bytes."""
        data = self._file.read(len(target))
        self._digest.update(data)
        target[: len(data)] = data
        return len(data)

    def sha256(self) -> str:
        """SHA-256 of the whole file; reads what nobody has read."""
        while self.read(_BUFFER):
            pass
        return self._digest.hexdigest()


class _ZstdReader(io.RawIOBase):
    """Decompresses all frames of a file.

    zstandard's own reader takes a file that was cut for a whole one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._format = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Read into `target`; returns the number of bytes."""
        while not self._plain:
            if not self._decompress():
                return 0
        count = min(len(target), len(self._plain))
        target[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _decompress(self) -> bool:
        """Decompress a little; False at the end."""
        self._packed = self._packed or self._file.read(_ZSTD_INPUT)
        if not self._packed:
            if self._frame and not self._frame.eof:
                raise EOFError("it ends inside a frame")
            return False
        if not self._frame or self._frame.eof:
            self._frame = self._format.decompressobj()
        self._plain = memoryview(self._frame.decompress(self._packed))
        self._packed = self._frame.unused_data
        return True


def read_text(file: HashedFile, name: str, encoding: str | None) -> bytes:
    """All of a text file in UTF-8, without its byte-order mark; `encoding` is what `encoding_of`
    says. What cannot be decoded stays as it is."""
    data = decompressed(file, name).read().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode(encoding).encode() if encoding else data
    except UnicodeError:
        return data


def read_lines(file: HashedFile, name: str, encoding: str | None) -> Iterator[bytes]:
    """The lines of a text file in UTF-8, ended by LF; `encoding` is what `encoding_of` says."""
    stream = decompressed(file, name)
    if encoding is None:
        yield from stream
    else:
        for line in io.TextIOWrapper(stream, encoding, "surrogatepass", newline="\n"):
            yield line.encode("utf-8", "surrogatepass")


def encoding_of(path: Path) -> str | None:
    """The encoding that a mark at the start of a text names; None for UTF-8, marked or not."""
    with path.open("rb") as file:
        start = decompressed(file, path.name).read(4)
    # A mark with nothing after it tells nothing: two such bytes are no text in any encoding.
    return next((code for mark, code in _MARKS if start.startswith(mark) and len(start) == 4), None)


def decompressed(file: BinaryIO | HashedFile, name: str) -> io.BufferedReader:
    """The file's bytes, decompressed as the end of its name says."""
    kind = name.lower()
    raw: Any = file
    if kind.endswith(".gz"):
        raw = gzip.GzipFile(fileobj=raw)
    elif kind.endswith(".zst"):
        raw = _ZstdReader(raw)
    elif kind.endswith(".bz2"):
        raw = bz2.BZ2File(raw)
    elif kind.endswith(".xz"):
        raw = lzma.LZMAFile(raw)  # noqa: SIM115
    return io.BufferedReader(raw, _BUFFER)
