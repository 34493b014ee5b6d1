"""benchmarks/reading.py: everyone reads the same tokens, and webdataset takes no less time."""

import json
from pathlib import Path

from tests.conftest import program


def test_everyone_reads_the_same(tmp_path: Path) -> None:
    """The program refuses contestants that read other chunks or tokens."""
    words = ["--shards", 8, "--rounds", 3, "--json", tmp_path / "readings.json"]
    result = program("benchmarks/reading.py", *words)
    assert result.returncode == 0, result.stderr
    assert "2,048 chunks of 512 tokens" in result.stdout
    readings = json.loads((tmp_path / "readings.json").read_text())["readings"]
    assert {"windows", "shards", "webdataset"} <= set(readings)
    cpu = {name: min(cpu for _, cpu in pairs) for name, pairs in readings.items()}
    assert cpu["shards"] < cpu["webdataset"]
