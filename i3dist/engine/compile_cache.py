"""Compiled code that travels with a run, so that a job on another host need not compile again.

torch's compiler and Triton keep what they compiled in a folder of the host. After the first step
rank 0 packs that folder into one archive beside the run; the next job unpacks it on each of its
hosts before it compiles, unless that host has made or unpacked it before. Both compilers check by
themselves whether an entry fits.
"""

import gzip
import hashlib
import importlib.metadata
import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import suppress
from pathlib import Path

import torch

from i3dist import model, ops, optim
from i3dist.aside import aside
from i3dist.cli.extend import LOADED
from i3dist.config import Settings
from i3dist.distributed import collectives, devices
from i3dist.distributed.job import Job, host_name
from i3dist.errors import warned
from i3dist.files import PARTIAL, regular, write_whole, written_aside

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
# Lets torch also keep what became of graphs with a `torch.autograd.Function`, by its name alone: in
# a folder whose name has a hash of our code they are found as long as they fit.
KEEP_GRAPHS = "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"
CODE = (model, ops, optim)  # all that is compiled
# Triton writes absolute paths into files of this name; in an archive they begin with ROOT.
PATHS, ROOT = "__grp__", b"/i3dist-compiled"
# Folders that nobody chose: torch's own, which it writes into the variable, `writable_caches`'.
NOT_CHOSEN = ("torchinductor_", "triton-")
UNFINISHED = ("tmp.", ".tmp", "lock", PARTIAL)  # in names of files that are no entries
NOTE = "archive.txt"  # which archive the folder has all of, and its entries


class CompileCache:
    """The folder of this host in which compilers keep what they made, and its archive."""

    def __init__(self, archive: Path, folder: Path):
        """Neither need exist."""
        self.archive, self.folder = archive, folder
        self.functions = folder / "functions"  # of `i3dist.ops.compiled`
        self._unpacked: set[Path] = set()
        self.wait: Callable[[], None] = lambda: None
        """Until `save` is done."""

    def entries(self) -> set[Path]:
        """Files of the folder, relative to it."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        kept = (path for path in found if not any(part in path.name for part in UNFINISHED))
        return {path.relative_to(self.folder) for path in kept} - {Path(NOTE)}

    def unpack(self) -> None:
        """Add what the archive holds to the folder, unless that was done; what is there stays.

        Raises:
            Exception: of many kinds, if it is damaged; then nothing was added.
        """
        identity = _identity(self.archive)
        if (noted := self._noted(identity)) is not None:
            self._unpacked = noted
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        here = self.entries()
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as name:
            with gzip.open(regular(self.archive)) as content:
                with tarfile.open(fileobj=content) as archive:
                    members = archive.getmembers()
                    missing = [one for one in members if Path(one.name) not in here]
                    archive.extractall(name, missing, filter="data")
                while content.read(2**20):  # up to the checksum at the end
                    pass
            for path in CompileCache(self.archive, Path(name)).entries():
                made = Path(name, path)
                if path.name.startswith(PATHS):
                    made.write_bytes(made.read_bytes().replace(ROOT, bytes(self.folder)))
                target = self.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                made.replace(target)
        self._note(identity, (Path(one.name) for one in members))

    def pack(self) -> None:
        """Write the archive, unless it has every entry of the folder already."""
        entries = self.entries()
        if entries <= self._unpacked and self.archive.exists():
            return
        self.archive.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(self.archive) as partial:
            with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
                for path in sorted(entries):
                    content = (self.folder / path).read_bytes()
                    if path.name.startswith(PATHS):
                        content = content.replace(bytes(self.folder), ROOT)
                    member = tarfile.TarInfo(str(path))
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
            identity = _identity(partial)
        self._note(identity, entries)

    def _note(self, identity: str, names: Iterable[Path]) -> None:
        """Note that the folder has these entries, which are all of the archive."""
        self._unpacked = set(names)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [identity, *sorted(map(str, self._unpacked))]
        write_whole(self.folder / NOTE, "\n".join(lines).encode())

    def _noted(self, identity: str) -> set[Path] | None:
        """The entries of this archive, if the folder has them all; None if that is not known."""
        with suppress(OSError, UnicodeError):
            whose, *names = regular(self.folder / NOTE).read_text("utf-8").split("\n")
            return set(map(Path, names)) if whose == identity else None
        return None

    def save(self) -> None:
        """`pack` in a thread; a failure is a warning."""

        def pack() -> None:
            with warned("compile cache"):
                self.pack()

        self.wait = aside(pack, "compile cache")


def enter(
    settings: Settings, job: Job, environ: MutableMapping[str, str] = os.environ
) -> tuple[CompileCache | None, Callable[[], None]]:
    """Let compilers use a folder for code of this model, and begin to unpack into it.

    Every rank calls this, before torch's compiler is imported, and what it returns before it
    compiles.

    Returns:
        The folder, or None if the user chose folders by the compilers' own variables, or if it
        cannot be this user's alone, as others could place code in it; and what waits until it has
        what an earlier job compiled.
    """
    cache = _of_this_host(settings, job, environ)

    def unpack() -> None:
        if cache is not None and job.local_rank == 0 and cache.archive.exists():
            with warned(f"{cache.archive} cannot be used, so the model is compiled anew"):
                cache.unpack()

    unpacked = aside(unpack, "compile cache")

    def wait() -> None:
        unpacked()
        collectives.barrier()  # also where this host has no folder, because others wait in it

    return cache, wait


def _identity(archive: Path) -> str:
    status = archive.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _of_this_host(
    settings: Settings, job: Job, environ: MutableMapping[str, str]
) -> CompileCache | None:
    """The folder, named in `environ`, and its archive; see `enter`."""
    named = [Path(environ[name]).name for name in VARIABLES if environ.get(name)]
    if not all(name.startswith(NOT_CHOSEN) for name in named):
        return None
    own = Path(tempfile.gettempdir(), f"i3dist-compiled-{os.getuid()}")
    if not is_private(own):
        if job.local_rank == 0:
            where = f"{host_name()}: {own}"
            warning = f"warning: compiled code is not kept: {where} must be a folder of yours alone"
            print(warning, flush=True)
        return None
    key = key_of(settings)
    chosen = settings.train.compile_cache
    place = settings.run.path if chosen == "auto" else chosen
    cache = CompileCache(place / f"compiled-{key}.tar.gz", own / key)
    environ.update({name: str(cache.folder / part) for name, part in VARIABLES.items()})
    environ.setdefault(KEEP_GRAPHS, "1")
    return cache


def is_private(folder: Path) -> bool:
    """Whether a folder, made if it is missing, can be written by this user and nobody else."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    is_folder = stat.S_ISDIR(status.st_mode)
    return is_folder and status.st_uid == os.getuid() and not status.st_mode & 0o022


def key_of(settings: Settings) -> str:
    """Hash of the model, our code, extensions, torch's version and the kind of CPU that a job runs
    on: code of others is not found.

    To torch an operator is its name, and a function that is kept whole is not read again. Nor does
    torch ask which CPU code was made for: vectors of another length give other results.
    """
    names = [settings.model.model_dump_json(), f"{settings.train.window_chunks}"]
    names.append(importlib.metadata.version("torch"))
    if not devices.uses_cuda():
        names.append(torch.backends.cpu.get_cpu_capability())
    ours = (path for package in CODE for path in sorted(Path(*package.__path__).rglob("*.py")))
    sources = (*ours, *LOADED)
    parts = [name.encode() for name in names] + [path.read_bytes() for path in sources]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]
