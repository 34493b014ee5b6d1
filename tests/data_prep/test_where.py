"""--where: rows are judged one by one, by DuckDB, and a wrong condition is one line."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.reading import row_filter
from data_prep.reading.files import file_source
from data_prep.reading.where import Where
from data_prep.sources import Skip
from i3dist.errors import UserError

TABLE = pa.table(
    {
        "text": ["a", "b", "c", "d"],
        "int_score": [1, 2, 3, None],
        "language": pa.array(["en", "fr", "en", "en"]).dictionary_encode(),
        "Meta": [{"x": 1}, {"x": 2}, None, {"x": 4}],
        "current_date": [1, 2, 3, 4],
    }
)


def kept(condition: str, table: pa.Table = TABLE) -> list[int]:
    """Numbers of the rows that are kept."""
    where = Where.parse(condition)
    where.check(table.schema, "a.parquet")
    found = where.kept(table.select(where.columns(table.schema.names)), "a.parquet")
    return [row for row, is_kept in enumerate(found.tolist()) if is_kept]


def test_a_name_of_two_columns_is_refused() -> None:
    schema = pa.schema([("n", pa.int64()), ("text", pa.string()), ("n", pa.int64())])
    with pytest.raises(UserError, match="there are several columns n; a"):
        Where.parse("n > 1").check(schema, "a.parquet")
    Where.parse("text > 'a'").check(schema, "a.parquet")


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("int_score >= 2 and language = 'en'", [2]),
        ("int_score IS NULL OR INT_SCORE = 1", [0, 3]),
        ("not (int_score >= 3)", [0, 1]),  # NULL is not true
        ("meta.x > 1", [1, 3]),
        ("source.int_score in (1, 3) -- a comment", [0, 2]),
        ("regexp_matches(text, '[ad]')", [0, 3]),
        ("list_filter([1, 2], lambda x: x = int_score)[1] = 2", [1]),
        ("try_cast(language as int) is null and int_score < 3", [0, 1]),
        ("current_date > 3", [3]),  # a column hides the function of its name
    ],
)
def test_a_condition_keeps_the_rows_for_which_it_is_true(condition: str, rows: list[int]) -> None:
    assert kept(condition) == rows


THERE = "a.parquet has the columns text, int_score, language, Meta"


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ("score > 1", f"there is no column score; {THERE}"),
        ("int_score > score", f"there is no column score; {THERE}"),
        ("score > grade", f"there is no column grade or score; {THERE}"),
        ("1 = 1", f"it names no column; {THERE}"),
        ("int_score", f"it is BIGINT, not true or false; {THERE}"),
        ("(int_score > 1, true)", "it is .*, not true or false"),
        ("language > 3.5 and", "syntax error"),
        ("language = 'en", "unterminated"),
        ("", f"it names no column; {THERE}"),
        ("sum(int_score) > 1", f"aggregates; {THERE}"),
        ("row_number() over () > int_score", "window functions"),
        ("unnest([int_score > 1])", "UNNEST"),
        ("random() < int_score", "random has another value each time"),
        ("int_score > 1 and now() > make_date(2020, 1, 1)", "now has another value each time"),
        ("today() > make_date(int_score, 1, 1)", "today has another value each time"),
        ("age(make_timestamp(int_score)) > interval 1 day", "age has another value each time"),
        ("int_score in (select 1)", "it has a subquery"),
        ("exists (from 'other.parquet')", "it has a subquery"),
        ("columns(*) > 1", "it has a star"),
        ("#1 = 'a'", "it names a column by number"),
        ("int_score = ?", "not one expression"),
        ("int_score = 1; drop table source", "syntax error"),
        ("int_score = 1), (true", "not one expression"),
        ("int_score = 1) from source where (true", "not one expression"),
        ("nothing(int_score) = 1", "nothing does not exist"),
        ("language = int_score + 'x'", "Could not convert string 'en'"),
    ],
)
def test_a_wrong_condition_is_one_line(condition: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        kept(condition)
    assert str(error.value).startswith(f"--where {condition!r}: ")
    assert "\n" not in str(error.value)


def test_functions_of_the_time_are_refused_without_parentheses() -> None:
    table = TABLE.drop_columns("current_date")
    with pytest.raises(UserError, match="current_date has another value each time"):
        kept("int_score > 1 and current_date > make_date(2020, 1, 1)", table)


def test_a_value_that_cannot_be_computed_is_named_with_its_place(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row(number) for number in range(30)])
    source = file_source(tmp_path / "a.parquet").chosen("language::int > 3")
    with pytest.raises(UserError, match=r"string 'fr' .*a\.parquet, row group 0\); TRY\(") as error:
        texts(source)
    assert "\n" not in str(error.value)
    tried = file_source(tmp_path / "a.parquet").chosen("try(language::int) is null")
    assert Skip.WHERE not in texts(tried)


def row(number: int) -> dict[str, Any]:
    language = "en" if number % 3 else "fr"
    return {"text": f"text {number}", "score": number % 7 / 2, "language": language}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=10)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(source: Any) -> list[object]:
    return [record.text for part in source.parts() for record in part.records()]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_rows_of_both_kinds_keep_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int
) -> None:
    for name in ("_ROWS", "_ROWS_WITH_TEXT", "_LINES"):
        monkeypatch.setattr(row_filter, name, most)
    rows = [row(number) for number in range(95)]
    write(tmp_path / f"a.{kind}", rows)
    source = file_source(tmp_path / f"a.{kind}")
    chosen = source.chosen("score >= 2.5 and language = 'en' or text = 'text 3'")
    everything = [record for part in source.parts() for record in part.records()]
    found = [record for part in chosen.parts() for record in part.records()]
    assert [record.position for record in found] == [record.position for record in everything]
    for one, other, fields in zip(found, everything, rows, strict=True):
        meets = fields["score"] >= 2.5 and fields["language"] == "en"
        is_kept = meets or fields["text"] == "text 3"
        assert one.text == (other.text if is_kept else Skip.WHERE)


def test_text_is_not_read_where_no_row_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", [row(number) for number in range(30)])
    read: list[Sequence[str]] = []

    def iter_batches(self: Any, size: int, groups: list[int], columns: list[str], **other: Any):  # type: ignore[no-untyped-def]
        read.append(columns)
        return original(self, size, groups, columns, **other)

    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    source = file_source(tmp_path / "a.parquet").chosen("score > 100")
    assert texts(source) == [Skip.WHERE] * 30
    assert read == [["score"]] * 3


def test_rows_that_a_damaged_page_hides_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow skips such a page silently."""
    write(tmp_path / "a.parquet", [row(number) for number in range(10)])
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda *words, **more: (batch[1:] for batch in original(*words, **more)),
    )
    with pytest.raises(UserError, match=r"a\.parquet.*: it holds 9 rows of score, not 10; repair"):
        texts(file_source(tmp_path).chosen("score > 1"))


