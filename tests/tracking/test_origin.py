import re
import subprocess

from i3dist.tracking.origin import git_commit


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
