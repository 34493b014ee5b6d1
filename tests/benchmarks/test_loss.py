"""benchmarks/loss.py at toy size."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# As for a program started in that folder.
sys.path.append(str(ROOT / "benchmarks"))

import kernels
import loss


def test_both_forms_are_measured_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "loss.json"
    naive, sliced = loss.main(["--lanes", "2", "--turns", "1", "--json", str(file)])
    assert (naive.form, sliced.form) == ("naive", "sliced")
    assert naive.repeatable and sliced.repeatable
    assert sliced.ms > 0 and naive.ms > 0
    assert sliced.loss == pytest.approx(naive.loss, rel=1e-3)
    assert naive.hidden_difference == naive.head_difference == 0
    assert 0 < sliced.hidden_difference < 1e-2 and 0 < sliced.head_difference < 1e-2
    assert [row["form"] for row in json.loads(file.read_text())["rows"]] == ["naive", "sliced"]


@pytest.mark.parametrize(
    "kernel",
    [
        "triton_red_fused__log_softmax_nll_loss_forward_0",
        "triton_red_fused__to_copy_add_amax_copy__exp_log_mul_sub_sum_0",
    ],
)
def test_a_profile_counts_kernels_of_either_form_as_loss(kernel: str) -> None:
    assert kernels.kind_of(kernel) == "loss"
