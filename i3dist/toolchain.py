"""What DeepSpeed needs, brings along and leaves behind on a host.

On CPU it builds an operator for shared memory.
"""

import fcntl
import importlib.util
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from torch.utils import cpp_extension

from i3dist.dist import Job, barrier, uses_cuda
from i3dist.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
# Ranks map each other's shared memory within a second; later its name serves nobody.
MAPPED_SECONDS = 60


@contextmanager
def absent(module: str) -> Iterator[None]:
    """Meanwhile an import of a module fails, as where it is not installed.

    DeepSpeed (0.19.8) imports for its own uses what costs each rank seconds and is of no use here.
    """
    there = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        if there is not None:
            sys.modules[module] = there


def require_compiler(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make sure that DeepSpeed can load its shared-memory operator; `UserError` if not.

    On CPU DeepSpeed loads that operator through ninja whenever it starts, and compiles it the
    first time. A `ninja` beside the running interpreter is put on PATH.
    """
    if uses_cuda() or _operator_installed():
        return
    path = environ.get("PATH", os.defpath)
    beside = Path(sys.executable).parent
    if shutil.which("ninja", path=str(beside)):
        # First on PATH: two versions of ninja would each build the other's work anew.
        environ["PATH"] = f"{beside}{os.pathsep}{path}"
    elif shutil.which("ninja", path=path) is None:
        raise UserError("ninja is not on PATH, and DeepSpeed needs it: pip install ninja")
    if any(_build_folder().glob("deepspeed_shm_comm*.so")):
        return
    # The same choice of compiler as torch.utils.cpp_extension makes.
    compiler = environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0], path=path) is None:
        raise UserError(
            f"the C++ compiler {compiler!r} is not on PATH, and DeepSpeed needs one on CPU: "
            "install it (Debian: apt-get install g++) or name another in CXX"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise UserError(
            f"{header} is missing, and DeepSpeed compiles against it on CPU: install Python's "
            "headers (Debian: apt-get install python3-dev)"
        )


@contextmanager
def operator_alone() -> Iterator[None]:
    """Meanwhile no other run's process on CPU loads or builds DeepSpeed's operator.

    Torch's own lock is a file that a killed process leaves behind, and for which every later one
    then waits for ever. This one ends with its process, so that whoever has it can take such a file
    away.
    """
    if _operator_installed():
        yield
        return
    build = _build_folder()
    with (build / "i3dist.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        if not _is_open(build / "lock"):
            (build / "lock").unlink(missing_ok=True)
        yield


def unlink_shared_memory(job: Job) -> None:
    """Take the name from this rank's shared memory, which then ends with the last process.

    Ranks on CPUs sum through files in /dev/shm, 66 MiB each, that DeepSpeed (0.19.8) never removes.
    Those of runs that were killed before they came here go too.
    """
    barrier()  # until every rank has mapped all of them
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_"
    where = "_".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    SHARED_MEMORY.joinpath(f"{prefix}{where}_{job.rank}").unlink(missing_ok=True)
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        with suppress(FileNotFoundError):  # another rank may have been faster
            if time.time() - path.stat().st_mtime > MAPPED_SECONDS:
                path.unlink()


def _build_folder() -> Path:
    """Where torch builds the operator; it makes the folder."""
    return Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False))


def _is_open(path: Path) -> bool:
    """Whether a process of this host that we may look into has a file open."""
    if not path.exists():
        return False
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(Path(file.path) == path.resolve() for file in process.open_files()):
                return True
    return False


def _operator_installed() -> bool:
    """Whether DeepSpeed was installed with its shared-memory operator built beforehand."""
    # find_spec of a top-level package does not import it.
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).parent / "ops" / "comm"
    return any(folder.glob("deepspeed_shm_comm_op*.so"))
