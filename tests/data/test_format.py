"""docs/data-format.md: its reader, run as it stands, reads what shard.py has just made."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.pack import INDEX_SCHEMA
from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.manifest import Manifest, Shard, SourceCounts
from i3dist.data.tokenizer import Tokenizer
from tests.data_prep.chats import framed, write_chats
from tests.data_prep.corpus import build, write_corpus

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "data-format.md").read_text()


def code(name: str) -> str:
    """The code that follows the comment of this name."""
    (found,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", DOCUMENT, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def reader() -> dict[str, Callable[..., Any]]:
    names: dict[str, Any] = {}
    exec(code("reader") + code("fingerprint"), names)
    return names


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A fresh output whose shards are shorter than many documents, and the texts by id."""
    folder = tmp_path_factory.mktemp("format")
    (folder / "in").mkdir()
    texts = write_corpus(folder / "in")
    build(folder / "in", folder / "out", "--chunk-length", 32, "--chunks-per-shard", 3)
    return folder / "out", texts


@pytest.mark.parametrize("split", ["train", "valid"])
def test_the_reader_gives_exactly_the_token_ids_of_every_document(
    made: tuple[Path, dict[str, str]], reader: dict[str, Callable[..., Any]], split: str
) -> None:
    out, texts = made
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    rows = pq.read_table(out / split / "index.parquet").to_pylist()
    expected = [tokenizer.encode(texts[row["id"]]) for row in rows if row["piece"] == 0]
    assert list(reader["documents"](out / split)) == expected
    assert max(row["piece"] for row in rows) > 1, "documents run over the ends of shards"


def test_the_reader_reads_conversations(
    reader: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    chats = write_chats(tmp_path, 12)
    build(tmp_path, tmp_path / "out", "--format", "chat", "--chunk-length", 32)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    rows = pq.read_table(tmp_path / "out" / "train" / "index.parquet").to_pylist()
    names = [row["id"] for row in rows if row["piece"] == 0]
    expected = [[token for token, _ in framed(tokenizer, chats[name])[1:-1]] for name in names]
    assert list(reader["documents"](tmp_path / "out" / "train")) == expected


def test_the_reader_reads_version_two(
    made: tuple[Path, dict[str, str]], reader: dict[str, Callable[..., Any]]
) -> None:
    """Of all documents, none of which is too short, so that they are the same."""
    out = made[0].with_name("chosen")
    build(
        made[0].with_name("in"),
        out,
        "--chunk-length",
        32,
        "--chunks-per-shard",
        3,
        "--min-tokens",
        1,
    )
    assert (Manifest.load(made[0] / "train").version, Manifest.load(out / "train").version) == (
        1,
        2,
    )
    documents, former = (list(reader["documents"](path / "train")) for path in (out, made[0]))
    assert documents == former


def test_the_reader_refuses_a_damaged_shard(
    made: tuple[Path, dict[str, str]], reader: dict[str, Callable[..., Any]]
) -> None:
    path = made[0] / "valid" / "shard-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:600] + b"\1" + whole[601:])
    with pytest.raises(ValueError, match=r"shard-000001\.tar is damaged"):
        list(reader["documents"](made[0] / "valid"))
    path.write_bytes(whole)


def test_the_fingerprint_is_that_of_a_run(
    made: tuple[Path, dict[str, str]], reader: dict[str, Callable[..., Any]]
) -> None:
    corpus = Corpus.open(made[0], ModelSettings(chunk_length=32))
    assert reader["fingerprint"](made[0]) == corpus.fingerprint


def test_every_field_and_column_is_described() -> None:
    rows = [line.split("|")[1:3] for line in DOCUMENT.splitlines() if line.startswith("| `")]
    described = {
        name: kind.strip() for names, kind in rows for name in re.findall(r"`(\w+)`", names)
    }
    models = (Manifest, Shard, SourceCounts)
    fields = (*(name for model in models for name in model.model_fields), *INDEX_SCHEMA.names)
    assert set(described) == set(fields)
    assert all(described[field.name] == field.type for field in INDEX_SCHEMA)


def test_code_fits_eighty_columns() -> None:
    assert max(map(len, DOCUMENT.splitlines())) <= 80
    assert len(code("reader").split("def ")[1].splitlines()) <= 22
