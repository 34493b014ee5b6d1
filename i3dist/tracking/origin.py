"""Where a run comes from: its code, versions and data, as MLflow shows them."""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from i3dist.checkpoint.format import is_checkpoint
from i3dist.checkpoint.weights import newest_in
from i3dist.cli.paths import Place, as_unicode
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.data.download import shown
from i3dist.data.token_types import TOKEN_TYPES
from i3dist.distributed.devices import uses_cuda
from i3dist.tracking.metrics_log import STARTS, read_lines

GIT_TIMEOUT_S = 5.0
DATA_FORMAT = "data_format"  # what documents are, in the words of data_prep/shard.py --format:
TEXT, CHAT = "text", "chat"


@dataclass(frozen=True)
class Origin:
    """Tags of a run, and the arguments of MLflow's `Dataset` that describe its data."""

    tags: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, str] | None = None

    @property
    def facts(self) -> dict[str, str]:
        """The tags that are not MLflow's own: a line of starts.jsonl."""
        return {name: text for name, text in self.tags.items() if not name.startswith("mlflow.")}


def describe(
    settings: Settings,
    corpus: Corpus,
    parameters: int,
    world_size: int,
    weights: Path | None = None,
) -> Origin:
    """What to record of a run with `parameters` parameters on `world_size` ranks.

    `weights` is the run or checkpoint whose weights it begins with, if any.
    """
    model, data = settings.model, corpus.train.manifest
    commit = git_commit()
    about = (
        f"i3 language model with {parameters:,} parameters (layers {model.layers} of "
        f"width {model.d_model}, history of "
        f"{model.history_chunks} chunks), {settings.train.steps:,} steps on {world_size} ranks.\n\n"
        f"Data: {data.tokens:,} tokens from {data.source}.\n\nFolder: `{settings.run.path}`"
    )
    versions = {f"version.{name}": text for name, text in find_versions().items()}
    tags = {
        "mlflow.note.content": about,
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit.removesuffix("+dirty"),
        "git_commit": commit,
        "parameters": str(parameters),
        "device": device_name(),
        "ranks": str(world_size),
        "data_fingerprint": corpus.fingerprint,
        "data_source": data.source,
        "data_tokens": str(data.tokens),
        DATA_FORMAT: CHAT if TOKEN_TYPES[data.dtype].has_mask else TEXT,
        **versions,
    }
    if weights is not None:
        tags["init_from"] = str(weights.resolve())
    described = {name: as_unicode(text) for name, text in tags.items()}
    return Origin(described, _dataset(settings.data.path, corpus))


def _dataset(place: Place, corpus: Corpus) -> dict[str, str]:
    """The arguments of MLflow's `Dataset` for the data at a path or URL."""
    data, source = corpus.train.manifest, shown(str(place))
    profile = {"tokens": data.tokens, "documents": data.documents, "chunks": data.chunks}
    return {
        "name": as_unicode(source.rstrip("/").rpartition("/")[2]),
        "digest": corpus.fingerprint[:16],
        "source_type": "local" if isinstance(place, Path) else "http",
        "source": as_unicode(source),
        "profile": json.dumps(profile),
    }


def data_format(trained: Path) -> str | None:
    """What the documents were that a model was trained on last: `CHAT`, `TEXT`, or None if nothing
    says it (exported models, copies of checkpoints, runs of earlier versions).

    `trained` is a run or a checkpoint, as `SavedModel.find` takes it.
    """
    path = newest_in(trained)
    run = path.resolve().parent.parent if is_checkpoint(path) else path
    starts = read_lines(run / STARTS)
    return starts[-1].get(DATA_FORMAT) if starts else None


def device_name() -> str:
    """The GPU of this rank, or "CPU"."""
    return torch.cuda.get_device_name() if uses_cuda() else "CPU"


def find_versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on, by name."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or "none"
    for package in ("i3dist", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found


def git_commit(file: Path = Path(__file__)) -> str:
    """The commit that tracks `file`, followed by "+dirty" if its working tree has changes.

    "unknown" outside a repository, without git, if git takes too long, and if the repository does
    not track the file (a package installed inside somebody else's checkout). Untracked files count
    as changes: they can be imported.
    """
    try:
        commit = _tracking_commit(file)
        changed = _git(file.parent, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}+dirty" if changed else commit


def git_head() -> str:
    """As `git_commit` of this file, without a look at the working tree, which may take seconds."""
    try:
        return _tracking_commit(Path(__file__))
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _tracking_commit(file: Path) -> str:
    _git(file.parent, "ls-files", "--error-unmatch", file.name)
    return _git(file.parent, "rev-parse", "HEAD").strip()


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S
    ).stdout
