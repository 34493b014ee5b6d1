"""Settings: the card by default, then a file, then words; what a continued run may change."""

import subprocess
import sys
from pathlib import Path

import yaml

from i3dist.cli.settings_text import all_settings
from i3dist.config import Settings
from i3dist.training.continuing import FREE_TO_CHANGE, first_conflict, inherit_decided

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_cards_file_has_every_setting_at_its_default() -> None:
    """And is what its first lines say that it is made by, comments included."""
    file = CONFIGS / "i3-4096ctx.yaml"
    text, defaults = file.read_text(encoding="utf-8"), Settings().to_dict()
    held = yaml.safe_load(text)
    names = {f"{section}.{key}" for section in held for key in held[section]}
    missing, unknown = set(Settings().flat()) - names, names - set(Settings().flat())
    remedy = "python -m i3dist.config > configs/i3-4096ctx.yaml"
    assert not missing and not unknown, f"missing {missing}, unknown {unknown}: run {remedy}"
    assert held == defaults, f"run {remedy}"
    assert Settings.load(file) == Settings()
    made = subprocess.run(
        [sys.executable, "-m", "i3dist.config"], cwd=CONFIGS.parent, capture_output=True, text=True
    )
    assert text == made.stdout, f"run {remedy}"


def test_overrides_win_over_the_file_and_the_file_over_defaults() -> None:
    settings = Settings.load(CONFIGS / "tiny.yaml", ["train.steps=7", "optimizer.lr=1e-3"])
    assert settings.train.steps == 7
    assert settings.optimizer.lr == 1e-3
    assert settings.model.d_model != Settings().model.d_model
    assert settings.model.chunk_length == 512


def test_yaml_round_trips(tmp_path: Path) -> None:
    settings = Settings.load(CONFIGS / "tiny.yaml")
    (tmp_path / "settings.yaml").write_text(settings.to_yaml())
    assert Settings.load(tmp_path / "settings.yaml") == settings


def test_names_that_stay() -> None:
    names = set(all_settings(Settings))
    assert names >= {
        "data.path",
        "run.path",
        "train.steps",
        "train.seed",
        "checkpoint.every",
        "validate.every",
    }
    assert names >= set(FREE_TO_CHANGE)
    assert all(field.description for field in all_settings(Settings).values())


def test_a_section_with_nothing_but_comments_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("train:\n  # steps: 3\nlog:\n  every: 7\n")
    settings = Settings.load(tmp_path / "few.yaml")
    assert settings == Settings().with_values(**{"log.every": 7})


def test_a_continued_run_may_change_intervals_only() -> None:
    saved = Settings.load(None, ["train.lanes=8", "optimizer.decay_steps=100"])
    again = Settings.load(None, ["train.steps=9", "log.every=3", "run.path=elsewhere"])
    assert first_conflict(inherit_decided(again, saved), saved) is None
    other = inherit_decided(Settings.load(None, ["train.seed=4"]), saved)
    says = "train.seed is 4 but the saved run has 0; type train.seed=0 to continue it"
    assert first_conflict(other, saved) == says
