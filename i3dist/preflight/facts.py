"""What a rank finds out about itself, its host and its input. `checks` judges the facts of all."""

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import i3dist
from i3dist.cli.extend import LOADED
from i3dist.preflight.gpu import GpuFacts
from i3dist.tracking.origin import find_versions


@dataclass(frozen=True)
class Given:
    """What a rank makes of its command line and of the files that it sees."""

    folder: Path
    """The run's."""
    settings: Mapping[str, str]
    """As typed, by name."""
    engine_file: Path
    """The engine's."""
    engine: str = ""
    """What that file says, as JSON."""
    data: str = ""
    """Fingerprint of the data."""
    step: int = 0
    """Of the checkpoint that the run continues from; 0 for a new run."""
    checkpoint_bytes: float = 0.0
    """Size of a checkpoint."""
    checkpoints_to_come: int = 2
    """Checkpoints that will be written before any is removed."""
    fault: str | None = None
    """The error that ended the search, if any; then engine, data and step may be unknown."""


@dataclass(frozen=True)
class Facts:
    """What one rank found."""

    rank: int
    host: str
    pid: int
    given: Given
    sources: str = ""
    """SHA-256 of the program's own Python files, and of those that --extend names."""
    commit: str = ""
    """Of the repository that the program lies in; "unknown" outside one."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that the program needs, by name."""
    token: str | None = None
    """What this rank read at run.path from the file that rank 0 wrote."""
    unwritable: str | None = None
    """Why this rank could not write there."""
    free: int = 2**62
    """Bytes that may be written at run.path."""
    clock: float = 0.0
    """Seconds since 1970, read by all ranks at the same moment."""
    gpu: GpuFacts | None = None
    """This rank's GPU; None on a CPU."""
    rate: float | None = None
    """Bytes/s exchanged with a rank of another host, the best of several partners; None with one
    host."""


def hash_sources() -> str:
    """SHA-256 of the program's Python files and of the extensions loaded, names included."""
    package = Path(i3dist.__file__).parent
    files = {str(path.relative_to(package)): path for path in sorted(package.rglob("*.py"))}
    files |= {path.name: path for path in LOADED}
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python, torch, CUDA, DeepSpeed, and of every package that ours requires."""
    found = find_versions()
    try:
        required = importlib.metadata.requires("i3dist") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        required = []
    for line in required:
        name = re.match(r"[\w.-]+", line)
        if name is not None and "extra ==" not in line and name[0] not in found:
            try:
                found[name[0]] = importlib.metadata.version(name[0])
            except importlib.metadata.PackageNotFoundError:
                found[name[0]] = "missing"
    return found


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may write in a folder, or in the nearest one that exists."""
    folder = Path(os.path.realpath(folder))
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
