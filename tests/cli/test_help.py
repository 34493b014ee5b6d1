"""--help of every program: 80 columns, and nothing left out. About 8 s."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from i3dist.cli.settings_text import all_settings
from i3dist.config import Settings
from tests.conftest import ROOT, environment, program

PROGRAMS = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").glob("*.py"))
OTHERS = (
    *(f"data_prep/{name}.py" for name in ("shard", "verify", "show", "report")),
    "benchmarks/books.py",
    "benchmarks/multi_gpu.py",
    "benchmarks/verifying.py",
)
# Prints --help of several files, in forks that have imported torch.
FORKS = """
import os, runpy, sys, torch
for path in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv, sys.path[0] = [path, "--help"], os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")
    os.wait()
"""


def wrapped(text: str) -> bool:
    return text.startswith("usage: ") and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_help_of_a_program_fits_80_columns_and_explains_every_option(path: Path) -> None:
    result = program(path, "--help")
    assert result.returncode == 0, result.stderr
    assert wrapped(result.stdout)
    for line, after in itertools.pairwise(result.stdout.splitlines()):
        if line.startswith("  -"):
            assert re.search(r"\S {2,}\S", line) or after.startswith(" " * 20), line


def test_help_of_shard_and_benchmarks_fits_80_columns() -> None:
    words = [sys.executable, "-c", FORKS, *OTHERS]
    result = subprocess.run(
        words, cwd=ROOT, env=environment() | {"COLUMNS": "200"}, capture_output=True, text=True
    )
    texts = re.split("^(?=usage: )", result.stdout, flags=re.MULTILINE)[1:]
    assert len(texts) == len(OTHERS) and all(map(wrapped, texts)), result.stderr


def test_help_of_train_has_every_setting_with_its_default_and_all_of_its_description() -> None:
    text = program("launch/train.py", "--help").stdout
    defaults, flowing = Settings().flat(), " ".join(text.split())
    for name, field in all_settings(Settings).items():
        assert f"\n  {name}={defaults[name]}\n" in text
        assert field.description and " ".join(field.description.split()) in flowing
