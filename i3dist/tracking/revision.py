"""Which commit of the code runs."""

import subprocess
from pathlib import Path

GIT_TIMEOUT_S = 5.0


def git_commit(file: Path = Path(__file__)) -> str:
    """The commit that tracks `file`, with "+dirty" where its working tree has changes.

    "unknown" outside a repository, without git, where git takes too long, and where the
    repository does not track the file (a package installed inside somebody else's checkout).
    Untracked files count as changes: they can be imported.
    """
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        commit = _git(file.parent, "rev-parse", "HEAD").strip()
        changed = _git(file.parent, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}+dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S
    ).stdout
