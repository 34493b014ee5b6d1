"""Settings: the card by default, one clear line for whatever is wrong."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from i3dist.cli.settings_text import all_settings, literal_settings
from i3dist.config import OptimizerSettings, Settings
from i3dist.errors import UserError
from i3dist.training.continuing import FREE_TO_CHANGE, first_conflict, inherit_decided
from i3dist.training.startup import decide
from i3dist.training.summary import print_tables

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


# What YAML, a shell or a template would read as something else.
ODD = [
    *("2024", "0123", "1.10", "12:30:45", "1e3", "0x10", "1_000", "2024-01-01", ".inf", "-"),
    *("null", "Null", "yes", "no", "on", "true", "auto", "=", "<<", "!!int 3", "&a", "*a", "%"),
    *("runs/sweep #1", "a: b", "[x]", "{x}", "${x}", "${run.path}", "a?b", "50%", "%41", "- x"),
    *(" x", "x ", "a\nb", "\n", "'", '"', "'x'", "\\n", "\t", "é", "\u2028", "\x85", "\ufeff"),
    *(
        "😀",
        "None",
        "./~",
        "./~root/x",
        "a/~",
        "x" * 2000,
        "#",
        "|",
        ">",
        "? a",
        "@x",
        "`x`",
        "\x7f",
    ),
]
TYPED = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40),
    # A file may hold no value above 4,096 characters.
    st.lists(st.sampled_from(ODD), min_size=2, max_size=4)
    .map(" ".join)
    .filter(lambda text: len(text) <= 4090),
)


def test_paths_and_names_are_literal_by_their_type() -> None:
    names = set(all_settings(Settings))
    assert set(literal_settings(Settings)) <= names
    assert set(literal_settings(Settings)) == {
        "run.path",
        "data.path",
        "optimizer.kind",
        "tracking.experiment",
        "tracking.run_name",
        "model.layers",
        "compression.schedule",
        "optimizer.schedule",
    }


@hypothesis.settings(deadline=None)  # it writes files, and disks can be busy
@given(text=TYPED.filter(lambda text: not text.startswith("~")), bytes_=st.binary(max_size=3))
@example(text="x", bytes_=b"\xff\xfe")
def test_a_typed_path_or_name_is_what_was_typed_and_comes_back_from_the_runs_file(
    text: str, bytes_: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also from `with_values`; and what a checkpoint and MLflow are told is Unicode."""
    path = text + os.fsdecode(bytes_.replace(b"\0", b""))
    words = [f"run.path={path}", f"data.path={path}"]
    words += [f"tracking.experiment={text}", f"tracking.run_name={text}"]
    settings = Settings.load(None, words)
    paths, names = (settings.run.path, settings.data.path), settings.tracking
    assert paths == (Path(path), Path(path))
    assert (names.experiment, names.run_name) == (text, text)
    file = tmp_path_factory.mktemp("settings") / "settings.yaml"
    file.write_text(settings.to_yaml())
    assert Settings.load(file) == settings
    assert settings.with_values(**{"train.steps": 20_000}) == settings
    assert json.loads(json.dumps(settings.to_dict()).encode()) == settings.to_dict()
    "".join(map(str, settings.flat().values())).encode("utf-8")


@pytest.mark.parametrize(
    "written",
    [
        *("2024", "0123", "1.10", "12:30:45", "1e3", "0x10", "1_000", "2024-01-01", ".inf", "yes"),
        *("no", "on", "true", "auto", "None", "a b", "50%", "a?b", "${x}", "a#b", "é", "<<", "="),
        *("'null'", "'~'", "' x '", "'#'", "'[x]'", '"a b"', "'a: b'"),
    ],
)
def test_a_path_or_name_in_a_file_is_the_text_that_is_written(tmp_path: Path, written: str) -> None:
    file, text = tmp_path / "settings.yaml", written.strip("'\"")
    lines = ["tracking:", f"  run_name: {written}", "data:", f"  path: {written}"]
    file.write_text("\n".join(lines), "utf-8")
    settings = Settings.load(file)
    assert settings.tracking.run_name == text
    assert settings.data.path == (Path.home() if text == "~" else Path(text))


@pytest.mark.parametrize("where", ["word", "file"])
def test_a_leading_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """And nothing else is; what was expanded once is not expanded again."""
    monkeypatch.setenv("HOME", "/some/~home")

    def read(text: str) -> Path:
        if where == "word":
            return Settings.load(None, [f"run.path={text}"]).run.path
        (tmp_path / "in.yaml").write_text(f"run:\n  path: {text}\n")
        return Settings.load(tmp_path / "in.yaml").run.path

    assert read("~") == Path("/some/~home")
    assert read("~/runs/x") == Path("/some/~home/runs/x")
    assert read("a/~/b") == Path("a/~/b")
    with pytest.raises(UserError, match=r"no such home folder; write \./~nobody_here/x"):
        read("~nobody_here/x")
    for advised in ("./~nobody_here/x", "./~", "./~/x"):
        settings = Settings.load(None, [f"run.path={advised}"])
        assert str(settings.run.path) == advised.removeprefix("./")
        (tmp_path / "out.yaml").write_text(settings.to_yaml())
        assert Settings.load(tmp_path / "out.yaml") == settings
        assert settings.with_values(**{"log.every": 3}).run.path == settings.run.path


