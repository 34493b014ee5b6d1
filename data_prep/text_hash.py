"""The hashes that tell which documents are duplicates of each other.

Texts are duplicates if they are equal up to white space, case and the form of Unicode in which
characters are written. Pass 1 writes the hashes of a run's documents beside the run, in the order
of its rows.
"""

import codecs
import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import regex
from numpy.typing import NDArray

from i3dist.files import written_aside

HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
"""Both halves of a text's hash, and the document's number in its part of the source."""

_WHITE_SPACE = bytes(code for code in range(128) if chr(code).isspace())
_LOWER = bytes(range(256)).lower()
_SLICE = 1 << 20  # bytes that are normalized at once, because that takes many times the memory

_MOST_MARKS = 1024
# A character that Unicode's forms may join with the one before it, or move past it.
_MARK = r"(?:[^\p{ccc=0}]|[\u0f73\u0f75\u0f81])"
_MANY_MARKS = regex.compile(rf"{_MARK}{{{_MOST_MARKS}}}")
_HALF_AS_MANY = regex.compile(rf"{_MARK}{{{_MOST_MARKS // 2}}}")
_LAST_START = regex.compile(rf"(?r)(?!{_MARK}).", regex.DOTALL)
_JOINER = "\u034f"  # no mark moves past it


def normalized(text: bytes) -> Iterator[bytes]:
    """The pieces of a form that is equal for all texts in UTF-8 of equal characters.

    White space and case do not count. These are the canonical caseless matches of the Unicode
    standard (D145). Folding the case of decomposed text leaves it decomposed, so it need not be
    done again. Marks beyond 1,024 in a row also have to be in the same order.
    """
    left = ""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _SLICE):
        part = text[start : start + _SLICE].translate(_LOWER, _WHITE_SPACE)
        if part.isascii():
            characters = left + part.decode()
        else:
            characters = _with_joiners(left + "".join(decoder.decode(part).split()))
        last = _LAST_START.search(characters)
        stop = last.start() if last else 0
        yield _decomposed(characters[:stop])
        left = characters[stop:]
    yield _decomposed(left)


def _decomposed(characters: str) -> bytes:
    return unicodedata.normalize("NFD", characters).casefold().encode()


def _with_joiners(characters: str) -> str:
    """The characters with a joiner after each 1,024 marks in a row.

    Unicode's forms sort marks, in a time that grows with the square of their number.
    """
    half = _MOST_MARKS // 2  # so many in a row cover a whole window of half as many
    starts = range(0, len(characters) - half + 1, half)
    if not any(_HALF_AS_MANY.match(characters, start) for start in starts):
        return characters
    return _MANY_MARKS.sub(rf"\g<0>{_JOINER}", characters)


def text_hash(text: bytes) -> bytes:
    """16 bytes that are equal for texts which are duplicates of each other."""
    found = hashlib.blake2b(digest_size=16)
    for piece in normalized(text):
        found.update(piece)
    return found.digest()


def write_hashes(hashes: Sequence[bytes], places: Sequence[int], run: Path) -> None:
    """Write the results of `text_hash` and the places of the documents of a run."""
    table = np.empty(len(hashes), HASH)
    table["high"], table["low"] = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).T
    table["place"] = places
    with written_aside(_path(run)) as partial, partial.open("wb") as file:
        np.save(file, table)


def read_hashes(run: Path) -> NDArray[np.void]:
    """The hashes of a run's documents: `HASH` [rows]."""
    found: NDArray[np.void] = np.load(_path(run))
    return found


def _path(run: Path) -> Path:
    return run.with_suffix(".hashes")
