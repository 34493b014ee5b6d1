"""Types of command-line arguments that several programs share."""

import argparse
import os
from collections.abc import Callable
from typing import TypeVar

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
