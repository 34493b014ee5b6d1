"""The folder that a run writes to, whatever leads to it."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.training.run_folder import lay_out
from i3dist.training.startup import Start

CORPUS = cast("Corpus", SimpleNamespace(tokenizer=SimpleNamespace(data=b"{}")))


def start_in(path: Path) -> None:
    lay_out(Start(Settings().with_values(**{"run.path": path})), CORPUS)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_followed_also_when_a_run_starts_over(
    tmp_path: Path, there: bool
) -> None:
    """The earlier run is set aside beside the folder itself; the link leads to the new one."""
    disk, link = tmp_path / "disk" / "the run", tmp_path / "link"
    if there:
        disk.mkdir(parents=True)
    link.symlink_to(disk)
    start_in(link)
    (disk / "metrics.jsonl").write_text("old")
    start_in(link)
    assert link.is_symlink() and link.resolve() == disk
    assert {path.name for path in disk.iterdir()} == {".lock", "settings.yaml", "tokenizer.json"}
    assert (tmp_path / "disk" / "the run.1" / "metrics.jsonl").read_text() == "old"


@pytest.mark.parametrize("name", ["a b", "0123", "#1", "50%41", "[x]", "${x}", "~", "é", "a\udcff"])
def test_a_run_lies_where_its_path_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = f"./{name}"
    lay_out(Start(Settings.load(None, [f"run.path={typed}"])), CORPUS)
    (folder,) = tmp_path.iterdir()
    assert folder.name == name
    assert Settings.load(folder / "settings.yaml").run.path == Path(name)
