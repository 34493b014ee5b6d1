"""Learning-rate and compression schedules: shapes, joints, and the curves of saved runs."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.config import CompressionSettings, OptimizerSettings, Settings
from i3dist.errors import UserError
from i3dist.optim.schedules import SCHEDULES, Point, height
from i3dist.training.continuing import first_conflict, inherit_decided
from i3dist.training.startup import decide

NAMES = ("cosine", "linear", "warmup-stable-decay")

curves = st.builds(
    OptimizerSettings,
    lr=st.floats(1e-6, 1.0),
    schedule=st.sampled_from(NAMES),
    min_lr_ratio=st.floats(0, 1),
    warmup_steps=st.integers(0, 300),
    decay_steps=st.integers(1, 600),
    decay_fraction=st.floats(0.001, 1),
)
ramps = st.builds(
    CompressionSettings,
    off_steps=st.integers(0, 200),
    ramp_steps=st.integers(0, 200),
    schedule=st.sampled_from(NAMES),
)


def length(curve: OptimizerSettings) -> int:
    """Steps until the curve has ended; a saved one may be shorter than its warm-up."""
    assert isinstance(curve.decay_steps, int)
    return max(curve.decay_steps, curve.warmup_steps + 1)


def test_there_are_these_schedules() -> None:
    assert set(SCHEDULES) == set(NAMES)


@given(curve=curves, step=st.integers(0, 900))
def test_the_learning_rate_is_finite_and_between_nothing_and_its_peak(
    curve: OptimizerSettings, step: int
) -> None:
    assert 0 <= curve.lr_at(step) <= curve.lr * (1 + 1e-12)


@given(curve=curves)
def test_warm_up_ends_at_the_peak_and_the_curve_at_its_floor(curve: OptimizerSettings) -> None:
    if curve.warmup_steps:
        assert curve.lr_at(curve.warmup_steps - 1) == pytest.approx(curve.lr, rel=1e-12)
    assert curve.lr_at(curve.warmup_steps) == pytest.approx(curve.lr, rel=1e-12)
    for step in (length(curve), length(curve) + 1, 10**9):
        assert curve.lr_at(step) == curve.lr * curve.min_lr_ratio


@given(curve=curves, step=st.integers(0, 900))
def test_the_learning_rate_rises_in_warm_up_and_never_after(
    curve: OptimizerSettings, step: int
) -> None:
    rate, after = curve.lr_at(step), curve.lr_at(step + 1)
    if step + 1 < curve.warmup_steps:
        assert after > rate
    else:
        assert after <= rate * (1 + 1e-15)


@given(curve=curves, step=st.integers(0, 900))
def test_the_learning_rate_has_no_jump_at_a_joint(curve: OptimizerSettings, step: int) -> None:
    """A step changes it by the steepest slope that its curve has, at most."""
    span = length(curve) - curve.warmup_steps
    slopes = {"cosine": math.pi / 2, "linear": 1.0, "warmup-stable-decay": 1 / curve.decay_fraction}
    fall = slopes[curve.schedule] / span
    rise = 1 / curve.warmup_steps if step + 1 < curve.warmup_steps else 0
    change = (curve.lr_at(step + 1) - curve.lr_at(step)) / curve.lr
    assert -fall - 1e-12 <= change <= rise + 1e-12


def test_warmup_stable_decay_stays_at_its_peak_until_the_last_part() -> None:
    curve = OptimizerSettings(
        lr=1.0, schedule="wsd", warmup_steps=100, decay_steps=1100, min_lr_ratio=0.0
    )
    assert curve.schedule == "warmup-stable-decay" and curve.decay_fraction == 0.2
    assert {curve.lr_at(step) for step in range(99, 900)} == {1.0}
    assert curve.lr_at(901) == pytest.approx(0.995)
    assert curve.lr_at(1000) == pytest.approx(0.5)
    assert curve.lr_at(1100) == 0.0


def test_linear_is_halfway_in_the_middle() -> None:
    curve = OptimizerSettings(lr=1.0, schedule="linear", warmup_steps=0, decay_steps=10)
    assert curve.lr_at(5) == pytest.approx(0.55)


@given(ramp=ramps, step=st.integers(0, 500))
def test_the_gate_opens_once_from_0_to_1(ramp: CompressionSettings, step: int) -> None:
    gate, after = ramp.gate_at(step), ramp.gate_at(step + 1)
    assert 0 <= gate <= after <= 1
    assert gate == 0 or step >= ramp.off_steps
    assert ramp.gate_at(ramp.off_steps + ramp.ramp_steps) == 1.0
    steepest = math.pi / 2 if ramp.schedule == "cosine" else 1.0
    assert after - gate <= steepest / max(1, ramp.ramp_steps) + 1e-12


def test_a_gate_can_open_by_a_cosine() -> None:
    ramp = CompressionSettings(off_steps=10, ramp_steps=4, schedule="cosine")
    quarter = 0.5 - math.sqrt(0.125)
    wanted = [0.0, quarter, 0.5, 1 - quarter, 1.0]
    assert [ramp.gate_at(step) for step in range(9, 14)] == pytest.approx(wanted)


@given(step=st.integers(0, 700), warmup=st.integers(0, 200), span=st.integers(1, 400))
def test_defaults_are_the_curves_of_saved_runs_bit_for_bit(
    step: int, warmup: int, span: int
) -> None:
    """The arithmetic of versions that had no schedules to choose from."""
    curve = OptimizerSettings(warmup_steps=warmup, decay_steps=warmup + span)
    if step < warmup:
        former = curve.lr * (step + 1) / warmup
    else:
        progress = min(1.0, (step - warmup) / span)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        former = curve.lr * (curve.min_lr_ratio + (1.0 - curve.min_lr_ratio) * cosine)
    assert curve.lr_at(step) == former
    ramp = CompressionSettings(off_steps=warmup, ramp_steps=span)
    former = 0.0 if step < warmup else min(1.0, (step - warmup + 1) / span)
    assert ramp.gate_at(step) == former


def test_a_run_saved_without_schedules_continues_with_todays_defaults() -> None:
    saved = decide(Settings(), 1, 500).to_dict()
    for section, key in (
        ("optimizer", "schedule"),
        ("optimizer", "decay_fraction"),
        ("compression", "schedule"),
    ):
        del saved[section][key]
    was = Settings.build(saved)
    assert first_conflict(inherit_decided(Settings(), was), was) is None
    linear = inherit_decided(Settings.load(None, ["optimizer.schedule=linear"]), was)
    wanted = "optimizer.schedule is linear but the saved run has cosine;"
    assert str(first_conflict(linear, was)).startswith(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_continued_run_keeps_its_curve_however_long_it_is_made(name: str) -> None:
    words = [f"optimizer.schedule={name}", "train.steps=300"]
    first = decide(Settings.load(None, words), 1, 500)
    longer = inherit_decided(Settings.load(None, [words[0], "train.steps=900"]), first)
    assert first_conflict(longer, first) is None
    curves = first.optimizer, longer.optimizer
    assert [curves[0].lr_at(s) for s in range(900)] == [curves[1].lr_at(s) for s in range(900)]


def test_an_unknown_schedule_is_one_line_that_lists_those_there_are() -> None:
    for name in ("optimizer.schedule", "compression.schedule"):
        with pytest.raises(
            UserError, match=rf"^setting {name}='steps' should be cosine, "
        ) as error:
            Settings.load(None, [f"{name}=steps"])
        assert all(known in str(error.value) for known in (*NAMES, "--extend FILE.py"))


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (lambda at: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda at: at.steps["7"], "TypeError: "),
        (lambda at: None, "TypeError: "),
        (lambda at: "high", "ValueError: "),
    ],
)
def test_a_schedule_that_fails_is_one_line(
    odd: Callable[[Point], float], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEDULES, "odd", odd)
    with pytest.raises(UserError, match=rf"^schedule 'odd' failed at step 3 of 7: {says}"):
        height("odd", Point(3, 7, 1.0, 0.0))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_schedule_that_leaves_its_range_is_one_line(value: float) -> None:
    SCHEDULES["odd"] = lambda at: value
    try:
        with pytest.raises(UserError, match=r"schedule 'odd' returned .* for step 3 of 7"):
            height("odd", Point(3, 7, 1.0, 0.0))
    finally:
        del SCHEDULES["odd"]
