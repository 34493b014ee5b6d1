"""What DeepSpeed needs to build its shared-memory operator on CPU, checked beforehand."""

import importlib.util
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import MutableMapping
from pathlib import Path

from torch.utils import cpp_extension

from i3dist.dist import uses_cuda
from i3dist.errors import UserError

# Building the operator takes half a minute; a lock this old has no owner.
STALE_LOCK_SECONDS = 600


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
    build = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False))
    _refuse_stale_lock(build / "lock")
    if any(build.glob("deepspeed_shm_comm*.so")):
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


def _refuse_stale_lock(lock: Path) -> None:
    """A process killed while it built leaves its lock, and every later one waits for ever."""
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return
    if age > STALE_LOCK_SECONDS:
        raise UserError(
            f"{lock} is {age / 60:.0f} minutes old, left by a run that was killed while it built "
            "DeepSpeed's operator: remove that file"
        )


def _operator_installed() -> bool:
    """Whether DeepSpeed was installed with its shared-memory operator built beforehand."""
    # find_spec of a top-level package does not import it.
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).parent / "ops" / "comm"
    return any(folder.glob("deepspeed_shm_comm_op*.so"))
