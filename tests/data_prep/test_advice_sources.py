"""What messages about sources and paths say can be done, and helps.

Each test does it to the letter. Not repeated here: a file that changes while it is read
(test_evidence.py).
"""

import os
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import shard
from data_prep.reading import files, hub
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError
from tests.data_prep import corpus as helpers
from tests.data_prep.advice import TEXTS, build, counting, is_followed, refusal, write
from tests.data_prep.corpus import tree_digest
from tests.data_prep.test_sources import serve_from

# Sources.


@pytest.fixture
def little_library(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library is large, and stands for itself in test_sources.py."""
    library = tmp_path / "library"
    library.mkdir()
    for number, text in enumerate(TEXTS):
        (library / f"m{number}.py").write_text(text)
    monkeypatch.setattr("data_prep.reading.files.sysconfig.get_path", lambda _: str(library))


@pytest.mark.parametrize("kind", ["missing", "pipe", "empty folder", "glob of nothing", "stdlib"])
@pytest.mark.usefixtures("little_library")
def test_a_source_that_gives_no_file(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out, place = tmp_path / "out", tmp_path / "place"
    spec: object = place
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "empty folder":
        place.mkdir()
    elif kind == "glob of nothing":
        spec = tmp_path / "*.txt"
    elif kind == "stdlib":
        place.mkdir()
        with monkeypatch.context() as patched:
            patched.setattr("data_prep.reading.files.sysconfig.get_path", lambda _: str(place))
            line = refusal("stdlib", out)
        assert line.endswith("name a --source")
        build(texts, out)
        return
    line = refusal(spec, out)
    assert re.search(r"name (another|an existing one with) --source", line)
    assert kind != "missing" or line.endswith(", or stdlib")
    build(texts, out)
    build("stdlib", tmp_path / "library-out")


@pytest.mark.parametrize("given", [False, True])
def test_a_source_without_a_usable_document(
    texts: Path, tmp_path: Path, tokenizer: Path, given: bool
) -> None:
    """The folder is free for the source that is named then."""
    empty = write(tmp_path / "empty" / "a.jsonl", [" ", ""])
    out = tmp_path / "out"
    options = ["--tokenizer", tokenizer] if given else []
    with pytest.raises(UserError, match=r"no usable document .*: name another --source"):
        helpers.build(empty, out, *options)
    helpers.build(texts, out, *options)
    Manifest.load(out / "train")


BROKEN = '{"text": "broken'


@pytest.mark.parametrize("remedy", ["repair", "remove"])
def test_a_broken_line_is_repaired_or_removed(texts: Path, tmp_path: Path, remedy: str) -> None:
    path = write(texts / "b.jsonl", TEXTS[:3])
    path.write_text(path.read_text() + BROKEN)
    assert refusal(texts, tmp_path / "out").endswith("repair or remove it")
    if remedy == "repair":
        path.write_text(path.read_text() + '"}\n')
    else:
        path.write_text(path.read_text().removesuffix(BROKEN))
    build(texts, tmp_path / "out")


@pytest.mark.parametrize("remedy", ["repair", "remove", "restore"])
def test_a_file_that_breaks_begun_work(
    texts: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, remedy: str
) -> None:
    """The work goes on with the part that failed; a source with other files is another one."""
    monkeypatch.setattr(files, "_SMALLEST_PART", 100)
    path = write(texts / "b.jsonl", TEXTS[:3])
    good = path.read_bytes()
    path.write_bytes(good[:-3] + b"}}\n" if remedy == "restore" else good[:-3])
    out = tmp_path / "out"
    words = [texts, out, "--tokenizer", tokenizer, "--vocab-size", 400]
    with pytest.raises(UserError, match=r"; repair or remove it$"):
        build(*words)
    if remedy == "remove":
        path.unlink()
        is_followed(refusal(*words), *words)
        return
    path.write_bytes(good)
    spilled = counting(monkeypatch)
    build(*words)
    assert spilled == [1]
    build(texts, tmp_path / "whole", *words[2:])
    assert tree_digest(out) == tree_digest(tmp_path / "whole")


def test_a_link_that_leads_in_circles(texts: Path, tmp_path: Path) -> None:
    (texts / "b.jsonl").symlink_to("c.jsonl")
    (texts / "c.jsonl").symlink_to("b.jsonl")
    with pytest.raises(UserError, match="repair or remove it"):
        build(texts / "b.jsonl", tmp_path / "out")
    (texts / "c.jsonl").unlink()
    write(texts / "c.jsonl", TEXTS[:5])
    build(texts / "b.jsonl", tmp_path / "out")


def test_the_hub_out_of_reach(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run this again with a network, or name text of your own with --source (...)`."""
    (tmp_path / "files").mkdir()
    table = pa.table({"text": TEXTS, "id": TEXTS, "url": TEXTS})
    pq.write_table(table, tmp_path / "files" / "hub.parquet")

    def unreachable(dataset: str, at: str | None) -> str:
        raise ConnectionError("no route to host")

    def run(out: Path, *source: object) -> None:
        words = ["--out", out, "--vocab-size", 300, "--workers", 1, "--valid-fraction", 0.2]
        shard.main([str(word) for word in (*words, *source)])
        Manifest.load(out / "train")

    serve_from(tmp_path / "files", monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(hub, "_commit", unreachable)
        with pytest.raises(UserError, match=r"no route .*network, or .*--source stdlib`") as error:
            run(tmp_path / "hub")
        library = tmp_path / "library"
        library.mkdir()
        for number, text in enumerate(TEXTS):
            (library / f"m{number}.py").write_text(text)
        patched.setattr("data_prep.reading.files.sysconfig.get_path", lambda _: str(library))
        words = re.findall(r"`(.*?)`", str(error.value))
        run(tmp_path / "stdlib", *shlex.split(words[0]))
        run(tmp_path / "own", "--source", texts)
    run(tmp_path / "hub")


# Paths as they are typed.


def test_a_path_that_names_no_home() -> None:
    with pytest.raises(UserError, match=r"write \./~nobody-here for") as error:
        shard.parse(["--out", "~nobody-here"])
    (word,) = re.findall(r"write (\S+) for", str(error.value))
    assert shard.parse(["--out", word]).out == Path("~nobody-here")
    for wrong, says in (("", "name a file or folder"), ("a\0b", "name another")):
        with pytest.raises(UserError, match=says):
            shard.parse(["--out", wrong])
    assert shard.parse(["--out", "a b"]).out == Path("a b")
