"""What a folder or a glob stands for: what `find -L` and `glob` say, but for hidden files."""

import glob
import itertools
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.reading.files import FileSource, file_source
from data_prep.shard import main, parse
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError
from tests.data_prep.corpus import arguments, build, text_of

LATIN = os.fsdecode(b"caf\xe9")
OTHER_LATIN = os.fsdecode(b"caf\xe8")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"text": "{len(name)} words in it"}}\n')


def names(source: FileSource) -> list[str]:
    return [name for _, name in source.files]


def test_what_programs_hide_in_a_folder_is_left_out_and_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "_b.jsonl", "d=1/_c=2/c.jsonl", "__init__.txt")
    put(tmp_path, ".ipynb_checkpoints/a-checkpoint.jsonl", "d=1/.cache/x.txt", "._a.jsonl")
    put(tmp_path, "~$a.txt", "_temporary/0/a.jsonl", "__MACOSX/._a.jsonl")
    put(tmp_path, "a.jsonl.crc", ".~lock.a.jsonl#", "_SUCCESS", "a.jsonl.incomplete", "b.md")
    source = file_source(tmp_path)
    assert names(source) == ["__init__.txt", "_b.jsonl", "a.jsonl", "d=1/_c=2/c.jsonl"]
    for part in ("hidden files (2)", "hidden folders (2)", "names begin with _ (2)"):
        assert part in source.left_out
    assert ".crc" in source.left_out and ".md" in source.left_out and "(4)" in source.left_out


@pytest.mark.parametrize(
    "spec",
    [".hidden/.a.jsonl", ".hidden/.*", ".hidden", ".hidden/_x/*", "*/.a.jsonl", ".h*/**/*.jsonl"],
)
def test_what_is_hidden_is_read_where_it_is_named(tmp_path: Path, spec: str) -> None:
    put(tmp_path, ".hidden/.a.jsonl", ".hidden/b.jsonl", ".hidden/_x/c.jsonl", "seen/.a.jsonl")
    found = names(file_source(tmp_path / spec))
    assert found and "seen/b.jsonl" not in found


def test_left_out_files_are_told_at_the_end(
    tmp_path: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "in/a.jsonl", "in/b.txt", "in/.c/d.jsonl", "in/e.md")
    build(tmp_path / "in", tmp_path / "out", "--tokenizer", built / "tokenizer.json")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "left out: hidden folders (1), files that end in .md (1)"


