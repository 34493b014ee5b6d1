"""docs/tour.ipynb: its cells do what they say on a small run, in Python's own words."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from i3dist.programs.main import COMMANDS
from tests.conftest import ROOT, environment, launcher

DOCS = ROOT / "docs"
CELLS = json.loads((DOCS / "tour.ipynb").read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
COMMAND = re.compile(r"^!(.*(?:(?<=\\)\n.*)*)$", re.MULTILINE)


def command(line: str) -> None:
    """Run what stands behind a `!`."""
    program, name, *words = shlex.split(line.replace("\\\n", " "))
    assert program == "i3dist"
    words += ["train.steps=6"] * (name == "train")  # the last one counts
    started = [str(ROOT / COMMANDS[name].file), *words]
    result = launcher().run(started, [environment()], timeout=300, folder=str(Path.cwd()))
    assert result.returncode == 0, result.stderr
    print(result.stdout)


def test_every_cell_does_what_it_says(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(whole, tmp_path / "runs" / "quickstart")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path / "docs")  # where Jupyter starts it
    for name in ("TERM", "TQDM_DISABLE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # a cell sets it; it is as before when the test ends
    for name in ("HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    names: dict[str, Any] = {"command": command}
    for cell in CODE:
        exec(COMMAND.sub(lambda found: f"command({found[1]!r})", cell), names)
    assert Path("runs/quickstart.html").is_file()
    assert names["difference"] < 1e-4
    assert names["after"] < names["before"] - 0.1
    assert "|python|" in capsys.readouterr().out


def test_outputs_are_there_and_small_and_tell_nothing_of_a_machine() -> None:
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert len(outputs) > len(CODE) / 2
    assert [output for output in outputs if output["output_type"] == "error"] == []
    said = json.dumps(outputs)
    assert len(said) < 20_000
    assert re.findall(r"/tmp/|/home/|/root/|image/png", said) == []


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if not (DOCS / link).is_file()] == []
