"""Sources at URLs and on the hub: the same text, the same shards, whatever the network does."""

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import retries
from data_prep.passes import SpillPlan, finished
from data_prep.reading import remote
from data_prep.reading.hub import HubSource, source_at
from data_prep.reading.mixture import split_weight
from data_prep.reading.remote import RemoteSource, url_source
from data_prep.shuffle import PartSummary, summary_path
from data_prep.sources import Record, Source
from i3dist.data.manifest import Manifest
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from tests.conftest import ROOT
from tests.data_prep.advice import counting
from tests.data_prep.corpus import arguments, build, read_documents, tree_digest
from tests.hub_server import COMMIT, DATASET, Behavior, hub

ROWS, FILES = 60, 3
CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: data/*.parquet
- config_name: tests
  data_files:
  - split: test
    path: data/0.parquet
  - split: other
    path: data/1.parquet
---
"""


def rows(file: int) -> list[dict[str, str]]:
    rng = random.Random(file)
    return [
        {
            "text": f"file {file} row {n} " + rng.randbytes(rng.randint(1, 90)).hex(),
            "id": f"{file}-{n}",
            "url": f"https://example.org/{file}/{n}",
            "ballast": rng.randbytes(1500).hex(),
        }
        for n in range(ROWS)
    ]


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three parquet files of six row groups each, and files of other kinds."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "data").mkdir()
    (folder / "README.md").write_text(CARD)
    for number in range(FILES):
        table = pa.Table.from_pylist(rows(number))
        pq.write_table(table, folder / "data" / f"{number}.parquet", row_group_size=10)
    (folder / "lines").mkdir()
    lines = "".join(json.dumps(row | {"ballast": ""}) + "\n" for row in rows(7))
    (folder / "lines" / "a.jsonl").write_text(lines)
    (folder / "lines" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "lines" / "c.txt").write_text("a document", "utf-16")
    (folder / "lines" / ".hidden.txt").write_text("not read")
    (folder / "lines" / "_more").mkdir()
    (folder / "lines" / "_more" / "d.txt").write_text("not read")
    return folder


@pytest.fixture
def server(stored: Path) -> Iterator[Behavior]:
    with hub(stored) as behavior:
        yield behavior


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long pauses, and a part for every row group or two."""
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retries, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 5.0)
    monkeypatch.setattr(remote, "_PART", 60_000)


def records(source: Source) -> list[Record]:
    return [record for part in source.parts() for record in part.records()]


def splits_of(out: Path) -> dict[str, str]:
    digests = tree_digest(out)
    return {name: digests[name] for name in digests if name.startswith(("train", "valid"))}


# The same text, the same shards.


@pytest.mark.parametrize("below", ["", "/data", "/data/*.parquet", "/data/1.parquet", "/lines"])
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_copy_at_a_url_gives_the_same_shards(
    stored: Path, tokenizer: Path, tmp_path: Path, below: str, scheme: str
) -> None:
    if scheme == "memory":
        memory = fsspec.filesystem("memory")
        if not memory.exists(f"/{stored.name}"):
            memory.put(str(stored), f"/{stored.name}", recursive=True)
        url = f"memory://{stored.name}{below}"
    else:
        url = f"{stored.as_uri()}{below}"
    build(f"{stored}{below}", tmp_path / "here", "--tokenizer", tokenizer)
    build(url, tmp_path / "there", "--tokenizer", tokenizer)
    assert splits_of(tmp_path / "there") == splits_of(tmp_path / "here")


@pytest.mark.parametrize("name", ["data/1.parquet", "lines/%61.jsonl", "lines/b.jsonl.gz"])
def test_a_file_of_a_web_server_gives_the_same_shards(
    stored: Path, server: Behavior, tokenizer: Path, tmp_path: Path, name: str
) -> None:
    build(stored / unquote(name), tmp_path / "here", "--tokenizer", tokenizer)
    url = f"{server.url}/plain/{name}"
    build(url, tmp_path / "there", "--tokenizer", tokenizer)
    assert splits_of(tmp_path / "there") == splits_of(tmp_path / "here")
    build(f"{url}?key=secret", tmp_path / "asked", "--tokenizer", tokenizer)
    assert splits_of(tmp_path / "asked") == splits_of(tmp_path / "here")
    build(url, tmp_path / "many", "--tokenizer", tokenizer, "--workers", 3)
    assert tree_digest(tmp_path / "many") == tree_digest(tmp_path / "there")


def run(server: Behavior, home: Path, out: Path, *options: object, source: str = "") -> str:
    """Run shard.py on the hub, in a process whose libraries know no other; returns its errors."""
    code = (
        "import sys\nfrom data_prep import retries, shard\nfrom data_prep.reading import remote\n"
        "from i3dist.cli.program import one_line_errors\n"
        "remote._PART, retries._FIRST_PAUSE = 60_000, 0.01\n"
        "with one_line_errors(): shard.main(sys.argv[1:])"
    )
    source = source or f"hf://datasets/{DATASET}/small"
    command = [sys.executable, "-c", code, *arguments(source, out, *options)]
    env = os.environ | server.environment(home)
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="session")
def from_hub(stored: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes of the hub's dataset."""
    folder = tmp_path_factory.mktemp("hub")
    with hub(stored) as server:
        said = run(server, folder / "home", folder / "out", "--tokenizer", tokenizer)
    assert not said
    return folder / "out"


def test_a_configuration_of_the_hub_is_read_by_more_workers_than_files(
    server: Behavior, tokenizer: Path, from_hub: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert not run(server, tmp_path / "home", out, "--tokenizer", tokenizer, "--workers", 4)
    assert tree_digest(out) == tree_digest(from_hub)
    found = [
        document
        for name in ("train", "valid")
        for document in read_documents(out / name, Tokenizer.load(tokenizer))
    ]
    wanted = [(r["id"], r["url"], r["text"]) for number in range(FILES) for r in rows(number)]
    assert sorted(found) == sorted(wanted)
    assert Manifest.load(out / "train").source == f"{DATASET} small"
    assert COMMIT in (out / "shard.json").read_text()


def test_a_hub_that_is_busy_slow_and_drops_gives_the_same_bytes(
    server: Behavior, tokenizer: Path, from_hub: Path, tmp_path: Path
) -> None:
    server.failures, server.delay, server.busy_seconds = 0.05, 0.01, 2.0
    said = run(server, tmp_path / "home", tmp_path / "out", "--tokenizer", tokenizer)
    assert "error: " not in said  # huggingface_hub tells of its own retries
    assert tree_digest(tmp_path / "out") == tree_digest(from_hub)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (f"hf://datasets/{DATASET}/none", "BuilderConfig 'none' not found. Available: .*small"),
        (f"hf://datasets/{DATASET}/tests", "has no split train, but test, other: name its files"),
        ("hf://datasets/owner/none/small", "cannot read owner/none small from the hub .*NotFound"),
        (f"hf://datasets/{DATASET}@dead/small", "cannot read .* at dead from the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(
    server: Behavior, tmp_path: Path, source: str, says: str
) -> None:
    line = run(server, tmp_path / "home", tmp_path / "out", source=source).splitlines()[-1]
    assert line.startswith("error: ") and re.search(says, line), line
    assert not (tmp_path / "out").exists()


def test_urls_of_the_hub_name_a_configuration_or_files() -> None:
    names = {
        "hf://datasets/o/n": "o/n",
        "hf://datasets/o/n/c": "o/n c",
        "hf://datasets/o/n@v1/c": "o/n c at v1",
        "hf://datasets/o/n/c/": "o/n c",
    }
    for url, name in names.items():
        source = source_at(url)
        assert isinstance(source, HubSource) and source.name == name
        assert source.with_text_column("body").name == f"{name}, column body"


# What is fetched.


def test_only_columns_that_are_needed_are_fetched(stored: Path, server: Behavior) -> None:
    path = stored / "data" / "0.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    sizes = {
        group.column(n).path_in_schema: group.column(n).total_compressed_size
        for n in range(group.num_columns)
    }
    source = url_source(f"{server.url}/plain/data/0.parquet")
    parts = source.parts()
    server.sent = 0
    assert len(list(parts[0].records())) == 10 * len(parts[0].spans)
    footer = 1 << 16
    needed = len(parts[0].spans) * 1.3 * (sizes["text"] + sizes["id"] + sizes["url"])
    assert server.sent < footer + needed < footer + sizes["ballast"]


def test_a_large_row_group_is_fetched_in_blocks(
    server: Behavior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a failure costs no more than a block."""
    monkeypatch.setattr(remote, "_BLOCK", 10_000)
    server.failures = 0.3
    found = records(url_source(f"{server.url}/plain/data/0.parquet"))
    assert [record.id for record in found] == [row["id"] for row in rows(0)]
    before = server.sent
    server.failures = 0.0
    records(url_source(f"{server.url}/plain/data/0.parquet"))
    assert before < 1.5 * (server.sent - before)


# Failures.


@pytest.mark.parametrize("name", ["data/0.parquet", "lines/a.jsonl", "lines/b.jsonl.gz"])
def test_requests_that_fail_are_sent_again(
    server: Behavior, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 20_000 if "parquet" in name else 1000)
    url = f"{server.url}/plain/{name}"
    whole = records(url_source(url))
    server.failures = 0.5
    assert records(url_source(url)) == whole and len(whole) == ROWS


def test_a_server_that_stays_away_is_one_line_and_the_run_goes_on_later(
    server: Behavior, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/plain/data/0.parquet"
    options = ["--tokenizer", tokenizer]
    build(url, tmp_path / "whole", *options)
    whole, server.answered = server.answered, 0
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0.3)
    server.busy_after = whole * 3 // 4
    with pytest.raises(UserError, match=r"0\.parquet.* 503.* tried for 0 s\): run the same"):
        build(url, tmp_path / "out", *options)
    server.busy_after = None
    spilled = counting(monkeypatch)
    build(url, tmp_path / "out", *options)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    assert 0 < len(spilled) < len(url_source(url).parts())


def test_a_server_that_is_not_there_at_first_is_waited_for(
    server: Behavior, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """fsspec says then that the file is not there."""
    monkeypatch.setattr(retries, "_TOLD_PAUSE", retries._FIRST_PAUSE)
    monkeypatch.setattr(retries, "_told", -math.inf)
    server.busy_until = time.monotonic() + 1.0
    assert len(records(url_source(f"{server.url}/plain/data/0.parquet"))) == ROWS
    said = capsys.readouterr().err
    assert re.search(r"0\.parquet \(.* 503.*: trying again for up to \d+ s\n$", said), said


def test_a_silent_server_is_asked_again(server: Behavior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SOCKET_SECONDS", 0.3)
    source = url_source(f"{server.url}/plain/lines/a.jsonl")
    server.stalls, start = 2, time.monotonic()
    assert len(records(source)) == ROWS and not server.stalls
    assert time.monotonic() - start < server.stall_seconds


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("URL/plain/data/9.parquet", r"9\.parquet: ClientResponseError: 404.*; check the URL"),
        ("URL/plain/data/notes.md", r"nothing at .*ends in \.parquet"),
        ("memory://no/such/folder", r"nothing at memory://no/such/folder ends in"),
        ("xyz://a/b.parquet", r"cannot open --source xyz://a/b\.parquet: .*xyz.*copy the files"),
        ("s3://bucket/b.parquet", r"cannot open --source s3://.*s3fs.*install"),
        ("pipe:cat a.jsonl", r"cannot open --source pipe:|cannot read pipe:"),
    ],
)
def test_a_url_that_does_not_serve_is_one_line(
    server: Behavior, tmp_path: Path, spec: str, says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        build(spec.replace("URL", server.url), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_server_that_sends_no_parts_of_files_is_told(
    server: Behavior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 5000)
    server.ranges = False
    for name in ("data/0.parquet", "lines/a.jsonl"):
        with pytest.raises(UserError, match=r"cannot read .*range requests.*; check the URL"):
            records(url_source(f"{server.url}/plain/{name}"))


def test_a_damaged_row_group_is_named(stored: Path, tmp_path: Path) -> None:
    data = bytearray((stored / "data" / "0.parquet").read_bytes())
    column = pq.ParquetFile(stored / "data" / "0.parquet").metadata.row_group(3).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start + 30 : start + 400] = bytes(370)
    (tmp_path / "plain").mkdir()
    (tmp_path / "0.parquet").write_bytes(data)
    with hub(tmp_path) as server:
        url = f"{server.url}/plain/0.parquet"
        with pytest.raises(UserError, match=r"cannot read http.*0\.parquet, row group 3: "):
            records(url_source(url))


def test_no_password_or_key_is_shown(server: Behavior) -> None:
    url = server.url.replace("//", "//me:hush@") + "/plain/data/9.parquet?key=hush"
    with pytest.raises(UserError) as error:
        url_source(url)
    assert "hush" not in str(error.value)


# What continues.


def test_other_content_at_a_url_is_refused(stored: Path, tokenizer: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/changing/a.jsonl", b"".join(b'{"text": "one %d"}\n' % n for n in range(9)))
    options = ["--tokenizer", tokenizer]
    build("memory://changing", tmp_path / "out", *options)
    build("memory://changing", tmp_path / "out", *options)
    memory.pipe("/changing/a.jsonl", b"".join(b'{"text": "two %d"}\n' % n for n in range(9)))
    with pytest.raises(UserError, match="from other content of the same source"):
        build("memory://changing", tmp_path / "out", *options)


def test_parts_that_an_older_version_cut_in_another_way_are_read_again(
    stored: Path, tmp_path: Path
) -> None:
    """Its parts of the hub were whole files, and their summaries said nothing of it."""
    parts = url_source(f"{stored.as_uri()}/data").parts()
    plan = SpillPlan(parts, tmp_path, tmp_path, 0)
    fields = {"runs": (), "documents": 1, "tokens": 1, "skipped": {}, "smallest_split": 0}
    summary = PartSummary(**fields, largest_split=1)  # type: ignore[arg-type]
    summary_path(tmp_path, 0).write_text(summary.model_dump_json(exclude={"identity", "usable"}))
    ours = summary.model_copy(update={"identity": parts[1].identity})
    for number in (1, 2):
        summary_path(tmp_path, number).write_text(ours.model_dump_json())
    assert finished(plan)[:3] == [None, ours, None]


def test_the_order_and_names_are_those_of_a_folder(stored: Path) -> None:
    source = url_source(f"{stored.as_uri()}/")
    assert isinstance(source, RemoteSource) and source.name == stored.name
    assert [file.name for file in source.remote_files] == [
        *(f"data/{n}.parquet" for n in range(FILES)),
        "lines/a.jsonl",
        "lines/b.jsonl.gz",
        "lines/c.txt",
    ]
    assert source.left_out == "hidden and other files (3)"


class OneFile:
    """A filesystem that has one file, or what its kind is."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def info(self, path: str) -> dict[str, str]:
        return {"name": path, "type": self.kind}

    def find(self, path: str, detail: bool) -> dict[str, dict[str, str]]:
        return {}


def test_a_link_is_a_file_and_a_folder_may_have_a_files_name() -> None:
    """As sftp tells of links."""
    for kind, number in {"file": 1, "link": 1, "directory": 0}.items():
        assert len(remote._listed(OneFile(kind), "/home/a.jsonl")[1]) == number
    with pytest.raises(UserError, match=r"a\.jsonl is no file or folder"):
        remote._listed(OneFile("other"), "/home/a.jsonl")


# The command line.


def test_a_url_has_a_weight_and_a_port() -> None:
    for text, expected in {
        "http://host:8080/a.jsonl:0.5": ("http://host:8080/a.jsonl", 0.5),
        "http://host:8080": ("http://host:8080", 1.0),
        "http://[x:8080": ("http://[x:8080", 1.0),
        "http://[x/a.jsonl:2": ("http://[x/a.jsonl", 2.0),
        "s3://bucket/a:2": ("s3://bucket/a", 2.0),
        "pipe:cat:2": ("pipe:cat", 2.0),
        "hf://datasets/o/n/c:0.1": ("hf://datasets/o/n/c", 0.1),
    }.items():
        assert split_weight(text) == expected


def test_a_mixture_of_a_folder_and_a_url(stored: Path, tokenizer: Path, tmp_path: Path) -> None:
    url = f"{stored.as_uri()}/data:0.5"
    options = ["--tokenizer", tokenizer, "--source", url]
    build(stored / "lines", tmp_path / "out", *options)
    build(stored / "lines", tmp_path / "many", *options, "--workers", 3)
    assert tree_digest(tmp_path / "many") == tree_digest(tmp_path / "out")
    build(stored / "lines", tmp_path / "out", *options)
    counts = Manifest.load(tmp_path / "out" / "train").sources or ()
    assert [source.usable for source in counts] == [2 * ROWS + 1, FILES * ROWS]
    assert counts[0].documents == 2 * ROWS + 1 and 60 < counts[1].documents < 120
