"""A source that holds something else is refused, one that was touched or copied is not."""

import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import beginning, evidence, shuffle
from data_prep.output import Output
from data_prep.reading import files
from data_prep.reading.files import file_source
from i3dist.errors import UserError
from tests.data_prep import corpus
from tests.data_prep.corpus import tree_digest

REFUSED = "from other content of the same source: choose another --out"
Edit = Callable[[Path], object]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of every kind, most of which make parts of their own."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = random.Random(0)
    for number in range(4):
        rows = [f'{{"text": "{rng.randbytes(90).hex()}"}}\n' for _ in range(30)]
        (folder / f"{number}.jsonl").write_text("".join(rows))
    rows = [{"text": rng.randbytes(90).hex(), "n": n} for n in range(120)]
    table = pa.Table.from_pylist(rows)
    plain = {"use_dictionary": False, "compression": "none"}
    pq.write_table(table, folder / "4.parquet", row_group_size=30, **plain)
    (folder / "5.txt.gz").write_bytes(gzip.compress(rng.randbytes(5000).hex().encode()))
    return folder


def build(source: Path, out: Path, *options: object) -> None:
    """As `corpus.build`, with fewer shards."""
    corpus.build(source, out, "--chunks-per-shard", 256, *options)


def texts_of(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree_digest(out).items() if name != "source.json"}


