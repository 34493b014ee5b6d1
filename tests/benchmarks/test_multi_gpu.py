"""benchmarks/multi_gpu.py at toy size, on two CPU ranks. About 6 s."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, error_line, run_ranks

sys.path.append(str(ROOT / "benchmarks"))  # as for a program started in that folder

from multi_gpu import efficiencies

PROGRAM = "benchmarks/multi_gpu.py"

CASES = ["zero2-4-fp32", "zero2-4-bf16", "ddp-4-bf16"]


def test_every_loop_takes_the_same_steps_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    """As many lanes in all give the same loss and gradient, whatever computes them."""
    words = ["--toy", "--gpus", 2, "--steps", 1, "--warm-up", 1, "--json", tmp_path / "rows"]
    result = run_ranks(*words, "--only", *CASES, ranks=1, script=PROGRAM)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    alone = next(row for row in rows if row["stage"] == "alone" and row["lanes"] == 8)
    together = [row for row in rows if row["stage"] == "together"]
    found = {row["case"]: row for row in efficiencies(rows, 2)}
    assert [row["case"] for row in together] == CASES == list(found)
    for row in together:
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert row["norm"] == pytest.approx(alone["norm"], rel=1e-2)
    assert together[0]["norm"] != together[1]["norm"], "gradients are summed in another type"
    speeds = [row["tokens_per_second"] for row in rows if row.get("lanes") == 8]
    assert found["zero2-4-fp32"]["strong"] == pytest.approx(speeds[2] / sum(speeds[:2]))
    assert all(row["weak"] > 0 for row in found.values())
    assert {row["what"] for row in rows if row["stage"] == "exchange"} == {
        *("reduce-scatter, fp32", "reduce-scatter, bf16", "all-gather, bf16")
    }


def test_more_gpus_than_there_are_is_one_line() -> None:
    result = run_ranks("--gpus", 9999, ranks=1, script=PROGRAM)
    assert "9999 GPUs are asked for" in error_line(result)
