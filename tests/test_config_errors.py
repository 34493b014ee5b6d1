"""Whatever is wrong in a word or a file of settings is one clear line."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.cli.settings_text import literal_settings
from i3dist.config import Settings
from i3dist.errors import UserError


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
        (
            "model.vocab_size=16777217",
            "model.vocab_size=16777217 should be less than or equal to 16777216",
        ),
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


@pytest.mark.parametrize("name", sorted(literal_settings(Settings)))
@pytest.mark.parametrize("text", ["", "\0", "a\0b"])
def test_an_empty_path_or_name_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match=rf"^setting {name}='.*': .*(name|give) \w+") as error:
        Settings.load(None, [f"{name}={text}"])
    assert "\n" not in str(error.value)
    section, key = name.split(".")
    file = tmp_path / "settings.yaml"
    file.write_text(f"# a run\n{section}:\n  {key}: {json.dumps(text)}\n")
    with pytest.raises(UserError, match=rf"settings.yaml, line 3: setting {name}='"):
        Settings.load(file)


@pytest.mark.parametrize("name", ["tracking.experiment", "tracking.run_name"])
def test_a_name_that_is_no_text_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="no text: give another"):
        Settings.load(None, [f"{name}=a\udcff"])


@pytest.mark.parametrize("null", ["", "null", "~", "# none"])
@pytest.mark.parametrize(
    "name", ["train.steps", "train.lanes", "log.every", "optimizer.lr", "tracking.enabled"]
)
def test_a_setting_without_a_value_is_named_as_it_was_typed(name: str, null: str) -> None:
    with pytest.raises(UserError, match=rf"^setting {name}={null} has no value: give one"):
        Settings.load(None, [f"{name}={null}"])


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("train:\n  steps: 3\n  seed: x\n", 3, "setting train.seed='x' should be a valid integer"),
        ("train:\n  steps: 3\n\n  stpes: 4\n", 4, "unknown setting train.stpes; did you mean"),
        ("log:\n  every: 3\ntrian:\n  steps: 4\n", 3, "unknown setting trian; did you mean train"),
        ("model: {layers: 12xrwkv,2xattention}\n", 1, "no value: put quotes around a value that"),
        ("train:\n  steps: 3\n  seed: 1\n  steps: 4\n", 4, "train.steps is there twice"),
        ("train:\n  steps: 3\nlog:\ntrain:\n  seed: 1\n", 4, "train is there twice"),
        ("train:\n  steps: 3\n\tseed: 4\n", 3, "indent with spaces"),
        ("train:\n  steps: [3\n", 3, "cannot be parsed"),
        ("log:\n  every: 3\ntrain: 3\n", 3, "train has no settings in it"),
        ("log:\n  every: 3\ntrain.steps: 3\n", 3, "train.steps has no settings in it"),
        ("train:\n  seed: 1\n  steps:\n    - 3\n", 4, "train.steps is not one plain value"),
        ("train:\n  steps:\n", 2, "setting train.steps= has no value"),
        ("a: 1\nb: \x01\n", 2, "a character that cannot be printed"),
        ("log:\n  every: &n 5\ntrain:\n  steps: *n\n", 4, "no aliases"),
        ("model:\n  d_model: 64\n  latents: 600\n", 3, "at most model.chunk_length = 512"),
    ],
)
def test_an_error_in_a_file_names_file_line_and_key(
    tmp_path: Path, content: str, line: int, says: str
) -> None:
    file = tmp_path / "my settings.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{file}, line {line}: ")) as error:
        Settings.load(file)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text_have_a_line_too(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"train:\n  seed: 3\nrun:\n  path: \xff\n")
    with pytest.raises(UserError, match=r"bad.yaml, line 4: .* not UTF-8"):
        Settings.load(tmp_path / "bad.yaml")


def test_a_word_that_replaces_a_line_of_the_file_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("train:\n  steps: 3\n")
    with pytest.raises(UserError, match=r"^setting train.steps=0 should be") as error:
        Settings.load(tmp_path / "good.yaml", ["train.steps=0"])
    assert "good.yaml" not in str(error.value)


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
