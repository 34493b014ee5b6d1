"""Seeded mutations of valid files: of their bytes, and of the values that they mean."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

NASTY_BYTES = [
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\t", b"'", b'"', b"{", b"}"),
    *(b"[" * 5000, b'{"a":' * 5000, b"- " * 2000, b"NaN", b"-Infinity", b"1e999", b"9" * 5000),
    *(b"&a [*a, *a]", b"!!python/object/apply:os.getcwd []", b"<<: *x", b"${a", b"${oc.env:X}"),
    *("\u2028".encode(), b"null", b"true", b"-1", b"0", b"? ", b": ", b"# ", b"%YAML 9.9\n", b"|"),
]
NASTY_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.0, -0.5, 1e308),
    *(float("nan"), float("inf"), "", " ", "auto", "1", "\x00", "\ud800", "é\u2028\n", "x" * 5000),
    *([], [[]], [None], {}, {"": None}, {"a": {"b": []}}, "../../etc/passwd", "1e5", "0x10"),
]
NASTY_WORDS = [
    *("", ".", "..", "???", "null", "[1,2", "[1]", "{a:1}", "{", "}", "'", '"', "\\", "a b", "a=b"),
    *("${", "${x}", "${train.steps}", "${train.lanes}", "${run}", "${.steps}", "${oc.env:NO_SUCH}"),
    *(
        "${oc.create:{}}",
        "[${train}]",
        "${" * 3000,
        "[" * 900 + "]" * 900,
        "[" * 60_000,
        "{a:" * 900,
    ),
    *("nan", "-inf", "1e999", "9" * 5000, "0x10", "1_000", "\u2028", "\x00", "\udcff", "é", "\n"),
    *("&a [*a]", "!!python/object/apply:os.getcwd []", "a" * 5000, "b." * 3000, "train[0]", "-1"),
]


def byte_mutants(valid: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies: bits flipped, pieces cut, doubled, moved or put in."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(valid)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data) + 1)
            until = min(len(data), at + rng.choice((1, 2, 7, 60, 1000)))
            piece = bytes(data[at:until])
            change = rng.randrange(6)
            if change == 0 and piece:
                data[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                del data[at:until]
            elif change == 2:
                data[at:at] = piece
            elif change == 3:
                data[at:until] = rng.randbytes(len(piece))
            elif change == 4:
                data[at:at] = rng.choice(NASTY_BYTES)
            else:
                del data[at:]
        yield bytes(data)


def value_mutants(valid: Any, count: int, seed: int) -> Iterator[Any]:
    """`count` copies of a tree of JSON values in which some nodes are others, doubled or gone."""
    rng = random.Random(seed)
    for _ in range(count):
        tree = copy.deepcopy(valid)
        for _ in range(rng.choice((1, 1, 2, 4))):
            tree = _mutate_node(tree, rng)
        yield tree


def _mutate_node(tree: Any, rng: random.Random) -> Any:
    parent, key = rng.choice(list(_places(tree)) or [(None, None)])
    if parent is None or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(NASTY_VALUES))
    change = rng.random()
    if change < 0.15:
        del parent[key]
    elif change < 0.25 and isinstance(parent, dict):
        parent[rng.choice(("surprise", "", "\u2028", key + "x"))] = parent.pop(key)
    elif change < 0.4:
        parent[key] = copy.deepcopy(rng.choice(list(_places(tree)))[0])
    else:
        parent[key] = copy.deepcopy(rng.choice(NASTY_VALUES))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every node below the root; of long lists the first few."""
    if isinstance(tree, dict):
        items = list(tree.items())[:40]
    elif isinstance(tree, list):
        items = list(enumerate(tree))[:40]
    else:
        return
    for key, value in items:
        yield tree, key
        yield from _places(value)


def as_json(tree: Any) -> bytes:
    """JSON as Python writes it: with NaN, infinities and lone surrogates, escaped."""
    return json.dumps(tree).encode()