def test_every_parquet_file_has_to_have_the_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row(1)])
    write(tmp_path / "b.parquet", [{"text": "x", "other": 1}])
    with pytest.raises(UserError, match=r"no column score; .*b\.parquet has the columns text, ot"):
        file_source(tmp_path).chosen("score > 1").parts()


def test_files_without_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row(1)])
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match=r"--where needs rows .*b\.txt has none: name only parquet"):
        file_source(tmp_path).chosen("score > 1")


BAD = pa.Array.from_buffers(
    pa.string(), 4, pa.array([b"good", b"\xff\xfe", b"ok\xffx", None], pa.binary()).buffers()
)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("plain", BAD),
        ("large", BAD.cast(pa.large_binary()).view(pa.large_string())),
        ("coded", pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, None], pa.int8()), BAD)),
    ],
)
def test_bad_utf8_is_computed_with(tmp_path: Path, column: str, values: pa.Array) -> None:
    """DuckDB's `upper` fails for good on it, so it never gets there."""
    where = Where.parse(f"upper({column}) in ('GOOD', 'OK\ufffdX')")
    assert where.kept(pa.table({column: values}), "a.parquet").tolist() == [
        True,
        False,
        True,
        False,
    ]
    lines = [{column: text} for text in ("good", "\udcff", "ok\udcffx", None)]
    kept = Where.parse(f"upper({column}) in ('GOOD', 'OK?X')").for_lines(lines, "a.jsonl")
    assert kept.kept_lines(lines, "a.jsonl").tolist() == [True, False, True, False]


def test_bad_utf8_in_a_list_is_one_line() -> None:
    lists = pa.ListArray.from_arrays([0, 1, 4], BAD)
    with pytest.raises(UserError, match=r"UTF8.* \(a\.parquet\)$"):
        Where.parse("upper(n[1]) = 'GOOD'").kept(pa.table({"n": lists}), "a.parquet")


