"""benchmarks/twins.py: of two runs that differ in history it says what history gains."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from i3dist.config import Settings
from i3dist.errors import UserError
from tests.conftest import ROOT

# As for a program started in that folder.
sys.path.append(str(ROOT / "benchmarks"))

import twins

STEPS, CONTINUED = 120, 60
FIRST, LATER, SLOW = 100, 300, 9.0  # tokens of chunks 0 and 1; seconds of a step that compiles


def write(folder: Path, name: str, lines: Sequence[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(folder: Path, loss: float, withheld: float, samples: str = "s") -> Path:
    """A run in two commands, validated at its beginning and end; `loss` is chunk 1's."""
    folder.mkdir()
    (folder / "settings.yaml").write_text(
        Settings().with_values(**{"train.steps": STEPS}).to_yaml()
    )
    steps = range(1, STEPS + 1)
    entry = {"lanes": "l", "gradient_norm": 1.0, "skipped": None}
    write(folder, "ledger", [{"step": s, "samples": samples, "loss": s, **entry} for s in steps])
    write(folder, "starts", [{"step": step, "time": 1.0} for step in (0, CONTINUED)])
    slow = {10, CONTINUED + 10}
    speed = {"tokens_per_second": 1000.0, "mfu": 0.4, "time": 1.0}
    times = [(s, SLOW if s in slow else 0.1) for s in steps if s % 10 == 0]
    metrics = [{"step": s, "step_time": t, "tokens_seen": 512 * s, **speed} for s, t in times]
    write(folder, "metrics", metrics)
    losses = (loss, withheld, withheld + 0.5)
    chunks = [
        {"index": index, "tokens": tokens} | dict(zip(twins.COLUMNS.values(), values, strict=True))
        for index, (tokens, values) in enumerate(((FIRST, (4.0,) * 3), (LATER, losses)))
    ]
    write(folder, "validation", [{"step": step, "by_chunk": chunks} for step in (0, STEPS)])
    return folder


def test_the_gain_is_over_the_twin_without_history(tmp_path: Path) -> None:
    results, plot = tmp_path / "twins.jsonl", tmp_path / "twins.png"
    one, other = run(tmp_path / "run", 3.0, 3.3), run(tmp_path / "twin", 3.15, 3.2)
    words = ["--run", str(one), "--twin", str(other), "--results", str(results)]
    twins.main(["collect", *words])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["run"], line["step"]) for line in lines] == [("run", STEPS), ("twin", STEPS)]
    assert lines[0]["curve"] == [25.5, 75.5]
    assert lines[0]["tokens"] == 512 * STEPS
    assert lines[0]["tokens_per_s"] == 1000
    (pair,) = twins.Pair.all_of(lines)
    assert pair.gain(range(1)) == pytest.approx(0)
    assert pair.gain(twins.ALL[1:]) == pytest.approx(0.2)
    assert pair.gain(twins.ALL) == pytest.approx(0.2 * LATER / (FIRST + LATER))
    assert pair.mean("other", twins.ALL[1:]) == pytest.approx(3.8)
    twins.main(["report", str(results), "--plot", str(plot)])
    assert plot.stat().st_size > 1000


def test_runs_that_read_something_else_are_not_compared(tmp_path: Path) -> None:
    one, other = run(tmp_path / "run", 3.0, 3.3), run(tmp_path / "twin", 3.1, 3.2, samples="t")
    words = ["--run", str(one), "--twin", str(other), "--results", str(tmp_path / "x.jsonl")]
    with pytest.raises(UserError, match="should have read the same in every step"):
        twins.main(["collect", *words])
    (tmp_path / "x.jsonl").write_text('{"arm": "none"}\n')
    with pytest.raises(UserError, match="no results"):
        twins.main(["report", str(tmp_path / "x.jsonl")])


def test_intervals_in_which_a_command_began_do_not_count(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", 3.0, 3.3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    few = [line for line in lines if line["step"] in (10, 20, CONTINUED, CONTINUED + 10)]
    write(folder, "metrics", few)
    run_, twin = (twins.Run.read(folder) for _ in range(2))
    assert [line["ms"] for line in twins.collect(run_, twin)] == [100.0, 100.0]
