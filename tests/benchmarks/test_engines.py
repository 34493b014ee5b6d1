"""benchmarks/engines.py at toy size."""

import json
import sys
from pathlib import Path

from tests.conftest import ROOT, one_rank

sys.path.append(str(ROOT / "benchmarks"))  # as for a program started in that folder

import engines


def test_both_engines_take_the_same_steps(tmp_path: Path) -> None:
    words = ["--toy", "--window", "1", "--steps", "1", "--rounds", "2"]
    with one_rank():
        found = engines.main([*words, "--json", str(tmp_path / "engines.json")])
    assert json.loads((tmp_path / "engines.json").read_text()) == found
    assert set(found["tokens_per_second"]) == {"zero2", "stock"}
    assert len(found["ratios"]) == 2 and found["ratio"] > 0
    assert found["largest_loss_difference"] < 1e-3
