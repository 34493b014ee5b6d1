"""What a path, a name, a number or a yes means, on the command line and in a file."""

import json
import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from i3dist.cli.settings_text import all_settings, literal_settings
from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.training.summary import print_tables


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
        "data.cache",
        "train.compile_cache",
        "model.compressor",
        "optimizer.kind",
        "train.init_from",
        "tracking.experiment",
        "tracking.run_name",
        "tracking.registered_model",
        "tracking.notify",
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


@pytest.mark.parametrize("text", ["runs/[x]", "[/x]", "[bold]a", "a\\[b]", ":smile:"])
def test_the_summary_shows_paths_and_names_as_they_were_typed(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.load(
        None, ["model.d_model=16", "train.lanes=1", f"run.path={text}", f"tracking.run_name={text}"]
    )
    print_tables(settings, 1)
    assert capsys.readouterr().out.count(f" {text} ") == 2
