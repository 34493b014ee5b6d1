"""Sources: each is read in a fixed order, and a broken file is an error that names it."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import sources
from data_prep.reading import hub, remote
from data_prep.reading.files import file_source, stdlib_source
from data_prep.shard import main
from data_prep.sources import Record, Skip, Source, usable_text
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError
from tests.data_prep.corpus import build

LINES = "".join(json.dumps({"text": f"text {i} " * 50}) + "\n" for i in range(300)).encode()


def records(source: Source) -> list[Record]:
    return [record for part in source.parts() for record in part.records()]


def parquet(**columns: list[object]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def test_a_folder_is_read_in_the_order_of_names(corpus: tuple[Path, dict[str, str]]) -> None:
    found = records(file_source(str(corpus[0])))
    order = [record.position.partition("#")[0] for record in found]
    assert order == sorted(order)
    assert "ignored.md" not in order
    assert len({record.position for record in found}) == len(found)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", {"odd.jsonl"}),
        ("deep/*", {"b.jsonl", "c.jsonl.gz", "e.txt"}),
        ("**/*.zst", {"deep/er/d.jsonl.zst"}),
        ("deep", {"b.jsonl", "c.jsonl.gz", "e.txt", "er/d.jsonl.zst"}),
        ("a.parquet", {"a.parquet"}),
    ],
)
def test_files_folders_and_globs(
    corpus: tuple[Path, dict[str, str]], pattern: str, expected: set[str]
) -> None:
    source = file_source(f"{corpus[0]}/{pattern}")
    assert {name for _, name in source.files} == expected
    assert source.name == Path(pattern).name


def test_a_path_with_brackets_is_a_path_first(tmp_path: Path) -> None:
    (tmp_path / "[a].txt").write_text("x")
    assert [r.id for r in records(file_source(str(tmp_path / "[a].txt")))] == ["[a].txt"]


def test_the_revision_follows_names_and_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    revisions = [file_source(str(tmp_path)).revision]
    file.write_text("two")
    revisions.append(file_source(str(tmp_path)).revision)
    file.rename(tmp_path / "b.txt")
    revisions.append(file_source(str(tmp_path)).revision)
    assert len(set(revisions)) == 3


def test_dictionary_and_large_strings_are_text(tmp_path: Path) -> None:
    texts = pa.array(["a", "b", "a"])
    for kind in (texts.dictionary_encode(), texts.cast(pa.large_string())):
        pq.write_table(pa.table({"text": kind}), tmp_path / "t.parquet")
        found = records(file_source(str(tmp_path / "t.parquet")))
        assert [record.text for record in found] == [b"a", b"b", b"a"]


def test_the_standard_library_has_text_and_no_tests() -> None:
    source = stdlib_source()
    names = [name for _, name in source.files]
    assert "json/decoder.py" in names and names == sorted(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    found = records(source)
    assert "stdlib:json/decoder.py" in {record.url for record in found}
    assert sum(len(record.text) for record in found) > 5_000_000  # type: ignore[arg-type]


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "parquet, cut": (
        "x.parquet",
        parquet(text=["a"] * 99)[:-20],
        r"cannot read .*x.parquet: .*[^.]; repair or remove it$",
    ),
    "parquet, empty": ("x.parquet", b"", "cannot read .*x.parquet"),
    "parquet, no text": ("x.parquet", parquet(body=["a"]), r"x.parquet has no column 'text'.*body"),
    "gzip, cut": ("x.jsonl.gz", gzip.compress(LINES)[:-9], "cannot read .*x.jsonl.gz"),
    "gzip, none": ("x.jsonl.gz", b"no gzip at all", "cannot read .*x.jsonl.gz"),
    "zstd, cut": ("x.jsonl.zst", zstandard.compress(LINES)[:-9], "cannot read .*x.jsonl.zst"),
    "broken line": ("x.jsonl", b'{"text": "a"}\n\n{"text": "b', r"x\.jsonl, line 3: broken JSON"),
    "deep line": ("x.jsonl", b"[" * 100_000, r"x\.jsonl, line 1: broken JSON"),
    "long number": ("x.jsonl", b'{"n": ' + b"1" * 9999 + b"}", r"x\.jsonl, line 1: no key 'text'"),
    "no key": ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', r"x\.jsonl, line 2: no key 'text'"),
    "no object": ("x.jsonl", b'"text"', r"x\.jsonl, line 1: no key 'text'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, kind: str) -> None:
    name, data, message = BROKEN[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        records(file_source(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_broken_page_of_parquet_is_named(tmp_path: Path) -> None:
    data = bytearray(parquet(text=[f"{i} text" for i in range(5000)]))
    data[200:400] = bytes(200)
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read .*x\.parquet"):
        records(file_source(str(tmp_path)))


def test_a_broken_file_is_named_by_a_worker_process(
    corpus: tuple[Path, dict[str, str]], built: Path, tmp_path: Path
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_bytes(LINES if number < 3 else LINES[:-9])
    with pytest.raises(UserError, match=r"3\.jsonl, line 300: broken JSON"):
        build(tmp_path, tmp_path / "out", "--workers", 2, "--tokenizer", built / "tokenizer.json")


def serve_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Have the hub's dataset be the parquet files of a folder; returns the commits asked for."""
    asked: list[str | None] = []
    paths = sorted(folder.glob("*.parquet"))

    def commit(dataset: str, at: str | None) -> str:
        assert dataset == hub.DATASET
        asked.append(at)
        return at or "newest"

    monkeypatch.setattr(hub, "_commit", commit)
    monkeypatch.setattr(hub, "_data_files", lambda *_: [path.as_uri() for path in paths])
    monkeypatch.setattr(hub, "_sizes", lambda _: [path.stat().st_size for path in paths])
    return asked


