"""A shard that is as its rows state is checked in one step; what is not is looked at closely.

Each change breaks one condition of that step. Archive and manifest fit the changed shard.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.checks import shard_check
from i3dist.data.manifest import Manifest
from tests.data_prep import fuzzing
from tests.data_prep.test_verify import BOS, EOS

Row = dict[str, Any]
Rows = list[Row]


@pytest.fixture
def split(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out")) / "valid"


def rows_of(split: Path) -> Rows:
    return list(pq.read_table(split / "index.parquet").to_pylist())


def write_rows(split: Path, rows: Rows) -> None:
    fuzzing.write_rows(split / "index.parquet", rows)


def three_pieces(rows: Rows) -> int:
    """The row of a shard's first piece, which continues; one document follows, another goes on."""
    pieces = [row["piece"] for row in rows]
    return next(
        n
        for n in range(len(rows) - 3)
        if pieces[n] and pieces[n + 1 : n + 4] == [0, 0, 1]
        if rows[n]["shard"] == rows[n + 2]["shard"]
    )


@pytest.fixture
def closely(split: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards of the split that were looked at closely."""
    numbers, boundaries = [], shard_check._Check.boundaries

    def looked(check: shard_check._Check) -> Any:
        if check.stream.folder.name == split.name:
            numbers.append(check.number)
        return boundaries(check)

    monkeypatch.setattr(shard_check._Check, "boundaries", looked)
    return numbers


def test_sound_shards_but_the_last_need_no_closer_look(split: Path, closely: list[int]) -> None:
    """Else the changes below would break nothing of what they are for."""
    assert fuzzing.found(split.parent) == []
    assert closely == [len(Manifest.load(split).shards) - 1]


def test_a_shard_that_needs_a_closer_look_leaves_the_others(
    split: Path, closely: list[int]
) -> None:
    """Though all are checked by one task: one is not as its rows say, and one has no row."""
    rows, last = rows_of(split), len(Manifest.load(split).shards) - 1
    first = three_pieces(rows)
    later(rows[first:])
    other = next(r["shard"] for r in rows if r["shard"] not in (0, rows[first]["shard"], last))
    write_rows(split, [row for row in rows if row["shard"] != other])
    assert fuzzing.found(split.parent)
    assert closely == sorted({rows[first]["shard"], other, last})


def test_an_index_without_rows_is_found(split: Path) -> None:
    write_rows(split, [])
    lines = fuzzing.found(split.parent)
    assert any("ends with document -1, not" in line for line in lines), lines


def later(rows: Rows) -> None:
    rows[0]["offset"] += 1
    rows[0]["length"] -= 1


def negative_offset(rows: Rows) -> None:
    rows[2]["chunk"] += 1
    rows[2]["offset"] -= 64


def large_offset(rows: Rows) -> None:
    rows[2]["chunk"] -= 1
    rows[2]["offset"] += 64


def continued(rows: Rows) -> None:
    rows[1]["piece"] = 1


def begun(rows: Rows) -> None:
    rows[0]["piece"] = 0


def of_no_shard(rows: Rows) -> None:
    rows[1]["shard"] = 1000


def none(rows: Rows) -> None:
    del rows[:3]


def shorter(rows: Rows) -> None:
    rows[2]["length"] -= 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (later, "chunk 0, offset 1: none begins there"),
        (negative_offset, ": none begins there"),
        (large_offset, ": none begins there"),
        (continued, "says piece 1, but shard {} begins a document there"),
        (begun, "says piece 0, but shard {} continues a document there"),
        (of_no_shard, "says a piece begins at shard 1000"),
        (none, "has no row for the piece that begins at shard {}, chunk 0"),
        (shorter, "says its piece has"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rows_that_state_something_else_are_found(
    split: Path, change: Callable[[Rows], None], says: str
) -> None:
    rows = rows_of(split)
    first = three_pieces(rows)
    tail, number = rows[first:], rows[first]["shard"]
    change(tail)
    write_rows(split, rows[:first] + tail)
    lines = fuzzing.found(split.parent)
    assert any(says.format(number) in line for line in lines), lines


def test_a_shard_inside_a_document_has_a_row(split: Path) -> None:
    rows, manifest = rows_of(split), Manifest.load(split)
    full = manifest.shards[0].chunks * manifest.chunk_length
    at = next(n for n, row in enumerate(rows) if row["length"] == full)
    number = rows.pop(at)["shard"]
    write_rows(split, rows)
    lines = fuzzing.found(split.parent)
    says = f"has no row for the piece that begins at shard {number}, chunk 0"
    assert any(says in line for line in lines), lines


@pytest.mark.parametrize(
    ("place", "token", "says"),
    [
        ("begin", BOS, "says piece 1, but shard {} begins a document there"),
        ("first", 99, "<EOS> follows <EOS>: this document has no <BOS>"),
        ("last", 99, "<BOS> follows <BOS>: the document before has no <EOS>"),
        ("end", BOS, "<BOS> follows <BOS>: the document before has no <EOS>"),
    ],
)
def test_other_tokens_where_rows_state_ends_are_found(
    split: Path, place: str, token: int, says: str
) -> None:
    """At the begin and the end of the shard, and of the document that lies in it."""
    rows = rows_of(split)
    piece = rows[three_pieces(rows) + 1]
    first = piece["chunk"] * 64 + piece["offset"]
    at = {"begin": 0, "first": first, "last": first + piece["length"] - 1, "end": -1}[place]

    def change(ids: Any) -> None:
        ids[at] = token

    fuzzing.rewrite(split, piece["shard"], change)
    lines = fuzzing.found(split.parent)
    assert any(says.format(piece["shard"]) in line for line in lines), lines


def test_an_empty_document_is_found_though_its_row_is_right(split: Path) -> None:
    rows = rows_of(split)
    at = three_pieces(rows) + 1
    first = rows[at]["chunk"] * 64 + rows[at]["offset"]

    def change(ids: Any) -> None:
        ids[first + 1 : first + 3] = EOS, BOS

    fuzzing.rewrite(split, rows[at]["shard"], change)
    chunk, offset = divmod(first + 2, 64)
    rest = {"chunk": chunk, "offset": offset, "length": rows[at]["length"] - 2}
    more = [rows[at] | {"length": 2}, rows[at] | rest]
    write_rows(split, [*rows[:at], *more, *rows[at + 1 :]])
    lines = fuzzing.found(split.parent)
    assert any("a document is empty: <EOS> follows <BOS>" in line for line in lines), lines


def test_padding_is_wanted_of_a_full_last_shard_too(split: Path) -> None:
    """If the manifest says that the split has a token less. Its last shard is not full: it goes."""
    manifest, rows = Manifest.load(split), rows_of(split)
    *shards, removed = manifest.shards
    assert rows[-1]["shard"] == len(shards) > rows[-2]["shard"]  # it holds one piece
    (split / removed.name).unlink()
    write_rows(split, rows[:-1])

    def end(ids: Any) -> None:
        ids[-1] = EOS

    fuzzing.rewrite(split, len(shards) - 1, end)
    raw = json.loads((split / "manifest.json").read_bytes())
    raw["shards"].pop()
    raw["chunks"] -= removed.chunks
    raw["tokens"] = raw["chunks"] * manifest.chunk_length - 1
    (split / "manifest.json").write_text(json.dumps(raw))
    lines = fuzzing.found(split.parent)
    assert any("<PAD> should fill the last 1 tokens" in line for line in lines), lines
