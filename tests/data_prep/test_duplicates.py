"""Exact deduplication: the first stays, in bounded memory, however work is shared out and cut."""

import random
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import duplicates, shuffle, text_hash
from data_prep.choice import Choice
from data_prep.duplicates import ENTRY, MARK, Deduplication
from data_prep.runs import Run, RunReader
from data_prep.shuffle import HASH_END, PartSummary, Spiller
from data_prep.sources import Part, Record

Texts = st.text(st.characters(exclude_categories=["Cs"]))


def normalized(text: bytes) -> bytes:
    """The same in one piece and in many."""
    whole = b"".join(text_hash.normalized(text))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_hash, "_SLICE", 5)
        assert b"".join(text_hash.normalized(text)) == whole
    return whole


def slow(text: str) -> bytes:
    """What `normalized` is said to be: a canonical caseless match."""
    solid = "".join(character for character in text if not character.isspace())
    folded = unicodedata.normalize("NFD", solid).casefold()
    return unicodedata.normalize("NFD", folded).encode()


@given(st.one_of(Texts, st.text(st.characters(max_codepoint=127))))
def test_normalizing_removes_white_space_and_case(text: str) -> None:
    wanted = slow(text)
    assert normalized(text.encode()) == wanted
    for same in (
        f"\u3000{text}\n",
        " ".join(text),
        unicodedata.normalize("NFC", "".join(text.split())),
        unicodedata.normalize("NFD", "".join(text.split())),
        text.casefold(),
    ):
        assert normalized(same.encode()) == wanted


@given(st.lists(st.sampled_from("αωΑ\u0345\u0301\u0308\u05b0ᾳᾴΐŉẞİΩ")).map("".join))
def test_letters_whose_case_is_a_mark_are_normalized(text: str) -> None:
    """The iota below a letter becomes a letter, behind all marks."""
    assert normalized(text.encode()) == slow(text)


@pytest.mark.parametrize("marks", ["\u0301\u0323", "\u0f73"])
def test_marks_without_end_take_no_time_without_end(marks: str) -> None:
    text = "a" + marks * (80_000 // len(marks))
    start = time.process_time()
    found, same, other = (
        text_hash.text_hash(each.encode()) for each in (text, f" {text}\n", text[:-1])
    )
    assert time.process_time() - start < 2  # 8 if all are sorted at once
    assert found == same != other


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ("The End.\r\n", "the end.", True),
        ("CAFÉ", "cafe\u0301", True),
        ("Straße", "STRASSE", True),
        ("a\u00a0b", "a b", True),
        ("x²", "x2", False),
        ("café", "cafe", False),
        ("the end", "the end.", False),
    ],
)
def test_what_counts_as_equal(one: str, other: str, are_equal: bool) -> None:
    assert (normalized(one.encode()) == normalized(other.encode())) == are_equal


Row = tuple[int, int, int, int, int, int]


@given(
    st.lists(
        st.tuples(*[st.integers(0, 3)] * 2, st.integers(0, 5), st.integers(0, 2)), max_size=40
    ),
    st.randoms(use_true_random=False),
)
def test_duplicates_are_all_but_the_first(rows: list[tuple[int, ...]], rng: random.Random) -> None:
    """Also those of equal halves of hashes; a document may be there more than once."""
    entries = np.empty(len(rows), ENTRY)
    for number, (high, low, place, part) in enumerate(rows):
        entries[number] = (high, low, place, part, 0, number)
    first: dict[tuple[int, int], tuple[int, int]] = {}
    for high, low, place, part in rows:
        first[high, low] = min(first.get((high, low), (part, place)), (part, place))
    wanted = {
        number
        for number, (high, low, place, part) in enumerate(rows)
        if first[high, low] != (part, place)
    }
    rng.shuffle(order := list(range(len(rows))))
    found = duplicates.duplicates(entries[order])
    assert set(found["row"].tolist()) == wanted and len(found) == len(wanted)
    assert found.dtype == MARK


@dataclass(frozen=True)
class Made(Part):
    texts: tuple[str, ...]
    first: int

    def records(self) -> Iterator[Record]:
        for number, text in enumerate(self.texts, self.first):
            yield Record(f"f#{number}", str(number), "", text)


