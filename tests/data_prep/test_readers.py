"""Documents: each is read, or skipped for a reason; a file that makes no sense is named."""

import datetime
import decimal
import io
import json
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.reading import readers
from data_prep.reading.files import file_source
from data_prep.reading.readers import SourceFile, open_parquet, read_rows
from data_prep.sources import Record, Skip
from i3dist.errors import UserError
from tests.data_prep.test_streams import ENCODED, PACKERS, text_of

DAMAGED = [b"document 0", b"bad \xff", None, b"", "é".encode(), b"document 5"]
EXPECTED = ["document 0", Skip.UNDECODABLE, Skip.NULL, Skip.EMPTY, "é", "document 5"]


def read(path: Path) -> list[Record]:
    return [record for part in file_source(path).parts() for record in part.records()]


def texts(path: Path) -> list[str | Skip]:
    return [text_of(record) for record in read(path)]


def damaged(kind: pa.DataType) -> pa.Array:
    """A column of text of which one value is not UTF-8."""
    raw = pa.array(DAMAGED, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    if pa.types.is_dictionary(kind):
        indices = pa.array([None if value is None else n for n, value in enumerate(DAMAGED)])
        return pa.DictionaryArray.from_arrays(indices.cast(kind.index_type), _plain(raw, kind))
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, text)
    return (raw if "binary" in str(kind) else text).cast(kind)


def _plain(raw: pa.Array, kind: pa.DictionaryType) -> pa.Array:
    raw = raw.fill_null(b"")
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    return (raw if "binary" in str(kind.value_type) else text).cast(kind.value_type)