def test_lines_may_be_nested_deep(tmp_path: Path) -> None:
    deep = '{"text": "y", "m": 2, "n": ' + "[" * 900 + "]" * 900 + "}\n"
    (tmp_path / "a.jsonl").write_text('{"text": "x", "m": 1, "n": 1}\n' + deep)
    assert texts(file_source(tmp_path).chosen("m > 1")) == [Skip.WHERE, "y"]
    assert texts(file_source(tmp_path).chosen("n like '[[[%'")) == [Skip.WHERE, "y"]
    (tmp_path / "a.jsonl").write_text(deep)
    assert texts(file_source(tmp_path).chosen("len(n) = 1")) == ["y"]


LINES = [
    {"a": 1, "l": "en", "m": {"z": [1, 2]}},
    {"a": 3.7, "l": "fr", "flag": True},
    {"a": "4", "l": None},
    {"a": 2**70},
    {"a": "x"},
    {"l": ["q"]},
    {"a": math.nan, "l": "\ud800"},
    {"a": True, "flag": "no"},
    {"a": {"b": 1}},
    {"l": 7},
    {},
]


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("a > 3", [1, 2, 3, 6]),  # NaN is the greatest number, as in PostgreSQL
        ("a = 1", [0, 7]),
        ("a is null", [4, 5, 8, 9, 10]),
        ("m.z[2] = 2", [0]),
        ("l in ('en', '7', '[\"q\"]', '?')", [0, 5, 6, 9]),
        ("flag", [1]),
        ("L = 'fr'", [1]),
    ],
)
def test_values_of_jsonl_have_the_types_of_the_sample(condition: str, rows: list[int]) -> None:
    where = Where.parse(condition).for_lines(LINES[:2], "a.jsonl")
    found = where.kept_lines(LINES, "a.jsonl").tolist()
    assert [number for number, is_kept in enumerate(found) if is_kept] == rows


Value = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)


@given(
    sample=st.lists(st.dictionaries(st.sampled_from("ab"), Value), min_size=1, max_size=4),
    lines=st.lists(st.dictionaries(st.sampled_from("ab"), Value), max_size=20),
    cut=st.integers(0, 20),
)
def test_a_line_is_judged_by_itself(sample: Any, lines: Any, cut: int) -> None:
    """Whatever stands in the lines around it."""
    where = Where.parse("try(a = b) or a is null").for_lines(
        [*sample, {"a": None, "b": None}], "a.jsonl"
    )
    whole = where.kept_lines(lines, "a.jsonl").tolist()
    parts = [where.kept_lines(part, "a.jsonl").tolist() for part in (lines[:cut], lines[cut:])]
    assert whole == parts[0] + parts[1]


@pytest.mark.parametrize("missing", [0, 3])
def test_columns_of_jsonl_are_those_of_the_first_lines(tmp_path: Path, missing: int) -> None:
    for number in range(40):
        write(tmp_path / f"{number:02d}.jsonl", [row(number)] if number >= missing else [])
    chosen = file_source(tmp_path).chosen("score = 1")
    assert [text for text in texts(chosen) if text is not Skip.WHERE] == [
        f"text {number}" for number in range(2, 40, 7) if number >= missing
    ]
    with pytest.raises(UserError, match="there is no column id; the jsonl has the columns text, s"):
        file_source(tmp_path).chosen("id = 1").parts()


def test_columns_of_jsonl_are_of_files_all_over_the_source(tmp_path: Path) -> None:
    for number in range(40):
        more = {"more": number} if number == 20 else {}
        write(tmp_path / f"{number:02d}.jsonl", [row(number) | more])
    found = texts(file_source(tmp_path).chosen("more = 20"))
    assert [text for text in found if text is not Skip.WHERE] == ["text 20"]


def test_a_sample_holds_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be long, and there are 16,000 lines."""
    write(tmp_path / "a.jsonl", [row(number) for number in range(5)])
    seen: list[Any] = []
    original = Where.for_lines

    def for_lines(self: Where, rows: Any, place: object) -> Where:
        seen.extend(rows)
        return original(self, rows, place)

    monkeypatch.setattr(Where, "for_lines", for_lines)
    file_source(tmp_path).chosen("SCORE = 1").parts()
    assert seen == [{"text": None, "score": n / 2, "language": None} for n in range(5)]


def test_a_broken_line_is_named_as_without_a_condition(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [row(number) for number in range(2000)])
    path.write_text(path.read_text() + '{"text": ')
    chosen = file_source(path).chosen("score = 1")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2001: broken JSON"):
        texts(chosen)