FOLDERS = ["a", "b", ".h", "_u", "x[1]"]
FILES = ["c.txt", ".d.txt", "E.TXT", "f", "g.md"]
patterns = st.sampled_from(["a", "*", "**", ".*", "?", "[ab]", "*.txt", "*.[tT]*", "x[[]1]", ".h"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three levels of folders with files of every name."""
    root = tmp_path_factory.mktemp("tree")
    for names in itertools.product(["", *FOLDERS], repeat=2):
        put(root.joinpath(*filter(None, names)), *FILES)
    return root


@settings(deadline=None, max_examples=100)
@given(st.lists(patterns, min_size=1, max_size=4).filter(lambda p: glob.has_magic("/".join(p))))
def test_a_glob_finds_what_python_finds(tree: Path, pattern: list[str]) -> None:
    found = glob.glob(str(tree.joinpath(*pattern)), recursive=True)
    expected = {Path(path) for path in found if path.lower().endswith(".txt")}
    try:
        seen = {path for path, _ in file_source(tree.joinpath(*pattern)).files}
    except UserError as error:
        assert "nothing in" in str(error)
        seen = set()
    assert seen == expected


def test_a_name_is_literal_before_it_is_a_pattern(tmp_path: Path) -> None:
    put(tmp_path, "d[1]/a #1%?.jsonl", "d1/a.jsonl", "0 1/00.TXT")
    assert names(file_source(tmp_path / "d[1]" / "a #1%?.jsonl")) == ["a #1%?.jsonl"]
    assert names(file_source(tmp_path / "d[1]" / "*.jsonl")) == ["a #1%?.jsonl"]
    assert names(file_source(tmp_path / "0 1" / "00.TXT")) == ["00.TXT"]
    assert names(file_source(tmp_path / "0 1")) == ["00.TXT"]


def test_the_command_line_takes_a_home_and_no_empty_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse(["--source", "~/a b"]).source == [(Path("/home/someone/a b"), 1.0)]
    assert parse(["--source", "./stdlib"]).source != parse(["--source", "stdlib"]).source
    for option in ("--source", "--out", "--tokenizer"):
        with pytest.raises(UserError, match="path is empty"):
            parse([option, ""])


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path, "in/a.jsonl", "else/b.jsonl", "else/deep/c.jsonl")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "in" / "again.jsonl").symlink_to("a.jsonl")
    for name in ("up", "upper"):  # each way through both is another path: 2^40 of them
        (tmp_path / "else" / "deep" / name).symlink_to("..")
        (tmp_path / "in" / name).symlink_to("..")
    expected = ["a.jsonl", "again.jsonl", "linked/b.jsonl", "linked/deep/c.jsonl"]
    found = names(file_source(tmp_path / "in"))
    assert [name for name in found if "up" not in name] == expected
    assert len(found) < 20 and "up/else/b.jsonl" in found and "up/in/a.jsonl" not in found
    assert names(file_source(tmp_path / "in" / "**" / "*.jsonl")) == found


def test_a_link_to_nothing_is_one_line(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    (tmp_path / ".#a.jsonl").symlink_to("user@host.123")  # how Emacs locks a file
    (tmp_path / "newest").symlink_to("gone")
    for target in ("gone.jsonl", "b.jsonl"):
        (tmp_path / "b.jsonl").unlink()
        (tmp_path / "b.jsonl").symlink_to(target)
        for spec in (tmp_path, tmp_path / "*.jsonl", tmp_path / "b.jsonl"):
            with pytest.raises(UserError, match=r"b\.jsonl") as caught:
                file_source(spec)
            assert "\n" not in str(caught.value)
    (tmp_path / "b.jsonl").unlink()
    source = file_source(tmp_path)
    assert names(source) == ["a.jsonl"]
    assert source.left_out == "hidden files (1), links to nothing (1)"


def test_pipes_do_not_hold_up_anything(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl")
    for name in ("b.jsonl", "shard.json"):
        os.mkfifo(tmp_path / name)
    source = file_source(tmp_path)
    assert names(source) == ["a.jsonl"] and "pipes, sockets or devices (1)" in source.left_out
    with pytest.raises(UserError, match=r"b\.jsonl is no file or folder"):
        file_source(tmp_path / "b.jsonl")


@pytest.mark.parametrize("out", ["in/shards", "in/deep/er/shards", "linked/shards", "in/link"])
@pytest.mark.parametrize("spec", ["in", "in/**", "in/**/*"])
def test_the_tools_own_output_is_no_source(
    tmp_path: Path, built: Path, out: str, spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.txt").write_text(text_of(number))
    (tmp_path / "linked").symlink_to("in")
    (tmp_path / "target").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "target")
    words = arguments(tmp_path / spec, tmp_path / out, "--tokenizer", built / "tokenizer.json")
    main(words)
    main(words)
    assert capsys.readouterr().out.endswith("is already complete\n")
    (tmp_path / "in" / "index.parquet").symlink_to(tmp_path / out / "train" / "index.parquet")
    other = file_source(tmp_path / spec)
    assert names(other) == ["0.txt", "1.txt", "2.txt"]
    assert "this tool has made" in other.left_out


def test_an_output_alone_is_no_source(built: Path) -> None:
    with pytest.raises(UserError, match=r"left out: .*this tool has made \(2\)"):
        file_source(built)


@pytest.mark.parametrize("workers", [1, 2])
def test_names_that_are_not_utf8_are_read_and_stored_as_text(
    tmp_path: Path, built: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / LATIN, f"{LATIN}.txt", f"{OTHER_LATIN}.txt", f"{LATIN}/a.jsonl")
    (tmp_path / LATIN / f"{LATIN}.txt").write_text(text_of(1) * 9)  # parts for both workers
    with (tmp_path / LATIN / f"{LATIN}.parquet").open("wb") as file:
        pq.write_table(pa.table({"text": ["a row"]}), file)
    (tmp_path / f"{LATIN}.json").write_bytes((built / "tokenizer.json").read_bytes())
    words = ["--tokenizer", tmp_path / f"{LATIN}.json", "--workers", workers]
    for _ in range(2):
        build(tmp_path / LATIN, tmp_path / f"out{LATIN}", *words)
    assert capsys.readouterr().out.endswith("is already complete\n")
    out = tmp_path / f"out{LATIN}"
    assert Manifest.load(out / "train").source == r"caf\udce9"
    files = [(out / split / "index.parquet").read_bytes() for split in ("train", "valid")]
    index = [pq.read_table(pa.BufferReader(file)) for file in files]
    found = {name for table in index for name in table["id"].to_pylist()}
    assert found == {
        r"caf\udce9.txt",
        r"caf\udce8.txt",
        r"caf\udce9/a.jsonl#0",
        r"caf\udce9.parquet#0",
    }
