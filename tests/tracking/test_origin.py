import json
import re
import subprocess
import sys

import torch

from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.tracking.origin import describe, git_commit
from tests.known import MODEL, documents, make


def test_the_origin_of_a_run_names_its_code_versions_and_data(tmp_path):
    known = make(tmp_path / "data", documents(0, 9), documents(1, 9))
    changes = {"train.steps": 1234, "data.path": str(known.folder), "run.path": "runs/a\udcff"}
    settings = Settings().with_values(**MODEL | changes)
    corpus = Corpus.open(known.folder, settings.model)
    origin = describe(settings, corpus, 5_678_901, 4)
    tags = origin.tags
    note = tags["mlflow.note.content"]
    for part in ("5,678,901 parameters", "1,234 steps", "4 ranks", "from known", "`runs/a?`"):
        assert part in note
    assert (tags["parameters"], tags["mlflow.source.name"]) == ("5678901", sys.argv[0])
    assert tags["mlflow.source.git.commit"] == git_commit().removesuffix("+dirty")
    assert (tags["version.torch"], tags["version.cuda"]) == (
        torch.__version__,
        torch.version.cuda or "none",
    )
    assert {f"version.{name}" for name in ("python", "i3dist", "deepspeed")} < set(tags)
    assert (tags["device"], tags["ranks"]) == ("CPU", "4")
    assert tags["data_tokens"] == str(corpus.train.manifest.tokens)
    assert origin.facts.items() < tags.items() and "mlflow.source.name" not in origin.facts
    assert tags["git_commit"] == git_commit() and tags["data_source"] == "known"
    assert tags["data_fingerprint"] == corpus.fingerprint and tags["data_format"] == "text"
    assert "init_from" not in tags
    begun = describe(settings, corpus, 5_678_901, 4, tmp_path / "base")
    assert begun.tags == tags | {"init_from": str(tmp_path / "base")}
    data = origin.dataset
    assert data["source"] == str(known.folder) and corpus.fingerprint.startswith(data["digest"])
    assert json.loads(data["profile"])["tokens"] == corpus.train.manifest.tokens


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_git_commit_names_the_commit_and_what_was_changed(tmp_path, monkeypatch):
    file = tmp_path / "module.py"
    file.write_text("1")
    assert git_commit(file) == "unknown"
    git(tmp_path, "init")
    assert git_commit(file) == "unknown"
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-m", "one")
    clean = git_commit(file)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    other = tmp_path / "other.py"
    other.write_text("2")
    assert git_commit(file) == f"{clean}+dirty"
    assert git_commit(other) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert git_commit(file) == "unknown"
