"""Rows of index.parquet, and how they compare with the tokens of a shard."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.checks.damage import Damage, token_place
from data_prep.checks.stream import Stream
from data_prep.pack import INDEX_NAME

Ints = NDArray[np.int64]
NUMBERS = ("document", "piece", "shard", "chunk", "offset", "length")
"""The columns that are numbers."""


class Rows(NamedTuple):
    """Consecutive rows: the number of the first, and the columns that are numbers, int64 [R]."""

    first: int
    document: Ints
    piece: Ints
    shard: Ints
    chunk: Ints
    offset: Ints
    length: Ints

    @classmethod
    def of(cls, first: int, batch: pa.RecordBatch) -> Self:
        """The rows of a batch that has the columns `NUMBERS`; a null becomes -1."""
        return cls(first, *(integers(batch.column(name)) for name in NUMBERS))

    @property
    def total(self) -> int:
        """Number of rows."""
        return len(self.document)

    def part(self, start: int, stop: int) -> Self:
        """The rows [start, stop) of these."""
        return type(self)(self.first + start, *(column[start:stop] for column in self[1:]))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Rows that follow each other, one part or more."""
        parts = [part for part in parts if part.total] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        columns = (np.concatenate(column) for column in list(zip(*parts, strict=True))[1:])
        return cls(parts[0].first, *columns)

    @classmethod
    def none(cls, first: int) -> Self:
        """No rows."""
        return cls(first, *[np.empty(0, np.int64)] * len(NUMBERS))


def integers(column: pa.Array) -> Ints:
    """The column as int64; a null becomes -1."""
    if column.null_count:
        return np.array([-1 if value is None else value for value in column.to_pylist()], np.int64)
    return np.from_dlpack(column).astype(np.int64, copy=False)  # `to_numpy` would import pandas


def row_damage(stream: Stream, row: int, problem: str) -> Damage:
    """A damage in a row of the index."""
    return Damage(stream.file(INDEX_NAME), f"row {row}", problem)


class Stated(NamedTuple):
    """What the rows of a shard state of it.

    `ends` are the tokens at which its pieces begin and end, ascending; none without rows, or if
    they are in disorder. `places` are theirs in the file (`Stream.places`). With `fills` the rows
    fill a whole shard piece by piece, as those of the format do, and each piece has three tokens or
    more.
    """

    rows: Rows | None
    ends: Ints
    places: Ints
    fills: bool = False


NOTHING = Stated(None, np.empty(0, np.int64), np.empty(0, np.int64))
"""What no rows state."""


def stated(stream: Stream, first: int, rows: Rows, owners: Sequence[int]) -> list[Stated]:
    """What the rows of consecutive shards from number `first` on state; each has so many rows."""
    starts = rows.chunk * stream.chunk_length + rows.offset
    ends = np.stack((starts, starts + rows.length - 1), axis=1)
    stops = list(accumulate(owners))
    begins = [0, *stops[:-1]]
    places = stream.places(ends)
    wrong = _not_in_line(stream, first, rows, owners, ends, begins)
    found = []
    for begin, stop in zip(begins, stops, strict=True):
        part = rows.part(begin, stop)
        if begin == stop or wrong[begin:stop].any():
            in_order = _ascending(stream, part)
            found.append(Stated(part, in_order, stream.places(in_order)))
        else:
            fills = bool(ends[stop - 1, 1] == stream.shard_tokens - 1)
            here = slice(begin, stop)
            found.append(Stated(part, ends[here].reshape(-1), places[here].reshape(-1), fills))
    return found


