"""--extend FILE.py: a user's file is imported first, and what is wrong with it is one line."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from i3dist.cli import extend
from i3dist.cli.program import ArgumentParser
from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.optim.schedules import SCHEDULES
from i3dist.registry import Registry
from tests.conftest import error_line, program

MINE = """
from i3dist.optim.schedules import SCHEDULES

@SCHEDULES.register("mine")
def mine(at):
    return at.end
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports and registers is gone afterwards."""
    known = dict(SCHEDULES)
    monkeypatch.setattr(extend, "LOADED", [])
    yield
    SCHEDULES.clear()
    SCHEDULES.update(known)


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def parser() -> ArgumentParser:
    made = ArgumentParser()
    extend.add_extend_option(made)
    made.add_argument("words", nargs="*")
    return made


def test_files_are_imported_once_each_and_before_settings_are_read(tmp_path: Path) -> None:
    count = "\nimport pathlib\nopen(pathlib.Path(__file__).with_suffix('.count'), 'a').write('x')\n"
    files = [write(tmp_path, MINE + count), write(tmp_path, count, "other.py")]
    words = ["--extend", files[0], "a", "--extend", files[1], "b", "--extend", files[0]]
    assert parser().parse_intermixed_args(list(map(str, words))).words == ["a", "b"]
    assert [file.with_suffix(".count").read_text() for file in files] == ["x", "x"]
    settings = Settings.load(None, ["optimizer.schedule=mine", "optimizer.decay_steps=200"])
    assert settings.optimizer.lr_at(150) == 4e-4 * 0.1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\nraise ValueError('odd\\nand long')", ", line 2: ValueError: odd$"),
        ("import no_such_module", ", line 1: ModuleNotFoundError: No module named"),
        ("def f():\n    g()\n\nf()", ", line 2: NameError: name 'g'"),
        ("x = (", ": SyntaxError: .*line 1"),
        ("import sys\nsys.exit(0)", ", line 2: SystemExit: 0$"),
        (MINE.replace("mine", "cosine"), ", line 4: there already is a schedule 'cosine': choose"),
        ("x = '\0'", ": (SyntaxError|ValueError): source code .*null bytes"),
    ],
)
def test_an_error_in_the_file_is_one_line_that_names_its_place(
    tmp_path: Path, text: str, says: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UserError, match=rf"^--extend {file}{says}") as error:
        parser().parse_args(["--extend", str(file)])
    assert "\n" not in str(error.value)


def test_a_file_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    for name in ("nowhere.py", "nowhere"):
        with pytest.raises(UserError, match=rf"^--extend {tmp_path / name} does not exist"):
            extend.load_extension(tmp_path / name)


@pytest.mark.parametrize("name", ["folder.py", "text.txt"])
def test_what_is_no_python_file_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.py").mkdir()
    write(tmp_path, MINE, "text.txt")
    with pytest.raises(UserError, match=rf"{name} is no Python file: name one that ends in .py"):
        extend.load_extension(tmp_path / name)


@pytest.mark.parametrize(
    "words",
    [
        ["launch/train.py"],
        ["launch/evaluate.py", "--checkpoint", "run", "--data", "data"],
        ["launch/generate.py", "--checkpoint", "run"],
        ["launch/ledger.py", "run"],
        ["data_prep/shard.py"],
    ],
    ids=lambda words: words[0],
)
def test_every_program_takes_it_and_ends_in_one_line(tmp_path: Path, words: list[str]) -> None:
    line = error_line(program(*words, "--extend", tmp_path / "nowhere.py"))
    assert "nowhere.py does not exist" in line


def test_a_registry_names_what_there_is() -> None:
    registry: Registry[int] = Registry("layer kind")
    registry.register("b")(2)
    registry.register("a")(1)
    assert (registry.of("a"), registry.checked("b")) == (1, "b")
    wanted = "unknown layer kind 'c': use a, b, or one of your own with --extend FILE.py"
    with pytest.raises(UserError, match=wanted):
        registry.of("c")
    for name in ("", "A", "1a", "a b", "a,b", "a/b", "ä", "a\n"):
        with pytest.raises(UserError, match=re.escape(f"layer kind {name!r} needs a name of")):
            registry.register(name)(3)
    registry.register("a-2_b")(3)
    with pytest.raises(UserError, match="there already is a layer kind 'a'"):
        registry.register("a")(3)
