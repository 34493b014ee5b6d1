"""A stack of layers as users type it: groups of COUNTxKIND from the bottom, joined by commas."""

import re
from collections.abc import Iterable
from itertools import groupby

CARD_LAYERS = "12xrwkv,2xdual-attention"
MOST = 1024  # layers of one kind in a row

_GROUP = re.compile(r"\s*([0-9]{1,9})\s*x\s*([a-z][a-z0-9_-]*)\s*")


def read_layers(text: str) -> list[str]:
    """The kind of each layer, from the bottom.

    Raises:
        ValueError: the text is not of the form, or a count is out of range.
    """
    kinds: list[str] = []
    for group in text.split(","):
        match = _GROUP.fullmatch(group)
        if match is None or not 1 <= int(match[1]) <= MOST:
            raise ValueError(
                f"should be COUNTxKIND joined by commas, as in {CARD_LAYERS}, with counts from 1 "
                f"to {MOST} and kinds in lower case; {group[:80]!r} is not"
            )
        kinds += [match[2]] * int(match[1])
    return kinds


def write_layers(kinds: Iterable[str]) -> str:
    """The inverse of `read_layers`."""
    return ",".join(f"{len(list(group))}x{kind}" for kind, group in groupby(kinds))


def plain_layers(text: str) -> str:
    """The same stack in its one plain form; raises `ValueError` as `read_layers` does."""
    plain = write_layers(read_layers(text))
    read_layers(plain)  # neighbours of one kind are now one group, whose count is limited too
    return plain
