"""Settings: the card by default, one clear line for whatever is wrong."""

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
