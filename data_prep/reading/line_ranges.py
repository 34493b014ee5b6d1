"""Cuts a text file at line ends, so that several workers can read it."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_prep.evidence import Saved, State
from i3dist.files import write_whole

_BLOCK = 1 << 20
_THREADS = 8
_LINE_FEED = 10


class LineRange(NamedTuple):
    """The bytes from `start` to `stop`: whole lines, the first of which has number `first_line`."""

    start: int
    stop: int
    first_line: int


class LineRecord(Saved):
    """The ranges that a file of this state was cut into."""

    state: State
    parts: int
    ranges: tuple[LineRange, ...]

    @classmethod
    def ranges_of(
        cls, file: BinaryIO, state: State, parts: int, path: Path | None
    ) -> Sequence[LineRange]:
        """As `line_ranges`; kept at `path`, and taken from there if the file has the same state."""
        former = cls.load(path) if path else None
        if former and (former.state, former.parts) == (state, parts):
            return former.ranges
        ranges = line_ranges(file, state[0], parts)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            record = cls(state=state, parts=parts, ranges=tuple(ranges))
            write_whole(path, record.model_dump_json().encode())
        return ranges


class _Lines(NamedTuple):
    """How many line ends some bytes hold, and the place of the first, None if there is none."""

    ends: int
    first: int | None


def line_ranges(file: BinaryIO, size: int, parts: int) -> list[LineRange]:
    """Cut a file of `size` bytes into `parts` ranges of about equal length.

    There are fewer where a line is longer than a part. A line ends after a byte LF. The file is
    read once, by several threads, to count its lines.
    """
    marks = [size * number // parts for number in range(parts + 1)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda ends: _scan(file.fileno(), *ends), pairwise(marks)))
    ranges = []
    start = first_line = lines = 0
    for number, stretch in enumerate(found):
        if number and stretch.first is not None and stretch.first + 1 < size:
            ranges.append(LineRange(start, stretch.first + 1, first_line))
            start, first_line = stretch.first + 1, lines + 1
        lines += stretch.ends
    return [*ranges, LineRange(start, size, first_line)]


def _scan(handle: int, start: int, stop: int) -> _Lines:
    count, first = 0, None
    for place, block in _blocks(handle, start, stop):
        ends = np.frombuffer(block, np.uint8) == _LINE_FEED
        here = int(np.count_nonzero(ends))
        if here and first is None:
            first = place + int(ends.argmax())
        count += here
    return _Lines(count, first)


def _blocks(handle: int, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    while start < stop and (block := os.pread(handle, min(_BLOCK, stop - start), start)):
        yield start, block
        start += len(block)
