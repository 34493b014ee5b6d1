"""What messages about the output folder and the options say can be done, and helps.

Each test does it to the letter.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import data_prep.tokenizer
from data_prep import second_pass, workers
from data_prep.output import Output
from data_prep.reading import files
from data_prep.tokenizer import check_vocabulary
from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.manifest import MAX_MANIFEST_BYTES, Manifest
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from tests.data_prep import corpus as helpers
from tests.data_prep.advice import TEXTS, build, counting, is_followed, refusal, write
from tests.data_prep.corpus import tree_digest

# The output folder.


def test_an_output_of_another_kind(texts: Path, tmp_path: Path) -> None:
    build(texts, tmp_path / "out")
    line = refusal(texts, tmp_path / "out", "--seed", 1)
    assert "was made with seed 0, not 1" in line
    is_followed(line, texts, tmp_path / "out", "--seed", 1)


def test_a_full_disk(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`free some, and run the same command again: it continues`."""
    out, spilled = tmp_path / "out", counting(monkeypatch)

    def write_bytes(path: Path, data: bytes, real: Any = Path.write_bytes) -> int:
        if path.suffix == ".tar":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return int(real(path, data))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", write_bytes)
        line = refusal(texts, out)
    assert "No space left on device; free some" in line and "shard-000000.tar" in line
    parts = len(spilled)
    build(texts, out)
    assert len(spilled) == parts, "nothing is tokenized again"


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


def test_too_many_shards(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is tokenized again for it."""
    spilled = counting(monkeypatch)
    monkeypatch.setattr(second_pass, "MAX_SHARDS", 1)
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
    monkeypatch.setattr(workers, "ProcessPoolExecutor", BrokenPool)
    line = refusal(*words, "--workers", 2)
    assert "run the same command again with fewer --workers, and it continues" in line
    build(*words, "--workers", 1)
