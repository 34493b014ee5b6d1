"""What is wrong in an output of shard.py: one line for each damage."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from i3dist.errors import printable

RESTORE = "restore it, or make the data again"
MAKE_AGAIN = "make the data again"


class Damage(NamedTuple):
    """One damage: the file below DIR, the place in it, the problem, and what to do."""

    file: str
    place: str
    problem: str
    remedy: str = RESTORE

    def __str__(self) -> str:
        """The damage as one line."""
        place = f"{self.file}, {self.place}" if self.place else self.file
        return printable(": ".join((place, "; ".join(filter(None, (self.problem, self.remedy))))))


def token_place(position: int, chunk_length: int) -> str:
    """Where token `position` of a shard lies, in words."""
    chunk, token = divmod(int(position), chunk_length)
    return f"chunk {chunk}, token {token}"


def by_chunk(positions: NDArray[Any], chunk_length: int) -> Iterator[tuple[int, int]]:
    """(first position, number of positions) of each chunk that has some of the ascending ones."""
    _, first, counts = np.unique(positions // chunk_length, return_index=True, return_counts=True)
    for index, count in zip(first.tolist(), counts.tolist(), strict=True):
        yield int(positions[index]), count


def stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and last of each stretch of consecutive ones among ascending numbers."""
    for _, group in groupby(enumerate(numbers), lambda item: item[1] - item[0]):
        stretch = [number for _, number in group]
        yield stretch[0], stretch[-1]