def _not_in_line(
    stream: Stream, first: int, rows: Rows, owners: Sequence[int], ends: Ints, begins: list[int]
) -> NDArray[np.bool_]:
    """Which rows do not go on where the one before ends, or have less than three tokens, [R].

    Args:
        stream: the split.
        first: number of the first shard.
        rows: the rows of consecutive shards, each of which begins anew.
        owners: number of rows of each shard.
        ends: the first and last token of each row, [R, 2].
        begins: the first row of each shard.
    """
    begins = [begin for begin, count in zip(begins, owners, strict=True) if count]
    follows = np.empty(rows.total, np.int64)
    follows[1:] = ends[:-1, 1] + 1
    follows[begins] = 0
    continues = rows.piece != 0
    continues[begins] = False
    shards = np.repeat(np.arange(first, first + len(owners)), owners)
    is_place = (rows.offset >= 0) & (rows.offset < stream.chunk_length) & (rows.shard == shards)
    return ~is_place | (ends[:, 0] != follows) | (rows.length < 3) | continues


def _ascending(stream: Stream, rows: Rows) -> Ints:
    """Where pieces begin and end by the rows of a shard, if that is in order."""
    starts = rows.chunk * stream.chunk_length + rows.offset
    ends = np.stack((starts, starts + rows.length - 1), axis=1).reshape(-1)
    steps = np.diff(ends, prepend=-1)
    # A piece of one token begins and ends there.
    return ends[steps > 0] if steps.min(initial=0) >= 0 else ends[:0]


def compare_rows(
    stream: Stream, number: int, rows: Rows, starts: Ints, stops: Ints, begins_inside: bool
) -> Iterator[Damage]:
    """What is wrong with the rows of a shard.

    Args:
        stream: the split.
        number: the shard's.
        rows: its rows.
        starts: the tokens of the shard at which its pieces begin, ascending, int64 [P].
        stops: the tokens before which they end.
        begins_inside: whether the first piece continues a document.
    """
    chunks, offsets = np.divmod(starts, stream.chunk_length)
    if (
        len(starts) == rows.total > 0
        and (rows.shard == number).all()
        and (rows.chunk == chunks).all()
        and (rows.offset == offsets).all()
        and (rows.length == stops - starts).all()
        and (rows.piece[0] > 0) == begins_inside
        and not rows.piece[1:].any()
    ):
        return
    stated = rows.chunk * stream.chunk_length + rows.offset
    stated += (rows.shard - number) * stream.shard_tokens
    canonical = (rows.offset >= 0) & (rows.offset < stream.chunk_length) & (rows.chunk >= 0)
    continues = np.zeros(len(starts), bool)
    continues[:1] = begins_inside
    yield from _differences(stream, number, rows, stated, canonical, starts, stops, continues)


def _differences(
    stream: Stream,
    number: int,
    rows: Rows,
    stated: Ints,
    canonical: NDArray[np.bool_],
    starts: Ints,
    stops: Ints,
    continues: NDArray[np.bool_],
) -> Iterator[Damage]:
    """As `compare_rows`, one damage after the other."""
    shard = f"shard {number}"
    piece_at = {int(start): piece for piece, start in enumerate(starts)}
    seen: set[int] = set()
    for row in range(rows.total):
        start, length = int(stated[row]), int(rows.length[row])
        piece = piece_at.get(start) if canonical[row] else None
        if piece is None or piece in seen:
            where = f"shard {rows.shard[row]}, chunk {rows.chunk[row]}, offset {rows.offset[row]}"
            why = "a row before says so too" if piece in seen else "none begins there"
            yield row_damage(stream, rows.first + row, f"says a piece begins at {where}: {why}")
            continue
        if seen and piece < max(seen):
            yield row_damage(stream, rows.first + row, "stands after rows of later pieces")
        seen.add(piece)
        if length != stops[piece] - start:
            problem = f"says its piece has {length:,} tokens; it has {stops[piece] - start:,}"
            yield row_damage(stream, rows.first + row, f"{problem} ({shard})")
        if (rows.piece[row] > 0) != continues[piece]:
            what = "continues" if continues[piece] else "begins"
            problem = f"says piece {rows.piece[row]}, but {shard} {what} a document there"
            yield row_damage(stream, rows.first + row, problem)
    for piece, start in enumerate(starts.tolist()):
        if piece not in seen:
            place = token_place(start, stream.chunk_length)
            problem = f"has no row for the piece that begins at {shard}, {place}"
            yield Damage(stream.file(INDEX_NAME), "", problem)