TYPES = [
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(pa.binary(), pa.large_binary(), pa.binary_view()),
    *(pa.dictionary(pa.int8(), value) for value in (pa.string(), pa.large_string(), pa.binary())),
    pa.json_(pa.string()),
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_text_of_every_type_is_read_and_costs_no_neighbour(
    tmp_path: Path, kind: pa.DataType
) -> None:
    table = pa.table({"text": damaged(kind), "id": damaged(kind), "url": damaged(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    assert texts(tmp_path) == EXPECTED
    ids = ["document 0", "bad \ufffd", "a.parquet#2", "", "é", "document 5"]
    assert [record.id for record in read(tmp_path)] == ids
    assert [record.url for record in read(tmp_path)] == ids


OTHER = {
    "null": pa.nulls(2),
    "numbers": pa.array([1, None]),
    "not a number": pa.array([float("nan"), None]),
    "lists": pa.array([["text"], None]),
    "structs": pa.array([{"text": "text"}, None]),
    "times": pa.array([10**18, None], pa.timestamp("ns", "Europe/Berlin")),
    "times beyond Python's": pa.array([1 << 60, None], pa.timestamp("us")),
    "times of an unknown zone": pa.array([1, None], pa.timestamp("ns", "Mars/X")),
    "lists of times beyond": pa.array([[1 << 60], None], pa.list_(pa.timestamp("us"))),
    "structs of times of no zone": pa.array(
        [{"at": 1}, None], pa.struct({"at": pa.timestamp("us", "+99:00")})
    ),
    "spans of time": pa.array([1 << 62, None], pa.duration("s")),
    "days": pa.array([datetime.date(2026, 1, 1), None]),
    "decimals": pa.array([decimal.Decimal("1.5"), None]),
    "identifiers": pa.array([uuid.UUID(int=1).bytes, None], pa.uuid()),
}


@pytest.mark.parametrize("kind", OTHER)
def test_a_column_of_another_type_is_no_text_but_names_a_document(
    tmp_path: Path, kind: str
) -> None:
    column = OTHER[kind]
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    first = Skip.NULL if kind == "null" else Skip.NOT_TEXT
    assert texts(tmp_path) == [first, Skip.NULL]
    table = pa.table({"text": ["a", "b"], "id": column, "url": column})
    pq.write_table(table, tmp_path / "a.parquet")
    records = read(tmp_path)
    assert [record.text for record in records] == [b"a", b"b"]
    assert all(record.id.isprintable() and record.url for record in records)
    assert records[1].id == "a.parquet#1"


def test_labels_that_cannot_be_read_cost_no_other_batch_and_no_text(tmp_path: Path) -> None:
    inner = pa.array([f"{n}".encode() for n in range(299)] + [b"\xff"])
    lists = pa.ListArray.from_arrays(
        range(301), pa.Array.from_buffers(pa.string(), 300, inner.buffers())
    )
    table = pa.table({"text": [f"text {n}" for n in range(300)], "id": lists})
    pq.write_table(table, tmp_path / "a.parquet")
    records = read(tmp_path)
    assert [record.text for record in records] == [f"text {n}".encode() for n in range(300)]
    assert [record.id for record in records[:128]] == [f"['{n}']" for n in range(128)]
    assert records[299].id == records[299].url == records[299].position == "a.parquet#299"


def test_labels_of_a_type_that_pyarrow_cannot_read_back_cost_no_text(tmp_path: Path) -> None:
    lists = pa.array([[1, 2], None], pa.list_(pa.int8(), 2))
    table = pa.table({"text": ["a", "b"], "id": lists, "url": ["here", "there"]})
    pq.write_table(table, tmp_path / "a.parquet")
    records = read(tmp_path)
    assert [record.text for record in records] == [b"a", b"b"]
    assert [record.url for record in records] == ["here", "there"]
    assert records[1].id == "a.parquet#1"


@pytest.mark.parametrize("codec", ["none", "snappy"])
def test_a_flipped_bit_of_parquet_costs_no_row_without_a_word(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text {n}" for n in range(10)], "id": range(10)})
    pq.write_table(table, path, use_dictionary=codec != "none", compression=codec)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (at % 4, 4 + at % 4):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            try:
                assert len(read(path)) == 10, (at, bit)
            except UserError as error:
                assert path.name in str(error)


def test_fixed_size_values_are_text(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": pa.array([b"abc", None], pa.binary(3))}), tmp_path / "a.parquet"
    )
    assert texts(tmp_path) == ["abc", Skip.NULL]


def test_odd_tables_of_parquet(tmp_path: Path) -> None:
    row = pa.table({"text": ["a"]})
    pq.write_table(row.slice(0, 0), tmp_path / "no-rows.PARQUET")
    pq.ParquetWriter(tmp_path / "no-groups.parquet", row.schema).close()
    with pq.ParquetWriter(tmp_path / "empty-groups.parquet", row.schema) as writer:
        for table in (row.slice(0, 0), row, row.slice(0, 0), row):
            writer.write_table(table)
    pq.write_table(pa.table([["a"], [1], [2]], ["text", "id", "id"]), tmp_path / "two-ids.parquet")
    dotted = pa.table({"text.n": [1], "text": ["a"], "id.n": [1]})
    pq.write_table(dotted, tmp_path / "dots.parquet")
    found = [(record.id, text_of(record)) for record in read(tmp_path)]
    ids = ["dots.parquet#0", "empty-groups.parquet#0", "empty-groups.parquet#1", "1"]
    assert found == [(name, "a") for name in ids]


def test_two_columns_of_text_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has 2 columns 'text'"):
        read(tmp_path)


def test_the_row_group_that_is_broken_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = random.Random(0)
    table = pa.table({"text": [rng.randbytes(40).hex() for _ in range(900)]})
    pq.write_table(table, path, row_group_size=300, use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[group.data_page_offset + 2000 : group.data_page_offset + 3000] = bytes(1000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet, row group 1: .*; repair or remove it"):
        read(path)


JSON: dict[str, tuple[str, str | Skip]] = {
    "a long number": (f'{{"text": "a", "id": {"7" * 9999}}}', "a"),
    "a large number": ('{"text": "a", "id": 1e999, "n": -0}', "a"),
    "no number": ('{"text": "a", "id": NaN}', "a"),
    "a key twice": ('{"text": "b", "text": "a"}', "a"),
    "half a character": (r'{"text": "a\ud800"}', Skip.UNDECODABLE),
    "half a character elsewhere": (r'{"text": "a", "id": "\ud800", "\ud800": "\udfff"}', "a"),
    "both halves": (r'{"text": "\ud83d\ude00"}', "😀"),
    "bad UTF-8": ('{"text": "a\udcff"}', Skip.UNDECODABLE),
    "bad UTF-8 elsewhere": ('{"text": "a", "id": "\udcff"}', "a"),
    "an end of line": (r'{"text": "a\nb\u2028c"}', "a\nb\u2028c"),
    "a zero": (r'{"text": "a\u0000"}', "a\0"),
    "no text": ('{"text": {"text": "a"}}', Skip.NOT_TEXT),
    "a number": (f'{{"text": {"7" * 9999}}}', Skip.NOT_TEXT),
    "truth": ('{"text": false}', Skip.NOT_TEXT),
    "null": ('{"text": null}', Skip.NULL),
    "blanks": ('{"text": "\u3000 \\t"}', Skip.EMPTY),
}


@pytest.mark.parametrize("kind", JSON)
def test_a_line_of_json_is_read_or_skipped_for_a_reason(tmp_path: Path, kind: str) -> None:
    line, expected = JSON[kind]
    lines = "\n".join(['{"text": "before"}', "", line, '{"text": "after"}'])
    (tmp_path / "a.jsonl").write_bytes(lines.encode("utf-8", "surrogateescape"))
    records = read(tmp_path)
    assert [text_of(r) for r in records] == ["before", expected, "after"]
    assert [r.position for r in records] == [f"a.jsonl#{row}" for row in (0, 2, 3)]
    assert all(r.id.encode() for r in records)


@pytest.mark.parametrize(
    "line",
    ["\0" * 99, "[1]", "7" * 9999, '{"text": "a"} {"text": "b"}', '{"text": "a"}\r{"text": "b"}',
     "{'text': 'a'}", '{"n": ' + "7" * 9999, '{"text": "a", "n": ' + "[" * 99_999, "\udcff\udcfe"],
    ids=range(9),
)  # fmt: skip
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    data = f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n'.encode("utf-8", "surrogateescape")
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: ") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def _parquet(rng: random.Random) -> bytes:
    sink = pa.BufferOutputStream()
    rows = [{"text": f"text {n} " * 9, "id": n, "url": b"u"} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


def _lines(ending: str, encoding: str) -> Callable[[random.Random], bytes]:
    lines = "".join(f'{{"text": "text {n} é", "id": {n}}}\n' for n in range(40))
    return lambda rng: PACKERS[ending](ENCODED[encoding](lines)) * 2


FUZZED = {
    "a.parquet": _parquet,
    "a.jsonl": _lines("", "UTF-8"),
    "b.jsonl": _lines("", "UTF-16 LE"),
    **{f"a.jsonl{ending}": _lines(ending, "UTF-8") for ending in PACKERS if ending},
}


@pytest.mark.parametrize("name", FUZZED)
def test_damage_anywhere_is_told_in_one_line_or_skipped(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    whole = FUZZED[name](rng)
    for number in range(90):
        data, at = bytearray(whole), rng.randrange(len(whole))
        if number % 3 == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif number % 3 == 1:
            data[at : at + 9] = rng.randbytes(9)
        else:
            del data[at : at + rng.choice((1, 9, len(data)))]
        (tmp_path / name).write_bytes(data)
        try:
            assert all(texts(tmp_path))
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)


def test_one_word_of_megabytes_is_read_in_linear_time(tmp_path: Path) -> None:
    word = random.Random(0).randbytes(3_000_000).hex()
    for ending, pack in [(ending, PACKERS[ending]) for ending in ("", ".zst")]:
        (tmp_path / f"a.jsonl{ending}").write_bytes(pack(f'{{"text": "{word}"}}'.encode()))
        (tmp_path / f"a.txt{ending}").write_bytes(pack(word.encode()))
    start = time.process_time()
    assert set(texts(tmp_path)) == {word}
    assert time.process_time() - start < 10


@pytest.mark.parametrize("column", ["body", "id", "text.n", " "])
def test_another_column_or_key_is_the_text(tmp_path: Path, column: str) -> None:
    rows = [{"text": 1, "id": "id", "url": "u", column: f"text {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = file_source(tmp_path).with_text_column(column)
    assert source.name.endswith(f", column {column}")
    found = [record for part in source.parts() for record in part.records()]
    assert [text_of(record) for record in found] == [f"text {n}" for n in range(3)] * 2
    ids = {f"text {n}" for n in range(3)} if column == "id" else {"id"}
    assert {record.id for record in found} == ids


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.jsonl"):
        pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
        (tmp_path / "a.jsonl").write_text('{"body": "x"}')
        source = file_source(tmp_path / name).with_text_column("words")
        with pytest.raises(UserError, match=rf"{name}.* 'words'.*--text-column"):
            [record for part in source.parts() for record in part.records()]


class Watched(io.FileIO):
    """A file that remembers the longest read."""

    longest = 0

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        data = super().read(size)
        self.longest = max(self.longest, len(data))
        return data


def test_of_a_large_row_group_little_is_in_memory(tmp_path: Path) -> None:
    texts = [random.Random(n).randbytes(10_000).hex() for n in range(1000)]
    table = pa.table({"text": texts, "id": [f"{n}" for n in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=10)
    file = SourceFile("a.parquet", 0, tmp_path / "a.parquet", (0, 0, 0))
    with Watched(tmp_path / "a.parquet") as handle, open_parquet(handle, "text") as parquet:
        assert parquet.metadata.row_group(0).column(0).total_compressed_size > 8_000_000
        found = [record.text for record in read_rows(parquet, file, 0, 0)]
    assert found == [text.encode() for text in texts]
    assert handle.longest < 3_000_000


@pytest.mark.parametrize("sizes", ["L", "sL", "LsL", "sLLsLLLLsLLLLLLs", "LLLLLLLLLLL"])
def test_rows_come_once_and_in_order_though_large_batches_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: str
) -> None:
    """The row group is read again after a large batch but the last, at most 8 times."""
    large = [size == "L" for size in sizes for _ in range(128)]
    rows = [f"{row} " + "x" * 50 * is_large for row, is_large in enumerate(large)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    begin, begun = pq.ParquetFile.iter_batches, []
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *args, **to: begun.append(1) or begin(*args, **to)
    )
    monkeypatch.setattr(readers, "_LARGE", 5000)
    assert texts(tmp_path / "a.parquet") == rows
    assert len(begun) == 1 + min(8, sizes[:-1].count("L"))
