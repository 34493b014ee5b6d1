"""docs/using.md: its examples are run as they stand there, and its commands are legal."""

import doctest
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import i3dist
from data_prep import shard
from i3dist.config import Settings
from i3dist.programs import evaluate, generate, train
from i3dist.programs.main import COMMANDS
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "using.md").read_text("utf-8")
TYPED = [
    shlex.split(command)
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
]


def test_python_does_what_the_page_says(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(PAGE, {}, "using.md", "docs/using.md", 0)
    assert len(test.examples) > 15
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=said.append, clear_globs=False)
    assert runner.failures == 0, "".join(said)
    assert isinstance(test.globs["model"], i3dist.LanguageModel)
    assert len(test.globs["texts"]) == 2 and all(test.globs["texts"])
    assert test.globs["one"] != test.globs["other"]


@pytest.mark.parametrize("words", TYPED, ids=lambda words: " ".join(words[:3]))
def test_commands_are_legal(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, command, *rest = words
    assert program == "i3dist"
    monkeypatch.setattr(sys, "argv", [f"i3dist {command}", *rest])
    if command == "shard":
        shard.parse(rest)
    elif command == "train":
        arguments = train.parse_arguments()
        Settings.load(arguments.config, arguments.overrides)
    else:
        {"evaluate": evaluate, "generate": generate}[command].parse_arguments()


def test_the_table_has_every_command_and_its_file() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `i3dist ")]
    found = {
        name: file
        for names, files, _ in rows
        for name, file in zip(
            re.findall(r"`i3dist ([\w-]+)`", names),
            re.findall(r"`([\w/]+\.py)`", files),
            strict=True,
        )
    }
    assert found == {name: command.file for name, command in COMMANDS.items()}
