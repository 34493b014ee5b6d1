"""Programs in the test's process, on a small model with random weights and data that are known."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from i3dist.checkpoint.weights import export_weights
from i3dist.config import Settings
from i3dist.model.lm import I3LM
from tests.conftest import ROOT
from tests.known import BOS, TOKENIZER, Known, documents, make
from tests.known import MODEL as TINY

MODEL = TINY | {"train.window_chunks": 2}


def load(name: str) -> ModuleType:
    """One of i3dist/programs, as a module of its own for each test."""
    path = ROOT / "i3dist" / "programs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"program_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def typed(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Make these the command line's arguments."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make(tmp_path_factory.mktemp("known") / "data", documents(0, 6), documents(1, 7))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    settings = Settings().with_values(**MODEL)
    torch.manual_seed(0)
    export_weights(folder, I3LM(settings.model, BOS), settings.train.steps)
    (folder / "settings.yaml").write_text(settings.to_yaml())
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    return folder


def cells(said: str) -> list[list[str]]:
    """Rows of a printed table, its headings first."""
    lines = said.replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
