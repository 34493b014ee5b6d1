"""Ways to meet a message about data, and to do what it says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep import passes
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError
from tests.data_prep import corpus as helpers

TEXTS = [f"{number} little documents, each with words of its own" for number in range(40)]


def write(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def build(source: object, out: Path, *options: object) -> None:
    """Run the tool, and see that what comes out is data."""
    helpers.build(source, out, "--vocab-size", 300, *options)  # type: ignore[arg-type]
    Manifest.load(out / "train")


def refusal(source: object, out: Path, *options: object) -> str:
    with pytest.raises(UserError) as error:
        build(source, out, *options)
    return str(error.value)


def is_followed(line: str, source: object, out: Path, *options: object) -> None:
    """`choose another --out, or delete FOLDER` (or `it`, the folder that the line begins with)."""
    advice, _, folder = line.rpartition(", or delete ")
    assert advice.endswith("choose another --out")
    assert folder in (str(out), "it") and (folder != "it" or line.startswith(f"{out} was made"))
    build(source, out.with_name("another"), *options)
    shutil.rmtree(out)
    build(source, out, *options)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts that are tokenized from now on."""
    spilled: list[int] = []

    def spill(self: Any, part: Any, number: int, real: Any = passes.Spiller.spill) -> None:
        spilled.append(number)
        real(self, part, number)

    monkeypatch.setattr(passes.Spiller, "spill", spill)
    return spilled
