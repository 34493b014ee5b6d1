"""Cuts a text file at line ends, so that several workers can read it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import BinaryIO, NamedTuple

import numpy as np

_BLOCK = 1 << 20
_THREADS = 8
_LINE_FEED = 10


class LineRange(NamedTuple):
    """The bytes from `start` to `stop`: whole lines, the first of which has number `first_line`."""

    start: int
    stop: int
    first_line: int


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
