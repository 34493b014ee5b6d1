"""The tool as a whole: the same bytes from any number of workers, and after any interruption."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from data_prep.output import Output
from data_prep.reading import files
from i3dist.data.manifest import Manifest
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.files import PARTIAL
from tests.data_prep.corpus import (
    SKIPPED,
    arguments,
    build,
    read_chunks,
    read_documents,
    tree_digest,
)

ROOT = Path(__file__).parent.parent.parent
Corpus = tuple[Path, dict[str, str]]


def test_every_document_comes_back_once_from_index_and_shards(corpus: Corpus, built: Path) -> None:
    tokenizer = Tokenizer.load(built / "tokenizer.json")
    splits = {name: read_documents(built / name, tokenizer) for name in ("train", "valid")}
    found = [(name, text) for documents in splits.values() for name, _, text in documents]
    assert len(found) == len(corpus[1])
    assert dict(found) == corpus[1]
    texts = [{text for _, _, text in documents} for documents in splits.values()]
    assert not texts[0] & texts[1]
    assert any(n > 1 for n in Counter(text for _, text in found).values()), "no duplicates"
    urls = {name: url for documents in splits.values() for name, url, _ in documents}
    assert urls["doc-7"] == "https://example.org/doc-7" and urls["odd.jsonl#5"] == "odd.jsonl#5"


def test_manifests_agree_with_the_files(built: Path) -> None:
    digests = tree_digest(built)
    for split in ("train", "valid"):
        manifest = Manifest.load(built / split)
        assert manifest.split == split
        assert manifest.tokenizer_sha256 == digests["tokenizer.json"]
        assert {s.name: s.sha256 for s in manifest.shards} == {
            Path(name).name: digest
            for name, digest in digests.items()
            if name.startswith(f"{split}/shard-")
        }
        assert all((built / split / s.name).stat().st_size == s.size for s in manifest.shards)
        index = pq.read_table(built / split / "index.parquet")
        assert sum(index["length"].to_pylist()) == manifest.tokens
        assert len(set(index["document"].to_pylist())) == manifest.documents
        assert len(manifest.shards) > 1
        last = read_chunks(built / split / manifest.shards[-1].name)[-1]
        assert (last == manifest.pad_id).sum() == -manifest.tokens % manifest.chunk_length


def test_webdataset_reads_the_shards(built: Path) -> None:
    manifest = Manifest.load(built / "train")
    paths = [str(built / "train" / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(samples) == manifest.chunks
    stream = np.concatenate([np.frombuffer(sample["u16"], "<u2") for sample in samples])
    expected = np.concatenate([read_chunks(Path(path)) for path in paths])
    assert np.array_equal(stream, expected.reshape(-1))
    assert [sample["__key__"] for sample in samples[3:6]] == [
        "000000-000003",
        "000001-000000",
        "000001-000001",
    ]


def test_workers_and_parts_change_no_byte(corpus: Corpus, built: Path, tmp_path: Path) -> None:
    parts = files.file_source(str(corpus[0])).parts()
    assert len(parts) > 4
    build(corpus[0], tmp_path / "out", "--workers", 3)
    assert tree_digest(tmp_path / "out") == tree_digest(built)


def test_a_moved_source_gives_the_same_bytes(corpus: Corpus, built: Path, tmp_path: Path) -> None:
    moved = tmp_path / "else" / corpus[0].name
    moved.parent.mkdir()
    moved.symlink_to(corpus[0])
    build(f"{moved}/", tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(built)


@pytest.mark.parametrize("option", ["--seed=1", "--valid-fraction=0.3", "--chunk-length=32"])
def test_every_setting_shows_and_another_output_is_refused(
    corpus: Corpus, built: Path, tmp_path: Path, option: str
) -> None:
    build(corpus[0], tmp_path / "out", option)
    assert tree_digest(tmp_path / "out") != tree_digest(built)
    before = tree_digest(built)
    name, value = option.removeprefix("--").split("=")
    with pytest.raises(UserError, match=rf"{name} .*, not {value}: choose another --out"):
        build(corpus[0], built, option)
    assert tree_digest(built) == before


def test_a_second_run_does_nothing(
    corpus: Corpus, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    build(corpus[0], built, "--workers", 2)
    assert capsys.readouterr().out == f"{built} is already complete\n"
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


# Each of these ends the process by SIGKILL at a chosen place.
KILLS = {
    "in pass 1": ("shuffle.Spiller", "spill", 4),
    "in pass 2": ("pack", "shard_bytes", 5),
    "between the manifests": ("output.Manifest", "write", 2),
}


@pytest.mark.parametrize("place", KILLS)
def test_a_run_killed_anywhere_continues_to_the_same_bytes(
    corpus: Corpus, built: Path, tmp_path: Path, place: str
) -> None:
    target, attribute, call = KILLS[place]
    code = f"""
