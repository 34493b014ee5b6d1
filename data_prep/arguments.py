"""Types of command-line arguments that several programs share."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

Number = TypeVar("Number", int, float)
Item = TypeVar("Item")

CORES = len(os.sched_getaffinity(0))


def number_in(
    kind: Callable[[str], Number], least: Number, most: Number
) -> Callable[[str], Number]:
    """A parser of numbers of a kind (int or float) from `least` to `most`, both included.

    It raises `ArgumentTypeError` for any other text.
    """

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {least:,} to {most:,}")
        return value

    return parse


@dataclass(frozen=True)
class TaskShare:
    """What task `index` of `of` tasks does of something. `index` counts from 1."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `I/N`.

        Raises:
            ArgumentTypeError: the text is not of this form.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
        return cls(int(found[1]), int(found[2]))

    def numbers(self, total: int) -> range:
        """Its share of the numbers below `total`: every `of`-th."""
        return range(self.index - 1, total, self.of)

    def block(self, total: int) -> range:
        """Its share of the numbers below `total`: neighbors."""
        return range(total * (self.index - 1) // self.of, total * self.index // self.of)

    def first(self, items: Sequence[Item]) -> list[Item]:
        """All items, from its own block of them on.

        For work that every task needs done, and of which each begins with another piece.
        """
        start = self.block(len(items)).start
        return [*items[start:], *items[:start]]

    def __str__(self) -> str:
        """As it was typed."""
        return f"{self.index}/{self.of}"


ALONE = TaskShare(1, 1)
"""The share of a process that does all."""