def test_what_a_run_saved_is_not_judged_as_typed() -> None:
    """A folder "~x" of an earlier version still continues."""
    saved = Settings().to_dict()
    saved["run"]["path"], saved["tracking"]["experiment"] = "~nobody_here/x", ""
    assert Settings.build(saved).run.path == Path("~nobody_here/x")


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


@pytest.mark.parametrize("null", ["null", "~", "", "Null"])
def test_null_in_a_file_is_no_run_name_and_no_path(tmp_path: Path, null: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"tracking:\n  run_name: {null}\n")
    assert Settings.load(file).tracking.run_name is None
    file.write_text(f"tracking:\n  experiment: {null}\n")
    with pytest.raises(UserError, match=f"line 2: setting tracking.experiment={null} has no value"):
        Settings.load(file)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("0100", 100), ("007", 7), ("+8", 8), ("1_000", 1000), ("1e3", 1000), ("0x10", 16)),
        *(("8.0", 8), ("'8'", 8), ("8 # eight", 8), ("0b11", 3)),
        *((text, None) for text in ("1:30", "010:30", "yes", "true", "8.5", "", "null", "0x")),
        *((text, None) for text in ("${log.every}", "[8]", "{a: 8}", "!!int 8", "2024-01-01")),
    ],
)
def test_a_number_is_what_people_write_or_one_line(
    tmp_path: Path, text: str, number: int | None
) -> None:
    """From a word and from a file: never another number."""
    (tmp_path / "settings.yaml").write_text(f"train:\n  steps: {text}\n")
    for read in (
        lambda: Settings.load(None, [f"train.steps={text}"]),
        lambda: Settings.load(tmp_path / "settings.yaml"),
    ):
        if number is not None:
            assert read().train.steps == number
        else:
            with pytest.raises(UserError, match=r"train\.steps"):
                read()


@pytest.mark.parametrize("null", ["", "null", "~", "# none"])
@pytest.mark.parametrize(
    "name", ["train.steps", "train.lanes", "log.every", "optimizer.lr", "tracking.enabled"]
)
def test_a_setting_without_a_value_is_named_as_it_was_typed(name: str, null: str) -> None:
    with pytest.raises(UserError, match=rf"^setting {name}={null} has no value: give one"):
        Settings.load(None, [f"{name}={null}"])


@pytest.mark.parametrize(
    ("text", "number"), [(".5", 0.5), ("1e-4", 1e-4), ("1E-4", 1e-4), ("5.", 5.0), ("+.5", 0.5)]
)
def test_a_fraction_is_what_people_write(text: str, number: float) -> None:
    assert Settings.load(None, [f"optimizer.lr={text}"]).optimizer.lr == number


@hypothesis.settings(deadline=None)
@given(steps=st.integers(1, 2**40), rate=st.floats(1e-300, 1e300), zeros=st.integers(0, 5))
def test_numbers_are_the_same_however_they_are_written(steps: int, rate: float, zeros: int) -> None:
    for written in (str(steps), "0" * zeros + str(steps), f"{steps:_}", f"+{steps}", hex(steps)):
        assert Settings.load(None, [f"train.steps={written}"]).train.steps == steps
    for written in (repr(rate), f"{rate:.20e}", f"+{rate!r}"):
        assert Settings.load(None, [f"optimizer.lr={written}"]).optimizer.lr == rate


@pytest.mark.parametrize(
    ("text", "truth"),
    [("true", True), ("Yes", True), ("on", True), ("1", True), ("false", False), ("off", False)],
)
def test_yes_and_no_are_said_in_many_ways(text: str, truth: bool) -> None:
    settings = Settings.load(None, [f"train.compile={text}", f"tracking.enabled={text}"])
    assert (settings.train.compile, settings.tracking.enabled) == (truth, truth)


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("train:\n  steps: 3\n  seed: x\n", 3, "setting train.seed='x' should be a valid integer"),
        ("train:\n  steps: 3\n\n  stpes: 4\n", 4, "unknown setting train.stpes; did you mean"),
        ("log:\n  every: 3\ntrian:\n  steps: 4\n", 3, "unknown setting trian; did you mean train"),
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


def test_a_section_with_nothing_but_comments_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("train:\n  # steps: 3\nlog:\n  every: 7\n")
    settings = Settings.load(tmp_path / "few.yaml")
    assert settings == Settings().with_values(**{"log.every": 7})


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


@pytest.mark.parametrize("text", ["runs/[x]", "[/x]", "[bold]a", "a\\[b]", ":smile:"])
def test_the_summary_shows_paths_and_names_as_they_were_typed(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.load(
        None, ["model.d_model=16", "train.lanes=1", f"run.path={text}", f"tracking.run_name={text}"]
    )
    print_tables(settings, 1)
    assert capsys.readouterr().out.count(f" {text} ") == 2
