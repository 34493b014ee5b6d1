"""A source of a user's own: the example of data_prep/sources.py, run as it stands."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep import sources
from data_prep.shard import parse
from i3dist.cli.extend import LOADED
from i3dist.data.manifest import Manifest
from i3dist.data.token_types import MASKED
from i3dist.errors import UserError
from tests.data_prep.corpus import build, tree_digest


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Path]:
    """A file with the example's code; what it registers is gone again afterwards."""
    known, loaded = dict(sources.SOURCES), len(LOADED)
    text = sources.__doc__ or ""
    code = textwrap.dedent(text[text.index("    from ") :])
    assert len(code.splitlines()) < 30
    path = tmp_path / "numbers.py"
    path.write_text(code)
    yield path
    del LOADED[loaded:]
    sources.SOURCES.clear()
    sources.SOURCES.update(known)


def test_a_source_of_ones_own_gives_the_same_bytes_for_any_number_of_workers(
    example: Path, built: Path, tmp_path: Path
) -> None:
    options = ["--extend", example, "--tokenizer", built / "tokenizer.json"]
    for workers in (1, 3):
        build("numbers", tmp_path / f"out-{workers}", "--workers", workers, *options)
    assert tree_digest(tmp_path / "out-1") == tree_digest(tmp_path / "out-3")
    index = [pq.read_table(tmp_path / "out-1" / s / "index.parquet") for s in ("train", "valid")]
    found = {name for table in index for name in table["id"].to_pylist()}
    assert found == {str(number) for number in range(1000)}


def test_a_name_is_a_source_only_with_its_file(example: Path) -> None:
    assert parse(["--source", "numbers"]).source == [(Path("numbers"), 1.0)]
    given = parse(["--source", "./numbers", "--extend", str(example)]).source
    assert given == [(Path("numbers"), 1.0)]


def test_a_name_may_come_before_its_file(example: Path) -> None:
    given = parse(["--source", "numbers", "--extend", str(example)]).source
    assert given == [("numbers", 1.0)]


def test_a_source_whose_revision_differs_is_refused(
    example: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--extend", example, "--tokenizer", built / "tokenizer.json"]
    build("numbers", tmp_path / "out", *options)
    monkeypatch.setattr(sources.SOURCES["numbers"], "revision", "2")
    with pytest.raises(UserError, match="other content of the same source"):
        build("numbers", tmp_path / "out", *options)


def test_a_source_of_conversations_says_so(example: Path, tmp_path: Path) -> None:
    code = example.read_text().replace(
        'f"{number} is a number"',
        '[{"role": "user", "content": "a?"}, {"role": "assistant", "content": f"{number}!"}]',
    )
    example.write_text(code)
    options = ["--extend", example, "--format", "chat"]
    with pytest.raises(UserError, match="numbers has documents of format text: name it with"):
        build("numbers", tmp_path / "out", *options)
    example.write_text(code.replace('= "numbers", "1"', '= "numbers", "1"\n    format = "chat"'))
    sources.SOURCES.pop("numbers")
    LOADED.clear()
    build("numbers", tmp_path / "out", *options)
    assert Manifest.load(tmp_path / "out" / "train").token_type is MASKED
