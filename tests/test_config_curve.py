"""The learning rate's curve: its shape, and curves that are too short."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.config import OptimizerSettings, Settings
from i3dist.errors import UserError
from i3dist.training.continuing import first_conflict, inherit_decided
from i3dist.training.startup import decide


@given(step=st.integers(0, 2000))
def test_learning_rate_rises_then_falls_to_its_floor(step: int) -> None:
    settings = OptimizerSettings(lr=1.0, min_lr_ratio=0.1, warmup_steps=100, decay_steps=1000)
    rate, after = settings.lr_at(step), settings.lr_at(step + 1)
    assert 0 < rate <= 1
    assert after >= rate if step + 1 < 100 else after <= rate
    assert step < 1000 or rate == pytest.approx(0.1)


curves = st.builds(
    OptimizerSettings,
    lr=st.just(1.0),
    min_lr_ratio=st.floats(0, 1),
    warmup_steps=st.integers(0, 300),
    decay_steps=st.integers(1, 600),
)


@given(curve=curves, step=st.integers(0, 900))
def test_learning_rate_never_jumps(curve: OptimizerSettings, step: int) -> None:
    """A step raises it by a warm-up step's share, or lowers it as a cosine does over what is left
    of the curve: one step, where a saved run has left nothing for it."""
    assert isinstance(curve.decay_steps, int)
    change = curve.lr_at(step + 1) - curve.lr_at(step)
    fall = max(1, curve.decay_steps - curve.warmup_steps)
    if step + 1 < curve.warmup_steps:
        assert change == pytest.approx(1 / curve.warmup_steps)
    else:
        assert -(1 - curve.min_lr_ratio) * math.pi / 2 / fall - 1e-12 <= change <= 0
    assert curve.lr_at(900) == pytest.approx(curve.min_lr_ratio)


def test_saved_curves_stay_what_they_were() -> None:
    """By numbers of the code that saved them; the second curve is shorter than its warm-up."""
    curves = {
        (100, 1000): {0: 4e-06, 99: 4e-4, 100: 4e-4, 550: 2.2e-4, 1000: 4e-05},
        (100, 50): {49: 2e-4, 99: 4e-4, 100: 4e-4, 101: 4e-05, 500: 4e-05},
    }
    for (warmup, decay), rates in curves.items():
        curve = OptimizerSettings(warmup_steps=warmup, decay_steps=decay)
        assert {step: curve.lr_at(step) for step in rates} == pytest.approx(rates)


def test_a_curve_shorter_than_its_warm_up_is_refused_where_a_run_begins() -> None:
    for decay in (1, 99, 100):
        words = [f"optimizer.decay_steps={decay}", "optimizer.warmup_steps=100"]
        with pytest.raises(
            UserError, match=r"decay_steps=.* optimizer\.warmup_steps=100.*raise it"
        ):
            decide(Settings.load(None, words), 1, 500)
    words[0] = "optimizer.decay_steps=101"
    assert decide(Settings.load(None, words), 1, 500).optimizer.decay_steps == 101


def test_a_curve_that_is_too_short_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("optimizer:\n  warmup_steps: 100\n  decay_steps: 50\n")
    with pytest.raises(UserError, match=rf"^{file}, line 3: setting optimizer.decay_steps=50 "):
        decide(Settings.load(file), 1, 500)
    with pytest.raises(UserError, match=r"^setting optimizer.decay_steps=60 "):
        decide(Settings.load(file, ["optimizer.decay_steps=60"]), 1, 500)


def test_a_saved_run_keeps_the_curve_it_has() -> None:
    """Runs of 50 steps were saved with a curve of 50, whatever their warm-up."""
    saved = Settings.build({"train": {"steps": 50}, "optimizer": {"decay_steps": 50}})
    again = inherit_decided(Settings.load(None, ["train.steps=500"]), saved)
    assert again.optimizer.decay_steps == 50 and first_conflict(again, saved) is None


@given(steps=st.integers(1, 300), warmup=st.integers(0, 300), step=st.integers(0, 600))
def test_a_run_that_ends_in_its_warm_up_has_as_many_steps_to_fall_in(
    steps: int, warmup: int, step: int
) -> None:
    words = [f"train.steps={steps}", f"optimizer.warmup_steps={warmup}"]
    curve = decide(Settings.load(None, words), 1, 500).optimizer
    assert curve.decay_steps == (steps if steps > warmup else 2 * warmup)
    if steps <= warmup:
        assert curve.lr_at(step + 1) >= curve.lr_at(step) - curve.lr * math.pi / 2 / warmup
