"""The shards that a manifest lists, and their text in it, for millions of shards.

In a valid manifest all shards but the last are alike, and names count up. So a shard's row follows
from its number and its SHA-256. `ShardTable` keeps the hashes alone, makes rows of text from them,
and reads a manifest by comparing its text with the rows that it must have.

Notation: N shards, W bytes of a row.
"""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, BinaryIO, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Bytes = NDArray[np.uint8]
Count = Annotated[int, Field(ge=1, le=1 << 53)]
Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]

_HASH_BYTES = 32
_NO_HASH = "0" * (2 * _HASH_BYTES)
_BLOCK = 1 << 16  # rows that are made, read or compared at once
_NAME = "shard-"
_DIGITS = 6
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_NOT_HEX = 255
_VALUE_OF_HEX = np.full(256, _NOT_HEX, np.uint8)
_VALUE_OF_HEX[_HEX] = np.arange(16)


def shard_name(shard: int) -> str:
    """File name of shard `shard`: six digits, and seven from shard 1,000,000 on."""
    return f"{_NAME}{shard:0{_DIGITS}d}.tar"


def shard_number(name: str) -> int | None:
    """The shard whose file name is `name`; None if no shard has that name."""
    digits = name[len(_NAME) : -len(".tar")]
    if not (digits.isascii() and digits.isdigit()):
        return None
    return int(digits) if name == shard_name(int(digits)) else None


class Frozen(BaseModel):
    """A part of a manifest: unknown keys and values of another type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(Frozen):
    """One shard file: its name, its number of chunks, its size in bytes and its SHA-256."""

    name: Annotated[str, Field(max_length=64)]
    chunks: Annotated[int, Field(ge=1, le=1_000_000)]
    size: Count
    sha256: Sha256


class Shape(NamedTuple):
    """What a shard holds."""

    chunks: int
    size: int  # bytes


RowStyle = Callable[[Shard], str]


def written_row(shard: Shard) -> str:
    """A shard as `manifest.json` lists it: JSON that is indented by one blank a level."""
    return ",\n" + textwrap.indent(shard.model_dump_json(indent=1), "  ")


def canonical_row(shard: Shard) -> str:
    """A shard in the JSON of the fingerprint: keys are sorted, and nothing is blank."""
    return "," + json.dumps(shard.model_dump(), sort_keys=True, separators=(",", ":"))


class ShardTable(Sequence[Shard]):
    """The shards of a split, at 32 bytes each. Equal to any sequence of equal shards."""

    def __init__(self, hashes: Bytes, full: Shape, last: Shape) -> None:
        """Keep the SHA-256 of each shard, [N, 32]; `full` is the shape of all but the last."""
        self.hashes = hashes
        self.full = full
        self.last = last

    @classmethod
    def read(cls, file: BinaryIO, count: int, full: Shape, last: Shape) -> "ShardTable | None":
        """Read `count` rows that `written_row` made; None if a byte differs from such rows."""
        table = cls(np.zeros((count, _HASH_BYTES), np.uint8), full, last)
        for start, stop in table._blocks():
            row = table._first_row(written_row, start)
            text = file.read(len(row) * (stop - start))
            if len(text) != len(row) * (stop - start):
                return None
            rows = np.frombuffer(text, np.uint8).reshape(stop - start, len(row))
            values = _VALUE_OF_HEX[rows[:, _hash_place(row)]]
            if (values == _NOT_HEX).any():
                return None
            table.hashes[start:stop] = values[:, 0::2] << 4 | values[:, 1::2]
            if not np.array_equal(table._rows(written_row, start, stop), rows):
                return None
        return table

    def text(self, style: RowStyle) -> Iterator[bytes]:
        """All rows, in pieces; the first row has no comma before it."""
        for start, stop in self._blocks():
            yield self._rows(style, start, stop).tobytes()

    def __len__(self) -> int:
        return len(self.hashes)

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Shard, ...]: ...

    def __getitem__(self, index: int | slice) -> Shard | tuple[Shard, ...]:
        numbers = range(len(self))[index]
        return (
            self._shard(numbers) if isinstance(numbers, int) else tuple(map(self._shard, numbers))
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ShardTable):
            shapes = (self.full, self.last) == (other.full, other.last) or len(self) == 1
            same = shapes and self.last == other.last
            return same and np.array_equal(self.hashes, other.hashes)
        if not isinstance(other, tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _shape(self, number: int) -> Shape:
        return self.last if number == len(self) - 1 else self.full

    def _shard(self, number: int) -> Shard:
        return Shard(
            name=shard_name(number),
            sha256=self.hashes[number].tobytes().hex(),
            **self._shape(number)._asdict(),
        )

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of shards whose rows are equally long."""
        count = len(self)
        ends = {0, 1, 10**_DIGITS, count - 1, count, *range(0, count, _BLOCK)}
        ends = {end for end in ends if end <= count}
        yield from zip(sorted(ends)[:-1], sorted(ends)[1:], strict=True)

    def _first_row(self, style: RowStyle, number: int) -> bytes:
        """The row of shard `number` with zeros for its hash."""
        shape = self._shape(number)._asdict()
        row = style(Shard(name=shard_name(number), sha256=_NO_HASH, **shape))
        return row[number == 0 :].encode()

    def _rows(self, style: RowStyle, start: int, stop: int) -> Bytes:
        """Rows of text, [stop - start, W], of shards that `_blocks` gives together."""
        first = self._first_row(style, start)
        rows = np.tile(np.frombuffer(first, np.uint8), (stop - start, 1))
        digits = len(shard_name(start)) - len(shard_name(0)) + _DIGITS
        at = first.index(_NAME.encode()) + len(_NAME)
        powers = 10 ** np.arange(digits - 1, -1, -1)
        rows[:, at : at + digits] = np.arange(start, stop)[:, None] // powers % 10 + ord("0")
        hashes, place = self.hashes[start:stop], _hash_place(first).start
        rows[:, place : place + 2 * _HASH_BYTES : 2] = _HEX[hashes >> 4]
        rows[:, place + 1 : place + 2 * _HASH_BYTES : 2] = _HEX[hashes & 15]
        return rows


def _hash_place(row: bytes) -> slice:
    """Where the hash stands in a row of `_first_row`."""
    start = row.index(_NO_HASH.encode())
    return slice(start, start + len(_NO_HASH))