def change(path: Path, at: float = 0.5) -> None:
    """Write another letter, of a text if there is any; size and time of change stay as they are."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    place = int(at * (len(data) - 1))
    if text := re.search(rb"[0-9a-f]{50}", data[place:]):
        place += text.start()
    data[place] = ord("0") if data[place] == ord("1") else ord("1")
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite(path: Path) -> None:
    change(path)
    os.utime(path)


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1, 1))


def copy(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "copy")
    shutil.rmtree(folder)
    (folder.parent / "copy").rename(folder)


@pytest.mark.parametrize("name", ["0.jsonl", "4.parquet", "5.txt.gz"])
@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_a_change_anywhere_is_noticed(
    source: Path, built: Path, tmp_path: Path, name: str, at: float
) -> None:
    given = ["--tokenizer", built / "tokenizer.json"]
    build(source, tmp_path / "out", *given)
    whole = tree_digest(tmp_path / "out")
    change(source / name, at)
    with pytest.raises(UserError, match=rf"before .*{name} changed, {REFUSED}"):
        build(source, tmp_path / "out", *given)
    assert tree_digest(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: (folder / "0.jsonl").unlink(),
        lambda folder: (folder / "0.jsonl").rename(folder / "00.jsonl"),
        lambda folder: (folder / "6.txt").write_text("more"),
        lambda folder: (folder / "0.jsonl").open("ab").write(b"\n"),
    ],
)
def test_other_names_or_sizes_are_refused(
    source: Path, built: Path, tmp_path: Path, edit: Edit
) -> None:
    given = ["--tokenizer", built / "tokenizer.json"]
    build(source, tmp_path / "out", *given)
    edit(source)
    with pytest.raises(UserError, match=REFUSED):
        build(source, tmp_path / "out", *given)


@pytest.mark.parametrize("edit", [touch, copy])
def test_a_touched_or_copied_source_is_the_same(
    source: Path, tmp_path: Path, edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    build(source, tmp_path / "out")
    edit(source)
    build(source, tmp_path / "out")
    assert capsys.readouterr().out.endswith("is already complete\n")
    build(source, tmp_path / "again")
    assert texts_of(tmp_path / "again") == texts_of(tmp_path / "out")


def test_a_source_is_read_once_and_hashed_again_only_where_times_differ(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def between(file, start: int, stop: int, real=evidence.sha256_between) -> str:  # type: ignore[no-untyped-def]
        hashed.append(Path(file.name).name)
        return real(file, start, stop)

    monkeypatch.setattr(evidence, "sha256_between", between)
    monkeypatch.setattr(files, "_content_digest", lambda path: pytest.fail("read beforehand"))
    for _ in range(2):
        build(source, tmp_path / "out")
    assert hashed == []
    os.utime(source / "4.parquet")
    build(source, tmp_path / "out")
    assert hashed == ["4.parquet"] * 4


def interrupt(source: Path, out: Path, after: int, *options: object) -> None:
    """Have a run end when it has read so many parts."""
    calls = iter(range(after))

    def spill(*arguments: object, real=shuffle.Spiller.spill) -> object:  # type: ignore[no-untyped-def]
        if next(calls, None) is None:
            raise InterruptedError("the power is gone")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shuffle.Spiller, "spill", spill)
        with pytest.raises(UserError, match="power"):
            build(source, out, *options)


@pytest.mark.parametrize("edit", [touch, copy])
@pytest.mark.parametrize("trained", [True, False])
def test_a_stopped_run_goes_on_with_a_touched_source(
    source: Path, built: Path, tmp_path: Path, edit: Edit, trained: bool
) -> None:
    options = [] if trained else ["--tokenizer", built / "tokenizer.json"]
    build(source, tmp_path / "whole", *options)
    for after in (1, 5, 8):
        out = tmp_path / f"out-{after}"
        interrupt(source, out, after, *options)
        edit(source)
        build(source, out, *options)
        assert texts_of(out) == texts_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["0.jsonl", "3.jsonl", "4.parquet"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_stopped_run_never_mixes_two_versions(
    source: Path, built: Path, tmp_path: Path, name: str, trained: bool
) -> None:
    """It is refused, or what comes out is what comes of the later version alone."""
    options = [] if trained else ["--tokenizer", built / "tokenizer.json"]
    kept = (source / name).read_bytes()
    went_on = 0
    for after in (0, 2, 5, 8):
        out = tmp_path / f"out-{after}"
        interrupt(source, out, after, *options)
        change(source / name, 0.6)
        try:
            build(source, out, *options)
        except UserError as error:
            assert REFUSED in str(error)
        else:
            went_on += 1
            build(source, tmp_path / f"whole-{after}", *options)
            assert texts_of(out) == texts_of(tmp_path / f"whole-{after}")
        (source / name).write_bytes(kept)
    expected = {"0.jsonl": 1, "3.jsonl": 2, "4.parquet": 3}[
        name
    ]  # where it was not read as a whole
    assert went_on <= expected if trained else went_on == expected


def random_table(rows: int) -> pa.Table:
    rng = random.Random(rows)
    return pa.table({"text": [rng.randbytes(90).hex() for _ in range(rows)]})


def test_a_file_read_in_part_is_read_again_as_a_whole(tmp_path: Path, built: Path) -> None:
    """What was hashed with a row group is not quite what holds it."""
    folder = tmp_path / "in"
    folder.mkdir()
    with pq.ParquetWriter(
        folder / "0.parquet", random_table(1).schema, use_dictionary=False, compression="none"
    ) as writer:
        for rows in (120, 60, 61, 62):
            writer.write_table(random_table(rows))
    options = ["--tokenizer", built / "tokenizer.json"]
    interrupt(folder, tmp_path / "out", 1, *options)
    change(folder / "0.parquet", 0.3)
    build(folder, tmp_path / "out", *options)
    build(folder, tmp_path / "whole", *options)
    assert texts_of(tmp_path / "out") == texts_of(tmp_path / "whole")


def test_parts_that_are_cut_in_another_way_are_read_again(tmp_path: Path, built: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        pq.write_table(random_table(60 + number), folder / f"{number}.parquet", row_group_size=21)
    options = ["--tokenizer", built / "tokenizer.json"]
    interrupt(folder, tmp_path / "out", 5, *options)
    for number in range(3):  # as if other workers had not finished the first file
        (tmp_path / "out" / ".work" / "runs" / f"part-{number:06d}.json").unlink()
    path = folder / "0.parquet"
    size = path.stat().st_size
    pq.write_table(random_table(60), path, row_group_size=30)
    for fill in range(size - path.stat().st_size - 99, 999):
        with pq.ParquetWriter(path, random_table(60).schema) as writer:
            writer.write_table(random_table(60), row_group_size=30)
            writer.add_key_value_metadata({"": "x" * fill})
        if path.stat().st_size >= size:
            break
    assert path.stat().st_size == size
    build(folder, tmp_path / "out", *options)
    build(folder, tmp_path / "whole", *options)
    assert texts_of(tmp_path / "out") == texts_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["0.jsonl", "4.parquet"])
@pytest.mark.parametrize("edit", [rewrite, os.utime])
def test_a_file_that_changes_while_it_is_read_is_told(
    source: Path, tmp_path: Path, name: str, edit: Edit
) -> None:
    for place in (0, 1):  # before the first document, and after it
        records = file_source(source)
        part = next(p for p in records.parts() if records.files[min(p.files)][1] == name)
        reading = part.records()
        for _ in range(place):
            next(reading)
        edit(source / name)
        with pytest.raises(UserError, match=rf"{name} changed while it was read: run the same"):
            list(reading)
    quiet = file_source(source).parts()[0].records()
    next(quiet)
    (source / "0.jsonl").chmod(0o600)
    assert len(list(quiet)) == 29


def test_what_older_versions_made_is_still_complete_and_goes_on(
    source: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They kept a digest of what the files hold, and no source.json."""
    out = tmp_path / "out"
    options = ["--tokenizer", built / "tokenizer.json"]
    build(source, out, *options)
    whole = tree_digest(out)
    settings = Output(out).settings()
    assert settings is not None
    old = settings.model_copy(update={"revision": file_source(source).revision})
    (out / "shard.json").write_text(old.model_dump_json(indent=1))
    (out / "source.json").unlink()
    before = tree_digest(out)
    build(source, out, *options)
    assert capsys.readouterr().out.endswith("is already complete\n")
    (out / "train" / "manifest.json").unlink()
    build(source, out, *options)
    assert tree_digest(out) == before and whole.items() >= before.items() - {
        ("shard.json", before["shard.json"])
    }
    change(source / "0.jsonl")
    with pytest.raises(UserError, match=REFUSED):
        build(source, out, *options)


