"""The hashes that tell which documents are duplicates of each other.

Texts are duplicates if they are equal up to white space, case and the form of Unicode in which
characters are written. Pass 1 writes the hashes of a run's documents beside the run, in the order
of its rows.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from i3dist.files import written_aside

HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
"""Both halves of a text's hash, and the document's number in its part of the source."""

_WHITE_SPACE = bytes(code for code in range(128) if chr(code).isspace())
_LOWER = bytes(range(256)).lower()


def normalized(text: bytes) -> bytes:
    """A text in UTF-8 without white space, in a form that is equal for texts of equal characters.

    Case does not count. These are the canonical caseless matches of the Unicode standard (D145).
    Folding the case of decomposed text leaves it decomposed, so it need not be done again.
    """
    text = text.translate(_LOWER, _WHITE_SPACE)
    if text.isascii():
        return text
    return unicodedata.normalize("NFD", "".join(text.decode().split())).casefold().encode()


def text_hash(text: bytes) -> bytes:
    """16 bytes that are equal for texts which are duplicates of each other."""
    return hashlib.blake2b(normalized(text), digest_size=16).digest()


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