import os, sys
import data_prep.shard, data_prep.reading.files
from data_prep import output, pack, shuffle
data_prep.reading.files._SMALLEST_PART = 4000
calls = 0
def deadly(*args, then={target}.{attribute}):
    global calls
    calls += 1
    return os.kill(os.getpid(), 9) if calls == {call} else then(*args)
{target}.{attribute} = deadly
data_prep.shard.main(sys.argv[1:])
"""
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, *arguments(corpus[0], out)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert (out / ".work").exists() and not (out / "train" / "manifest.json").exists()
    finished = len(list(out.glob(".work/runs/part-*.json")))
    assert finished == 3 if place == "in pass 1" else finished > 4
    build(corpus[0], out, "--workers", 2)
    assert tree_digest(out) == tree_digest(built)


def test_no_validation_split_on_request(corpus: Corpus, tmp_path: Path) -> None:
    build(corpus[0], tmp_path / "out", "--valid-fraction", 0)
    assert not (tmp_path / "out" / "valid").exists()
    assert Manifest.load(tmp_path / "out" / "train").documents == len(corpus[1])


def test_a_tiny_fraction_still_gives_a_validation_document(
    corpus: Corpus, built: Path, tmp_path: Path
) -> None:
    tokenizer = built / "tokenizer.json"
    build(corpus[0], tmp_path / "out", "--valid-fraction", 1e-9, "--tokenizer", tokenizer)
    assert Manifest.load(tmp_path / "out" / "valid").documents >= 1
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_skipped_documents_are_counted_by_reason(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(corpus[0], tmp_path / "out")
    words = " ".join(capsys.readouterr().out.split())
    for reason, count in SKIPPED.items():
        assert f"{count} {reason}" in words


def test_one_line_and_no_traceback_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data_prep" / "shard.py"), "--out", str(tmp_path / "o")]
    # Nothing listens on port 9: the hub is out of reach.
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--source" in done.stderr and "hub" in done.stderr
    assert not (tmp_path / "o").exists()


def test_help_names_every_option() -> None:
    command = [sys.executable, str(ROOT / "data_prep" / "shard.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for option in ("source", "out", "tokenizer", "vocab-size", "workers", "chunks-per-shard"):
        assert f"--{option} " in text


def test_what_a_killed_run_left_before_its_settings_is_no_obstacle(
    corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f".shard.json.1{PARTIAL}").write_text("{")
    build(corpus[0], out)
    assert not list(out.glob(f".*{PARTIAL}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "'0' is not a whole number from 1"),
        (["--workers", "two"], "'two' is not a whole number"),
        (["--vocab-size", "268"], "from 269 to 16,777,216"),
        (["--vocab-size", "16777217"], "from 269 to 16,777,216"),
        (["--chunks-per-shard", "0"], "--chunks-per-shard"),
        (["--chunk-length", "1"], "--chunk-length"),
        (["--valid-fraction", "1"], "--valid-fraction"),
        (["--valid-fraction", "nan"], "--valid-fraction"),
        (["--valid-fraction", "-0.1"], "--valid-fraction"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(1 << 63)], "--seed"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--source", "no/such/file"], "no file or folder no/such/file"),
        (["--source", "{tmp}/*.parquet"], r"nothing in .*\*\.parquet ends in"),
        (["--source", "{tmp}"], "ends in .parquet"),
        (["--source", "{tmp}/notes.md"], "cannot tell what"),
        (["--tokenizer", "{tmp}/none.json"], "cannot read the tokenizer .*none.json: No such"),
        (["--tokenizer", "{tmp}/notes.md"], "not a tokenizer.json"),
        (["--tokenizer", "{built}/tokenizer.json", "--vocab-size", "999"], "vocabulary of 400"),
        (["--out", "{tmp}/notes.md"], "cannot write to --out .*notes.md"),
        (["--out", "{tmp}"], "holds other files: choose another --out"),
        (["--out", "/dev/null/x"], "cannot write to --out /dev/null/x"),
    ],
)
def test_bad_input_gets_one_clear_line(
    corpus: Corpus, built: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "notes.md").write_text("no data")
    words = [option.format(tmp=tmp_path, built=built) for option in options]
    with pytest.raises(UserError, match=message) as caught:
        build(corpus[0], tmp_path / "out", *words)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.md"]


def test_changed_content_of_the_source_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    build(tmp_path, tmp_path / "out")
    (tmp_path / "a.txt").write_text("eno")
    with pytest.raises(UserError, match="other content of the same source: choose another --out"):
        build(tmp_path, tmp_path / "out")


def test_a_damaged_output_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    build(corpus[0], tmp_path / "out")
    shard = tmp_path / "out" / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"shard-000001\.tar is \d+ bytes long"):
        build(corpus[0], tmp_path / "out")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing: delete"):
        build(corpus[0], tmp_path / "out")
    (tmp_path / "out" / "shard.json").write_text(json.dumps({"seed": 0}))
    with pytest.raises(UserError, match=r"shard\.json is damaged"):
        build(corpus[0], tmp_path / "out")


@pytest.mark.parametrize("out", ["link", "link/deep/out", "again/out"])
def test_an_output_behind_a_link_to_nothing_is_made_where_it_leads(
    tmp_path: Path, built: Path, out: str
) -> None:
    (tmp_path / "link").symlink_to("else/where")
    (tmp_path / "again").symlink_to(tmp_path / "link")
    (tmp_path / "a.txt").write_text("some words")
    options = ["--tokenizer", built / "tokenizer.json", "--valid-fraction", 0]
    with Output(tmp_path / out).locked():
        assert (tmp_path / out).is_dir()
    assert not (tmp_path / out).exists()
    build(tmp_path / "a.txt", tmp_path / out, *options)
    place = (tmp_path / out).resolve()
    assert place.is_relative_to(tmp_path / "else" / "where")
    assert (place / "train" / "manifest.json").is_file()


def test_two_runs_do_not_write_into_one_folder(corpus: Corpus, tmp_path: Path) -> None:
    with (
        Output(tmp_path / "out").locked(),
        pytest.raises(UserError, match="another run is writing"),
    ):
        build(corpus[0], tmp_path / "out")


def test_too_many_shards_name_the_setting(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.second_pass.MAX_SHARDS", 3)
    with pytest.raises(UserError, match="raise --chunks-per-shard"):
        build(corpus[0], tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_no_usable_document_is_an_error(tmp_path: Path, built: Path, workers: int) -> None:
    (tmp_path / "a.txt").write_text("  ")
    (tmp_path / "b.jsonl").write_text('{"text": null}\n')
    given = ["--tokenizer", built / "tokenizer.json"]
    for options in ([], given):
        with pytest.raises(UserError, match=r"no usable document \(it holds 1 empty, 1 null\)"):
            build(tmp_path, tmp_path / f"out-{len(options)}", "--workers", workers, *options)
    assert not (tmp_path / "out-0").exists(), "a failure before any work leaves nothing"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_disk_without_locks_is_one_line(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=r"without locks .*: choose an --out on a local disk"):
        build(corpus[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_fits_a_terminal() -> None:
    command = [sys.executable, str(ROOT / "data_prep" / "shard.py"), "--help"]
    env = os.environ | {"COLUMNS": "80"}
    text = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert max(map(len, text.splitlines())) <= 80