def test_a_tokenizer_of_an_older_version_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was trained on the first texts, up to 200 MB, and settings did not say so."""
    out = tmp_path / "out"
    interrupt(source, out, 5)
    settings = json.loads((out / "shard.json").read_text())
    assert (settings["tokenizer_sample_mb"], settings.pop("tokenizer_sample")) == (64, "even")
    (out / "shard.json").write_text(json.dumps(settings | {"tokenizer_sample_mb": 200}))
    touch(source)  # so the tokenizer is trained again, to compare
    sample = MagicMock(wraps=beginning.sample_texts)
    monkeypatch.setattr(beginning, "sample_texts", sample)
    build(source, out)
    assert (sample.call_args.args[2], sample.call_args.kwargs["evenly"]) == (200, False)
    build(source, tmp_path / "whole")
    assert tree_digest(out / "train") == tree_digest(tmp_path / "whole" / "train")


def test_an_output_that_does_not_say_what_was_read_is_refused(
    source: Path, built: Path, tmp_path: Path
) -> None:
    options = ["--tokenizer", built / "tokenizer.json"]
    build(source, tmp_path / "out", *options)
    (tmp_path / "out" / "source.json").write_text("{")
    with pytest.raises(UserError, match=r"source\.json is damaged: choose another --out"):
        build(source, tmp_path / "out", *options)
    (tmp_path / "out" / "source.json").unlink()
    with pytest.raises(UserError, match=r"source\.json is missing.*delete it and make it again"):
        build(source, tmp_path / "out", *options)


def test_a_damaged_summary_is_made_again(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "whole")
    interrupt(source, tmp_path / "out", 5)
    for number, data in enumerate((b"", b"{")):
        (tmp_path / "out" / ".work" / "runs" / f"part-{number:06d}.json").write_bytes(data)
    build(source, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_the_same_command_goes_on_when_nothing_writes_any_more(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spill(*arguments: object, real=shuffle.Spiller.spill) -> object:  # type: ignore[no-untyped-def]
        rewrite(source / "3.jsonl")  # after the tokenizer was trained on it
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(shuffle.Spiller, "spill", spill)
        with pytest.raises(UserError, match=r"3\.jsonl changed .*: run the same command again"):
            build(source, tmp_path / "out")
    build(source, tmp_path / "out")
    build(source, tmp_path / "whole")
    assert texts_of(tmp_path / "out") == texts_of(tmp_path / "whole")
