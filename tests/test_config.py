"""Settings: the card by default, one clear line for whatever is wrong."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.config import (
    FREE_TO_CHANGE,
    OptimizerSettings,
    Settings,
    first_conflict,
    inherit_decided,
    setting_lines,
)
from i3dist.errors import UserError
from i3dist.run import decide

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_cards_file_is_the_defaults() -> None:
    assert Settings.load(CONFIGS / "i3-4096ctx.yaml") == Settings()


def test_overrides_win_over_the_file_and_the_file_over_defaults() -> None:
    settings = Settings.load(CONFIGS / "tiny.yaml", ["train.steps=7", "optimizer.lr=1e-3"])
    assert settings.train.steps == 7
    assert settings.optimizer.lr == 1e-3
    assert settings.model.d_model != Settings().model.d_model
    assert settings.model.chunk_length == 512


def test_yaml_round_trips(tmp_path: Path) -> None:
    settings = Settings.load(CONFIGS / "tiny.yaml")
    settings.save(tmp_path / "settings.yaml")
    assert Settings.load(tmp_path / "settings.yaml") == settings


def test_names_that_stay() -> None:
    names = {name for name, _, _ in setting_lines()}
    assert names >= {
        "data.path",
        "run.path",
        "train.steps",
        "train.seed",
        "checkpoint.every",
        "validate.every",
    }
    assert names >= set(FREE_TO_CHANGE)
    assert all(text for _, _, text in setting_lines())


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.stpes=4", "unknown setting train.stpes; did you mean train.steps"),
        ("nothing.here=1", "unknown setting nothing"),
        ("train.steps=0", "train.steps=0 should be greater than or equal to 1"),
        ("train.steps=many", "train.steps='many' should be a valid integer"),
        ("train.lanes=x", "should be a valid integer.*should be 'auto'"),
        ("optimizer.lr=-1", "optimizer.lr=-1 should be greater than 0"),
        ("optimizer.lr=nan", "finite"),
        ("model.vocab_size=70000", "model.vocab_size=70000 should be less than or equal to 65536"),
        ("model.state_carry=maybe", "should be a valid boolean"),
        ("train.steps=${nope}", "cannot be parsed"),
        ("train.seed=[1", "cannot be parsed"),
        ("steps=4", "not of the form section.key=value"),
        ("train.steps", "not of the form section.key=value"),
        (".=3", "not of the form section.key=value"),
    ],
)
def test_wrong_words_are_one_line(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        Settings.load(None, [word])
    assert "\n" not in str(error.value)


def test_names_that_look_like_numbers_are_names() -> None:
    settings = Settings.load(None, ["tracking.run_name=2024", "run.path=123"])
    assert settings.tracking.run_name == "2024"
    assert settings.run.path == Path("123")


@pytest.mark.parametrize("content", ["train: [", "- 1", "train: 3", "\x00", "trian: {steps: 1}"])
def test_wrong_files_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        Settings.load(path)
    assert "\n" not in str(error.value)


@given(st.text(max_size=60))
def test_no_word_is_ever_a_traceback(word: str) -> None:
    try:
        Settings.load(None, [word])
    except UserError as error:
        assert "\n" not in str(error)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read settings nowhere.yaml"):
        Settings.load(Path("nowhere.yaml"))


def test_a_continued_run_may_change_intervals_only() -> None:
    saved = Settings.load(None, ["train.lanes=8", "optimizer.decay_steps=100"])
    again = Settings.load(None, ["train.steps=9", "log.every=3", "run.path=elsewhere"])
    assert first_conflict(inherit_decided(again, saved), saved) is None
    other = inherit_decided(Settings.load(None, ["train.seed=4"]), saved)
    assert first_conflict(other, saved) == "train.seed is 4 but the saved run has 0"


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
    """A step raises it by a warm-up step's share, or lowers it as a cosine does; where no step is
    left for falling (saved runs may have even less), it stays."""
    assert isinstance(curve.decay_steps, int)
    change = curve.lr_at(step + 1) - curve.lr_at(step)
    fall = curve.decay_steps - curve.warmup_steps
    if step + 1 < curve.warmup_steps:
        assert change == pytest.approx(1 / curve.warmup_steps)
    elif fall <= 0:
        assert change == 0
    else:
        assert -(1 - curve.min_lr_ratio) * math.pi / 2 / fall - 1e-12 <= change <= 0
    assert curve.lr_at(900) == pytest.approx(curve.min_lr_ratio if fall > 0 else 1)


def test_a_curve_shorter_than_its_warm_up_is_refused_where_a_run_begins() -> None:
    words = ["optimizer.decay_steps=99", "optimizer.warmup_steps=100"]
    with pytest.raises(UserError, match=r"decay_steps=99 .* optimizer\.warmup_steps=100.*raise it"):
        decide(Settings.load(None, words), 1, 500)
    words[0] = "optimizer.decay_steps=100"
    assert decide(Settings.load(None, words), 1, 500).optimizer.decay_steps == 100


def test_a_saved_run_keeps_the_curve_it_has() -> None:
    """Runs of 50 steps were saved with a curve of 50, whatever their warm-up."""
    saved = Settings.build({"train": {"steps": 50}, "optimizer": {"decay_steps": 50}})
    again = inherit_decided(Settings.load(None, ["train.steps=500"]), saved)
    assert again.optimizer.decay_steps == 50 and first_conflict(again, saved) is None


@given(steps=st.integers(1, 300), warmup=st.integers(0, 300), step=st.integers(0, 600))
def test_a_run_that_ended_in_its_warm_up_never_falls_when_it_is_prolonged(
    steps: int, warmup: int, step: int
) -> None:
    words = [f"train.steps={steps}", f"optimizer.warmup_steps={warmup}"]
    curve = decide(Settings.load(None, words), 1, 500).optimizer
    assert curve.decay_steps == max(steps, warmup)
    assert steps > warmup or curve.lr_at(step + 1) >= curve.lr_at(step)