def tokenizer() -> Any:
    def encode_utf8(text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    return SimpleNamespace(encode_utf8=encode_utf8, bos_id=1000, eos_id=1001)


def spilled(folder: Path, texts: Sequence[str], cuts: Sequence[int]) -> list[PartSummary]:
    """Runs of parts that end at `cuts`."""
    folder.mkdir(parents=True)
    spiller = Spiller(tokenizer(), folder, 0, lambda _: None, choice=Choice(deduplicate=True))
    bounds = zip((0, *cuts), (*cuts, len(texts)), strict=True)
    parts = [Made(tuple(texts[start:stop]), start) for start, stop in bounds]
    return [spiller.spill(part, number) for number, part in enumerate(parts)]


def left(folder: Path, summaries: Sequence[PartSummary]) -> list[int]:
    """Numbers of the documents that a reader of the runs finds."""
    reader = RunReader([folder / name for summary in summaries for name in summary.runs])
    keys = reader.seek(0, HASH_END)
    return sorted(map(int, reader.labels(keys.order)[0].to_pylist()))


def firsts(texts: Sequence[str]) -> list[int]:
    seen: dict[bytes, int] = {}
    for number, text in enumerate(texts):
        seen.setdefault(slow(text), number)
    return sorted(seen.values())


def some_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = [f"Text {rng.randrange(count // 2)}" for _ in range(count)]
    return [rng.choice((text, text.upper(), f" {text}\n")) for text in texts]


@pytest.mark.parametrize("group", [1, 7, 10_000])
@pytest.mark.parametrize("cuts", [(), (3,), (50, 50, 90, 240)])
def test_the_first_by_position_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, cuts: tuple[int, ...]
) -> None:
    monkeypatch.setattr(duplicates, "GROUP_DOCUMENTS", group)
    monkeypatch.setattr(shuffle, "RUN_TOKENS", 150)
    texts = some_texts(300, seed=len(cuts))
    before = spilled(tmp_path / "runs", texts, cuts)
    task = Deduplication(before, tmp_path / "runs", tmp_path / "work")
    steps: list[int] = []
    after = task.run(1, lambda units, _: steps.append(units))
    kept = left(tmp_path / "runs", after)
    assert kept == firsts(texts) and len(kept) < 250
    assert sum(steps) == 3 * len(task.groups)
    assert sum(summary.documents for summary in after) == len(kept)
    assert sum(summary.tokens for summary in after) == sum(len(texts[n].encode()) for n in kept)
    for one, other in zip(before, after, strict=True):
        assert one.documents - other.documents == other.skipped.get("duplicate", 0)
        assert other.runs == one.runs
        splits = [s for s in _splits(tmp_path / "runs", other) if s < HASH_END]
        edges = min(splits, default=HASH_END), max(splits, default=-1)
        assert (other.smallest_split, other.largest_split) == edges
    task.clear()
    assert not list((tmp_path / "work").glob("*.npy"))


def _splits(folder: Path, summary: PartSummary) -> list[int]:
    runs = [Run(folder / name) for name in summary.runs]
    return [split for run in runs for split in run.splits(0, len(run.split)).tolist()]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("call", range(1, 13))
def test_a_run_that_was_killed_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    monkeypatch.setattr(duplicates, "GROUP_DOCUMENTS", 100)
    texts = some_texts(300, seed=1)
    summaries = spilled(tmp_path / "runs", texts, (100, 200))
    task = Deduplication(summaries, tmp_path / "runs", tmp_path / "work")
    calls = 0

    def deadly(original: Any) -> Any:
        def save(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            original(*arguments)

        return save

    with monkeypatch.context() as patched:
        for name in ("_save", "write_marks", "write_whole"):
            patched.setattr(duplicates, name, deadly(getattr(duplicates, name)))
        with pytest.raises(Killed):
            task.run(1, lambda *_: None)
    done = task.run(1, lambda *_: None)
    assert left(tmp_path / "runs", done) == firsts(texts)
    with monkeypatch.context() as patched:
        patched.setattr(duplicates, "run_jobs", lambda task, jobs, *_: None)
        assert task.run(1, lambda *_: None) == done, "it does not do the work again"


def test_marks_of_other_runs_do_not_stay(tmp_path: Path) -> None:
    """As when a part was read again, because its source was repaired."""
    runs = tmp_path / "runs"
    summaries = spilled(runs, ["one", "One", "two"], (1,))
    done = Deduplication(summaries, runs, tmp_path / "before").run(1, lambda *_: None)
    assert left(runs, done) == [0, 2]
    Spiller(tokenizer(), runs, 0, lambda _: None, choice=Choice(deduplicate=True)).spill(
        Made(("other",), 0), 0
    )
    done = Deduplication(summaries, runs, tmp_path / "after").run(1, lambda *_: None)
    assert left(runs, done) == [0, 1, 2]


def test_copies_of_one_document_stay(tmp_path: Path) -> None:
    """Entries of one part and place: a source may be read more than once."""
    entries = np.zeros(4, ENTRY)
    entries["place"], entries["part"], entries["row"] = (5, 5, 6, 2), (0, 0, 0, 1), range(4)
    assert duplicates.duplicates(entries)["row"].tolist() == [2, 3]


def test_several_processes_mark_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "GROUP_DOCUMENTS", 100)
    texts = some_texts(300, seed=2)
    summaries = spilled(tmp_path / "runs", texts, (100, 200))
    task = Deduplication(summaries, tmp_path / "runs", tmp_path / "work")
    assert len(task.groups) == 3
    assert left(tmp_path / "runs", task.run(2, lambda *_: None)) == firsts(texts)
