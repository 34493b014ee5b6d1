"""A large jsonl file is read by several workers, and its documents stay what they were."""

import codecs
import gzip
import json
import random
from itertools import pairwise
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.arguments import TaskShare
from data_prep.reading import files
from data_prep.reading import line_ranges as line_module
from data_prep.reading.files import FilePart, file_source
from data_prep.reading.line_ranges import line_ranges
from data_prep.sources import Record
from i3dist.errors import UserError
from tests.data_prep.corpus import build, tree_digest
from tests.data_prep.test_evidence import change, interrupt, texts_of


@pytest.fixture(autouse=True)
def _short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SHORTEST_RANGE", 2000)
    monkeypatch.setattr(files, "_SMALLEST_PART", 2000)


def lines(count: int, seed: int = 0) -> str:
    """Lines of many lengths, some blank, some without an id."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        row = {"text": rng.randbytes(rng.choice((9, 90, 900))).hex()}
        rows.append(json.dumps(row | ({"id": f"{number}"} if number % 3 else {})))
        rows.append("" if number % 7 == 0 else rows.pop())
    return "\n".join(rows) + "\n"


def records(parts: list[FilePart]) -> list[Record]:
    return [record for part in parts for record in part.records()]


@given(data=st.lists(st.sampled_from([b"\n", b"a", b"bb", b"\r"]), min_size=1).map(b"".join),
       parts=st.integers(1, 12))  # fmt: skip
def test_ranges_are_whole_lines_and_all_of_them(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, parts: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "some.jsonl"
    path.write_bytes(data)
    with path.open("rb") as file:
        ranges = line_ranges(file, len(data), parts)
    assert (ranges[0].start, ranges[-1].stop) == (0, len(data)) and len(ranges) <= parts
    for before, after in pairwise(ranges):
        assert before.stop == after.start and data[: after.start].endswith(b"\n")
        assert after.first_line == data[: after.start].count(b"\n")
    assert all(start < stop for start, stop, _ in ranges) and ranges[0].first_line == 0


def test_ranges_are_about_equal(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("x" * 99 + "\n")
    path.write_bytes(path.read_bytes() * 40_000)  # several blocks
    with path.open("rb") as file:
        ranges = line_ranges(file, 4_000_000, 7)
    sizes = [stop - start for start, stop, _ in ranges]
    assert len(sizes) == 7 and max(sizes) - min(sizes) <= 200
    assert [first for *_, first in ranges] == [start // 100 for start, *_ in ranges]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \n"])
def test_documents_of_ranges_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes, end: str
) -> None:
    text = lines(60).replace("\n", end).removesuffix(end)
    (tmp_path / "a.jsonl").write_bytes(mark + text.encode())
    parts = file_source(tmp_path).parts()
    assert len(parts) > 5
    cut = records(list(parts))
    monkeypatch.setattr(files, "_SHORTEST_RANGE", 1 << 30)
    assert cut == records(list(file_source(tmp_path).parts())) and len(cut) == 60


def test_what_is_one_document_or_cannot_be_cut_stays_whole(tmp_path: Path) -> None:
    text = lines(40)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(text, "utf-16")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(records(list(file_source(tmp_path).parts()))) == 81
    for part in file_source(tmp_path).parts():
        assert all(span.start == 0 for span in part.spans)


@pytest.mark.parametrize("given", [False, True])
def test_any_cut_gives_the_bytes_of_the_whole_file(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """A tokenizer that is trained is the same too, though its sample is less than the file."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines(90))
    halves = (f'{{"text": "{word * 500} {n}"}}\n' for word in ("ab ", "xy ") for n in range(600))
    (tmp_path / "in" / "b.jsonl").write_text("".join(halves))
    options = ["--tokenizer", tokenizer] if given else ["--tokenizer-sample-mb", 2]
    made = {}
    monkeypatch.setattr(files, "_SMALLEST_PART", 100_000)
    for size, workers in ((1 << 30, 1), (100_000, 1), (300_000, 3)):
        monkeypatch.setattr(files, "_SHORTEST_RANGE", size)
        out = tmp_path / f"out-{size}"
        build(tmp_path / "in", out, "--workers", workers, "--chunks-per-shard", 256, *options)
        made[size] = texts_of(out)
    assert made[100_000] == made[300_000] == made[1 << 30]


def test_a_stopped_run_goes_on_and_never_mixes_two_cuts(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version may have cut the file elsewhere, or not at all."""
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text(lines(90))
    (source / "b.jsonl").write_text(lines(90, seed=1))
    options = ["--tokenizer", tokenizer]
    build(source, tmp_path / "whole", *options)
    for size, after in ((2000, 7), (3000, 9), (1 << 30, 1)):
        monkeypatch.setattr(files, "_SHORTEST_RANGE", size)
        interrupt(source, tmp_path / f"out-{size}", after, *options)
        monkeypatch.setattr(files, "_SHORTEST_RANGE", 2000)
        build(source, tmp_path / f"out-{size}", *options)
        assert tree_digest(tmp_path / f"out-{size}") == tree_digest(tmp_path / "whole")


@pytest.mark.parametrize("at", [0.0, 0.3, 0.99])
def test_a_change_in_any_range_is_noticed(tmp_path: Path, tokenizer: Path, at: float) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text(lines(90))
    build(source, tmp_path / "out", "--tokenizer", tokenizer)
    change(source / "a.jsonl", at)
    with pytest.raises(UserError, match=r"before .*a\.jsonl changed, from other content"):
        build(source, tmp_path / "out", "--tokenizer", tokenizer)


def test_a_broken_line_of_a_later_range_has_its_number(tmp_path: Path) -> None:
    whole = lines(60)
    (tmp_path / "a.jsonl").write_text(whole + "{\n" + whole)
    number = whole.count("\n") + 1
    with pytest.raises(UserError, match=rf"a\.jsonl, line {number}: broken JSON"):
        records(list(file_source(tmp_path).parts()))


def test_lines_are_counted_once_while_the_file_stays(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text(lines(90))
    counted = MagicMock(wraps=line_ranges)
    monkeypatch.setattr(line_module, "line_ranges", counted)
    options = ["--tokenizer", tokenizer]
    build(source, tmp_path / "whole", *options)
    interrupt(source, tmp_path / "out", 3, *options)
    assert counted.call_count == 2
    build(source, tmp_path / "out", *options)
    assert counted.call_count == 2
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    interrupt(source, tmp_path / "later", 0, *options)
    others = "".join(sorted(lines(90).splitlines(keepends=True)))  # of the same size
    (source / "a.jsonl").write_text(others)
    build(source, tmp_path / "later", *options)
    assert counted.call_count == 4
    build(source, tmp_path / "fresh", *options)
    assert tree_digest(tmp_path / "later") == tree_digest(tmp_path / "fresh")


@pytest.mark.parametrize(("share", "order"), [("1/2", "abcd"), ("2/2", "cdab"), ("3/4", "cdab")])
def test_tasks_begin_to_count_with_different_files(
    share: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So side by side they count each file about once, as each finds what others have counted."""
    for name in "dbca":
        (tmp_path / f"{name}.jsonl").write_text(lines(30))
    counted = MagicMock(wraps=line_ranges)
    monkeypatch.setattr(line_module, "line_ranges", counted)

    def parts(task: str) -> list[FilePart]:
        source = file_source(tmp_path)
        source.keep_in(tmp_path / "kept", TaskShare.parse(task))
        return list(source.parts())

    found = parts(share)
    assert "".join(Path(call.args[0].name).stem for call in counted.call_args_list) == order
    assert parts("1/1") == parts("2/3") == found
    assert counted.call_count == len(order)
