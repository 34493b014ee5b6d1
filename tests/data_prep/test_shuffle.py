"""The shuffle: an order that hangs on seed and source alone, whatever the parts and the runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import shuffle
from data_prep.runs import RunReader
from data_prep.second_pass import split_ranges
from data_prep.shuffle import (
    HASH_END,
    Document,
    PartSummary,
    Spiller,
    hash_columns,
    hashes,
    run_table,
)
from data_prep.sources import Part, Record
from i3dist.errors import UserError

BOS, EOS = 1000, 1001


def _text(number: int) -> str:
    return "word " * (1 + number % 7) + str(number)


class Hashes(NamedTuple):
    high: int
    low: int
    split: int

    @classmethod
    def of(cls, text: str, position: str, seed: int) -> "Hashes":
        return cls(*hash_columns([hashes(text.encode(), position, seed)])[:, 0].tolist())


def _hashes_of(number: int) -> Hashes:
    return Hashes.of(_text(number), f"f#{number}", 0)


@dataclass(frozen=True)
class _Part(Part):
    first: int
    last: int

    def records(self) -> Iterator[Record]:
        for i in range(self.first, self.last):
            yield Record(f"f#{i}", f"id {i}", "", _text(i))


def _tokenizer() -> Any:
    def encode_utf8(text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    return SimpleNamespace(encode_utf8=encode_utf8, bos_id=BOS, eos_id=EOS)


def _order(folder: Path, ends: list[int], seed: int = 0, splits: range = range(HASH_END)) -> list:
    folder.mkdir()
    spiller = Spiller(_tokenizer(), folder, seed, lambda tokens: None)
    cuts = zip([0, *ends], ends, strict=False)
    summaries = [spiller.spill(_Part(*cut), number) for number, cut in enumerate(cuts)]
    reader = RunReader([folder / name for summary in summaries for name in summary.runs])
    keys = reader.seek(0, HASH_END)
    chosen = (keys.split >= splits.start) & (keys.split < splits.stop)
    rows, ends = keys.order[chosen], np.cumsum(keys.lengths[chosen])[:-1]
    documents = np.split(reader.tokens(rows), ends)
    assert all((document[0], document[-1]) == (BOS, EOS) for document in documents)
    assert sum(summary.tokens for summary in summaries) == keys.lengths.sum() - 2 * len(keys.order)
    names = reader.labels(rows)[0].to_pylist()
    texts = [bytes(document[1:-1].astype(np.uint8)) for document in documents]
    return list(zip(names, texts, strict=True))


def test_parts_and_runs_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _order(tmp_path / "whole", [200])
    monkeypatch.setattr(shuffle, "RUN_TOKENS", 300)
    pieces = _order(tmp_path / "pieces", [3, 90, 91, 200])
    assert pieces == whole
    assert len(list((tmp_path / "pieces").glob("*.arrow"))) > 10
    assert sorted(name for name, _ in whole) == sorted(f"id {i}" for i in range(200))


@pytest.mark.parametrize("copies", [1, 3])
def test_a_run_that_is_put_together_in_a_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    tokens = [np.arange(length, dtype=np.uint32) for length in (5, 1, 99)] * copies
    run = [Document(bytes([n]) * 24, f"id {n}", "", each) for n, each in enumerate(tokens)]
    in_memory = run_table(run, BOS, EOS, tmp_path)
    monkeypatch.setattr(shuffle, "_MOST_IN_MEMORY", 0)
    assert run_table(run, BOS, EOS, tmp_path).equals(in_memory, check_metadata=True)
    assert not list(tmp_path.iterdir())


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    orders = [[name for name, _ in _order(tmp_path / str(s), [200], s)] for s in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    numbers = [int(name.split()[1]) for name in orders[0]]
    assert abs(np.corrcoef(numbers, np.arange(200))[0, 1]) < 0.3


def test_ranges_of_split_hashes_divide_the_documents(tmp_path: Path) -> None:
    whole = _order(tmp_path / "whole", [200])
    found = sorted(_hashes_of(number).split for number in range(200))
    bound = found[60]
    low = _order(tmp_path / "low", [200], splits=range(bound))
    high = _order(tmp_path / "high", [200], splits=range(bound, HASH_END))
    assert len(low) == 60
    assert low == [d for d in whole if d in set(low)]
    assert high == [d for d in whole if d not in set(low)]


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, (1 << 63) - 1))
def test_equal_texts_share_the_split_and_not_the_place(text: str, seed: int) -> None:
    one, other = Hashes.of(text, "f#1", seed), Hashes.of(text, "f#2", seed)
    assert one.split == other.split
    assert (one.high, one.low) != (other.high, other.low)
    assert all(0 <= h < HASH_END for h in (one.high, one.low, one.split))


def _summary(smallest: int, largest: int) -> PartSummary:
    return PartSummary(
        runs=(),
        documents=2,
        tokens=2,
        skipped={},
        smallest_split=smallest,
        largest_split=largest,
    )


@given(
    st.lists(st.integers(0, HASH_END - 1), min_size=2, unique=True),
    st.floats(0, 0.9, exclude_min=True),
)
def test_no_split_is_left_empty(found: list[int], fraction: float) -> None:
    train, valid = split_ranges([_summary(min(found), max(found))], fraction)
    assert all((h in train) != (h in valid) for h in found)
    assert any(h in train for h in found) and any(h in valid for h in found)


def test_one_text_cannot_be_split() -> None:
    with pytest.raises(UserError, match="--valid-fraction 0"):
        split_ranges([_summary(5, 5)], 0.1)
    assert split_ranges([_summary(5, 5)], 0.0) == (range(HASH_END), range(0))
