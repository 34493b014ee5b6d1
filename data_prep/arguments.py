"""Types of command-line arguments that several programs share."""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

Number = TypeVar("Number", int, float)

CORES = len(os.sched_getaffinity(0))


def number_in(
    kind: Callable[[str], Number], least: Number, most: Number
) -> Callable[[str], Number]:
    """A parser of numbers of a kind (int or float) from `least` to `most`, both included."""

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
    """Every `of`-th thing, from number `index` on, which counts from 1."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `I/N`."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
        return cls(int(found[1]), int(found[2]))

    def numbers(self, total: int) -> range:
        """Which of the numbers below `total` it has."""
        return range(self.index - 1, total, self.of)

    def __str__(self) -> str:
        """As it was typed."""
        return f"{self.index}/{self.of}"