def test_the_hub_is_read_by_row_groups_at_one_revision(
    three_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = serve_from(three_files, monkeypatch)
    source = hub.HubSource()
    assert len(source.parts()) == 1
    monkeypatch.setattr(remote, "_PART", 1)
    parts = source.parts()
    assert len(parts) == 6 and asked == [None, "newest", "newest"]
    found = records(source)
    assert [record.id for record in found] == [f"{n}-{i}" for n in range(3) for i in range(4)]
    assert [record.position for record in found] == [
        f"sample-10BT/{n:05d}#{i}" for n in range(3) for i in range(4)
    ], "as older versions had them, so that their outputs stay what they are"
    assert found[5].url == "u" and found[5].text == b"text 1 1"
    samples = source.sample_parts(parts)
    assert [len(list(part.records())) for part in samples] == [4, 4, 4]
    pinned = hub.HubSource()
    pinned.pin("old")
    assert pinned.parts()[0].revision == "old"
    assert len({part.identity for part in (*parts, *pinned.parts())}) == 12


def test_a_finished_output_from_the_hub_needs_no_network(
    three_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(dataset: str, at: str | None) -> str:
        raise ConnectionError

    arguments = ["--out", str(tmp_path / "out"), "--vocab-size", "300", "--workers", "1"]
    serve_from(three_files, monkeypatch)
    main(arguments)
    assert Manifest.load(tmp_path / "out" / "train").source == hub.HUB_NAME
    monkeypatch.setattr(hub, "_commit", unreachable)
    main(arguments)
    assert capsys.readouterr().out.endswith("is already complete\n")


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ConnectionError("gone\naway")

    monkeypatch.setattr(hub, "_commit", fail)
    with pytest.raises(UserError, match=r"cannot read .* from the hub .*gone away") as caught:
        hub.HubSource().parts()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", hub.CONFIGS)
def test_samples_of_the_default_dataset_have_names(config: str) -> None:
    source = sources.SOURCES[f"{hub.DATASET}/{config}"]()
    assert source.name == f"{hub.DATASET} {config}"
    assert sources.SOURCES[hub.DATASET]().name == f"{hub.DATASET} sample-10BT"


@pytest.mark.parametrize("slice_bytes", [3, 1 << 22])
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, Skip.NULL),
        (5, Skip.NOT_TEXT),
        ("", Skip.EMPTY),
        (" \t\u3000\n" * 3, Skip.EMPTY),
        (" " * 9 + "x", None),
        ("x" + " " * 9, None),
        ("世界😀" * 3, None),
        (b"text " * 2 + b"\xff", Skip.UNDECODABLE),
        ("text 世".encode()[:-1], Skip.UNDECODABLE),
        ("text \ud800", Skip.UNDECODABLE),
    ],
)
def test_usable_text_is_valid_utf8(
    monkeypatch: pytest.MonkeyPatch, slice_bytes: int, raw: object, expected: Skip | None
) -> None:
    monkeypatch.setattr(sources, "_SLICE", slice_bytes)
    assert usable_text(raw) == (expected or str(raw).encode())
