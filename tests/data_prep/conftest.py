"""One corpus and one output for all tests of the data stage."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.reading import files
from tests.data_prep.advice import TEXTS, write
from tests.data_prep.corpus import build, write_corpus


@pytest.fixture(autouse=True)
def _many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SMALLEST_PART", 4000)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The corpus's folder and its usable texts by id."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


@pytest.fixture(scope="session")
def built(corpus: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes of the corpus in one go, with parts of the usual size."""
    out = tmp_path_factory.mktemp("built") / "out"
    build(corpus[0], out)
    return out


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A source of small documents."""
    return write(tmp_path / "in" / "a.jsonl", TEXTS).parent


@pytest.fixture(scope="session")
def tokenizer(built: Path) -> Path:
    return built / "tokenizer.json"


@pytest.fixture
def three_files(tmp_path: Path) -> Path:
    """Parquet files of two row groups of two rows each, which serve as the hub's."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for number in range(3):
        rows = [{"text": f"text {number} {i}", "id": f"{number}-{i}", "n": i} for i in range(4)]
        table = pa.Table.from_pylist(rows).append_column("url", pa.array(["u"] * 4))
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=2)
    return folder
