"""What messages about data say can be done, and helps: each test does it to the letter. 5 s.

Not repeated here: a file that changes while it is read (test_evidence.py).
"""

import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_prep.tokenizer
from data_prep import files, hub, passes, shard
from data_prep.output import Output
from data_prep.tokenizer import check_vocabulary
from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.manifest import MAX_MANIFEST_BYTES, Manifest
from i3dist.data.shards import check_shards, read_shard
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from tests.data_prep import corpus as helpers
from tests.data_prep.corpus import tree_digest

TEXTS = [f"{number} little documents, each with words of its own" for number in range(40)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A source of small documents."""
    return write(tmp_path / "in" / "a.jsonl", TEXTS).parent


@pytest.fixture(scope="session")
def tokenizer(built: Path) -> Path:
    return built / "tokenizer.json"


def write(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def build(source: object, out: Path, *options: object) -> None:
    """Run the tool, and see that what comes out is data."""
    helpers.build(source, out, "--vocab-size", 300, *options)  # type: ignore[arg-type]
    Manifest.load(out / "train")


def refusal(source: object, out: Path, *options: object) -> str:
    with pytest.raises(UserError) as error:
        build(source, out, *options)
    return str(error.value)


def is_followed(line: str, source: object, out: Path, *options: object) -> None:
    """`choose another --out, or delete FOLDER` (or `it`, the folder that the line begins with)."""
    advice, _, folder = line.rpartition(", or delete ")
    assert advice.endswith("choose another --out")
    assert folder in (str(out), "it") and (folder != "it" or line.startswith(f"{out} was made"))
    build(source, out.with_name("another"), *options)
    shutil.rmtree(out)
    build(source, out, *options)


# The output folder.


def test_an_output_of_another_kind(texts: Path, tmp_path: Path) -> None:
    build(texts, tmp_path / "out")
    line = refusal(texts, tmp_path / "out", "--seed", 1)
    assert "was made with seed 0, not 1" in line
    is_followed(line, texts, tmp_path / "out", "--seed", 1)


@pytest.mark.parametrize("name", ["shard.json", "source.json"])
def test_an_output_that_is_damaged(texts: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    build(texts, out)
    (out / name).write_text("{")
    line = refusal(texts, out)
    assert line.startswith(f"{out / name} is damaged")
    is_followed(line, texts, out)


def test_an_output_that_has_lost_something(texts: Path, tmp_path: Path) -> None:
    """Its shards, its manifest or its source.json: `delete FOLDER and make it again`."""
    out = tmp_path / "out"
    build(texts, out)

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size - 9)

    def swell(path: Path) -> None:
        os.truncate(path, MAX_MANIFEST_BYTES + 1)

    damages: list[tuple[str, Callable[[Path], None], str]] = [
        ("train/shard-000001.tar", Path.unlink, f": delete {out} and make it again"),
        ("train/shard-000001.tar", cut, f": delete {out} and make it again"),
        ("train/manifest.json", cut, f"restore it, or delete {out} and make it again"),
        ("valid/manifest.json", swell, f"restore it, or delete {out} and make it again"),
        ("source.json", Path.unlink, ": delete it and make it again"),
    ]
    whole = tree_digest(out)
    for name, damage, says in damages:
        kept = (out / name).read_bytes()
        damage(out / name)
        line = refusal(texts, out)
        assert line.endswith(says) and str(out) in line
        (out / name).write_bytes(kept)
        build(texts, out)
        damage(out / name)
        shutil.rmtree(out)
        build(texts, out)
        assert tree_digest(out).items() >= whole.items() - {("source.json", whole["source.json"])}


def test_an_output_that_holds_other_files(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").touch()
    assert refusal(texts, tmp_path / "mine").endswith("choose another --out")
    build(texts, tmp_path / "another")


def test_an_output_that_another_run_is_writing(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with Output(out).locked():
        assert refusal(texts, out) == f"another run is writing {out}: wait for it"
    build(texts, out)
    before = tree_digest(out)
    with Output(out).locked():
        assert refusal(texts, out) == f"another run is writing {out}: wait for it"
    build(texts, out)
    assert tree_digest(out) == before and "already complete" in capsys.readouterr().out


def test_an_output_on_a_disk_without_locks(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tmp_path / "remote"
    remote.mkdir()

    def flock(handle: int, operation: int, real: Any = fcntl.flock) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_relative_to(remote):
            raise OSError(38, "Function not implemented")
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    line = refusal(texts, remote / "out")
    assert "choose an --out on a local disk, and move the folder when it is complete" in line
    build(texts, tmp_path / "local")
    shutil.move(tmp_path / "local", remote / "out")
    Corpus.open(remote / "out", ModelSettings(chunk_length=64))


# Options that do not fit the source.


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts that are tokenized from now on."""
    spilled: list[int] = []

    def spill(self: Any, part: Any, number: int, real: Any = passes.Spiller.spill) -> None:
        spilled.append(number)
        real(self, part, number)

    monkeypatch.setattr(passes.Spiller, "spill", spill)
    return spilled


def test_too_many_shards(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is tokenized again for it."""
    spilled = counting(monkeypatch)
    monkeypatch.setattr(shard, "MAX_SHARDS", 1)
    assert refusal(texts, tmp_path / "out").endswith("raise --chunks-per-shard")
    first = len(spilled)
    build(texts, tmp_path / "out", "--chunks-per-shard", 256)
    assert first == len(spilled) > 0
    monkeypatch.undo()
    build(texts, tmp_path / "whole", "--chunks-per-shard", 256)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


@pytest.mark.parametrize("free", ["--valid-fraction=0", "--chunk-length=32"])
def test_what_is_packed_stays_as_it_is(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: str
) -> None:
    """An output is free to be packed in another way only until its first split is in place."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write", lambda *_: (_ for _ in ()).throw(OSError("no power")))
        refusal(texts, out)
    assert (out / "train").exists() and not (out / "train" / "manifest.json").exists()
    line = refusal(texts, out, free)
    assert "choose another --out" in line
    build(texts, out)
    assert refusal(texts, out, free) == line


def test_a_single_document(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.jsonl", TEXTS[:1]).parent
    out = tmp_path / "out"
    line = refusal(source, out)
    assert "give it more and another --out, or set --valid-fraction 0" in line
    build(source, out, "--valid-fraction", 0)
    assert Manifest.load(out / "train").documents == 1
    write(source / "b.jsonl", TEXTS[1:3])
    build(source, tmp_path / "another")


def test_a_tokenizer_of_another_size(
    texts: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    line = refusal(texts, out, "--tokenizer", tokenizer)
    assert line.endswith("omit --vocab-size, or name another --tokenizer")
    helpers.build(texts, out, "--tokenizer", tokenizer)  # without --vocab-size
    build(texts, tmp_path / "trained")
    build(texts, tmp_path / "other", "--tokenizer", tmp_path / "trained" / "tokenizer.json")
    with monkeypatch.context() as patched:
        patched.setattr(data_prep.tokenizer, "LARGEST_VOCABULARY", 350)
        with pytest.raises(UserError, match="at most: name another --tokenizer"):
            check_vocabulary(Tokenizer.load(tokenizer), None)
        check_vocabulary(Tokenizer.load(tmp_path / "trained" / "tokenizer.json"), None)


def test_a_tokenizer_that_makes_special_ids_of_text(
    texts: Path, tmp_path: Path, tokenizer: Path
) -> None:
    spec = json.loads(tokenizer.read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "bad.json").write_text(json.dumps(spec))
    line = refusal(texts, tmp_path / "out", "--tokenizer", tmp_path / "bad.json")
    assert line.endswith("train another")
    build(texts, tmp_path / "out")


class BrokenPool:
    """A pool whose processes have died."""

    def __init__(self, *_: object) -> None:
        """There is nothing to start."""

    def submit(self, *_: object) -> "Future[None]":
        future: Future[None] = Future()
        future.set_exception(BrokenProcessPool())
        return future

    def shutdown(self, **_: object) -> None:
        """There is nothing to end."""


def test_a_worker_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SMALLEST_PART", 100)
    for number in range(4):
        write(tmp_path / "in" / f"{number}.jsonl", TEXTS[number::4])
    words = [tmp_path / "in", tmp_path / "out"]
    monkeypatch.setattr(passes, "ProcessPoolExecutor", BrokenPool)
    line = refusal(*words, "--workers", 2)
    assert "run the same command again with fewer --workers, and it continues" in line
    build(*words, "--workers", 1)


# Sources.


@pytest.fixture
def little_library(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library is large, and stands for itself in test_sources.py."""
    library = tmp_path / "library"
    library.mkdir()
    for number, text in enumerate(TEXTS):
        (library / f"m{number}.py").write_text(text)
    monkeypatch.setattr("data_prep.files.sysconfig.get_path", lambda _: str(library))


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
            patched.setattr("data_prep.files.sysconfig.get_path", lambda _: str(place))
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
    """A file of the same size is one that was restored: then the work goes on."""
    monkeypatch.setattr(files, "_SMALLEST_PART", 100)
    path = write(texts / "b.jsonl", TEXTS[:3])
    good = path.read_bytes()
    path.write_bytes(good[:-3] + b"}}\n" if remedy == "restore" else good[:-3])
    out = tmp_path / "out"
    words = [texts, out, "--tokenizer", tokenizer, "--vocab-size", 400]
    with pytest.raises(UserError, match=r"; repair or remove it$"):
        build(*words)
    if remedy == "restore":
        path.write_bytes(good)
        spilled = counting(monkeypatch)
        build(*words)
        assert spilled == [1]
        return
    if remedy == "repair":
        path.write_bytes(good)
    else:
        path.unlink()
    is_followed(refusal(*words), *words)


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
    table = pa.table({"text": TEXTS, "id": TEXTS, "url": TEXTS})
    pq.write_table(table, tmp_path / "hub.parquet")

    def unreachable(revision: str | None) -> str:
        raise ConnectionError("no route to host")

    def stream(*_: object) -> Any:
        import datasets

        files = [str(tmp_path / "hub.parquet")]
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)

    def run(out: Path, *source: object) -> None:
        words = ["--out", out, "--vocab-size", 300, "--workers", 1, "--valid-fraction", 0.2]
        shard.main([str(word) for word in (*words, *source)])
        Manifest.load(out / "train")

    monkeypatch.setattr(hub, "_stream", stream)
    with monkeypatch.context() as patched:
        patched.setattr(hub, "_check_reachable", unreachable)
        with pytest.raises(UserError, match=r"no route .*network, or .*--source stdlib`") as error:
            run(tmp_path / "hub")
        library = tmp_path / "library"
        library.mkdir()
        for number, text in enumerate(TEXTS):
            (library / f"m{number}.py").write_text(text)
        patched.setattr("data_prep.files.sysconfig.get_path", lambda _: str(library))
        words = re.findall(r"`(.*?)`", str(error.value))
        run(tmp_path / "stdlib", *shlex.split(words[0]))
        run(tmp_path / "own", "--source", texts)
    monkeypatch.setattr(hub, "_check_reachable", lambda revision: revision or "newest")
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


# Data as training finds it.


@pytest.mark.parametrize("name", ["plain", "with a blank", "~home"])
def test_data_that_are_not_there(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The command is typed as it stands, and --source with it, as the hub is far away."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        Manifest.load(Path(name) / "train")
    (command,) = re.findall(r"`(.*?)`", str(error.value))
    python, program, *words = shlex.split(command)
    assert (python, program) == ("python", "data_prep/shard.py")
    small = ["--vocab-size", "300", "--workers", "1", "--valid-fraction", "0.2"]
    shard.main([*words, "--source", str(texts), *small])
    Corpus.open(Path(name), ModelSettings())


def every_shard(out: Path) -> None:
    for split in ("train", "valid"):
        manifest = Manifest.load(out / split)
        check_shards(out / split, manifest)
        for number in range(len(manifest.shards)):
            read_shard(out / split, manifest, number)
    Corpus.open(out, ModelSettings(chunk_length=64))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_damaged_data_are_restored_or_made_again(
    texts: Path, tmp_path: Path, damage: Callable[[Path], None], split: str
) -> None:
    """Where the line says `delete FOLDER first`, because shard.py would take it for complete."""
    out = tmp_path / "out"
    build(texts, out)
    path = out / split / "shard-000000.tar"
    kept = path.read_bytes()
    damage(path)
    with pytest.raises(UserError, match=r"restore it.* make the data again") as error:
        every_shard(out)
    path.write_bytes(kept)
    every_shard(out)
    damage(path)
    if first := re.search(r"\(delete (.*) first\)", str(error.value)):
        shutil.rmtree(first[1])
        build(texts, out)
    else:
        assert refusal(texts, out).endswith(f": delete {out} and make it again")
        shutil.rmtree(out)
        build(texts, out)
    every_shard(out)


def test_a_tokenizer_of_other_data(texts: Path, tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    build(texts, out)
    shutil.copy(tokenizer, out / "tokenizer.json")
    with pytest.raises(UserError, match=r"make the data again \(delete .* first\)") as error:
        every_shard(out)
    shutil.rmtree(re.findall(r"\(delete (.*) first\)", str(error.value))[0])
    build(texts, out)
    every_shard(out)


def test_shards_of_another_make(texts: Path, tmp_path: Path) -> None:
    build(texts, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    manifest = Manifest.load(folder)
    smaller = manifest.model_copy(update={"vocab_size": 20})
    with pytest.raises(UserError, match=r"make the data with data_prep/shard\.py"):
        read_shard(folder, smaller, 0)
    build(texts, tmp_path / "again")
    every_shard(tmp_path / "again")
