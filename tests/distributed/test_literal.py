"""A run with `model.compressor=literal`, from training to generation. Two ranks; half a minute."""

import json
import math
import shutil
from pathlib import Path

import pytest

from tests.conftest import QUICK, SAVING, STEPS, differences, error_line, program, run_ranks

WORDS = [*QUICK, *SAVING, "model.compressor=literal", "log.diagnose_every=6"]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("literal") / "run"
    result = run_ranks(*WORDS, f"data.path={data}", f"run.path={run}")
    assert result.returncode == 0, result.stderr
    return run


def test_continued_equals_uninterrupted(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000005", tmp_path / "checkpoints/step-00000005")
    for name in ("settings.yaml", "tokenizer.json", "metrics.jsonl", "ledger.jsonl"):
        shutil.copy(run / name, tmp_path / name)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000005")
    result = run_ranks(*WORDS, f"data.path={data}", f"run.path={tmp_path}")
    assert "continued from step 5\n" in result.stdout, result.stderr
    assert not differences(tmp_path, run)


def test_diagnoses_have_the_figures_of_any_compressor(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, STEPS]
    for line in lines:
        assert line["compressor_gradient_norm"] > 0
        assert line["effective_rank"] >= 1 and math.isfinite(line["attention_age_01"])


def test_the_setting_cannot_change_when_a_run_continues(run: Path, data: Path) -> None:
    words = [*WORDS, "model.compressor=records", f"data.path={data}", f"run.path={run}"]
    line = error_line(run_ranks(*words, ranks=1))
    assert "model.compressor is records but the saved run has literal" in line


def test_the_programs_read_it(run: Path, data: Path) -> None:
    for words in (
        ["launch/evaluate.py", "--data", data],
        ["launch/generate.py", "--prompt", "def ", "--tokens", 5],
    ):
        result = program(*words, "--checkpoint", run)
        assert result.returncode == 0, result.stderr
