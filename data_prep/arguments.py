"""Types of command-line arguments that several programs share."""

import argparse
import os
from collections.abc import Callable

CORES = len(os.sched_getaffinity(0))


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            wanted = f"a whole number from {least:,} to {most:,}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse
