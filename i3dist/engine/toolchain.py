"""Imports and caches of libraries: what to leave out, when to import, and where to write."""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

from i3dist.aside import aside

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")  # 1,400 modules: seconds
MOST_COMPILE_WORKERS = 32  # torch's own limit
TURN_SECONDS = 0.0005  # of a thread, while another wants the interpreter; by default 5 ms


@contextmanager
def absent(module: str) -> Iterator[None]:
    """Inside, importing a module fails as if it were not installed.

    DeepSpeed imports modules that cost each rank seconds and that training does not use.
    """
    there = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        if there is not None:
            sys.modules[module] = there


def import_aside(*modules: str) -> Callable[[], None]:
    """Import modules in a thread, while the caller waits for files or fills tensors.

    Threads take shorter turns meanwhile: the caller wants one after each of its many small calls.

    Returns:
        What waits until they are imported, and raises what went wrong. Until then the caller must
        import none of them, nor what imports them: Python resolves a deadlock of imports by handing
        out an incomplete module.
    """

    def import_all() -> None:
        before = sys.getswitchinterval()
        sys.setswitchinterval(TURN_SECONDS)
        try:
            for module in modules:
                importlib.import_module(module)
        finally:
            sys.setswitchinterval(before)

    return aside(import_all, "imports")


@contextmanager
def variables(**values: str | None) -> Iterator[None]:
    """Inside, environment variables have these values; None unsets them."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def writable_caches(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give Triton a folder for compiled kernels even if the home folder cannot be written.

    The folder is this process's own: in one with a known name others could place their kernels.
    """
    if environ.get("TRITON_CACHE_DIR"):
        return
    home = environ.get("TRITON_HOME") or environ.get("HOME") or os.path.expanduser("~")
    cache = Path(home, ".triton", "cache")
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):
        environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")


def set_up_compiler(cores: int) -> None:
    """Set torch's compiler up for a start, before it is imported; what the user chose stands.

    Args:
        cores: of this rank.
    """
    chosen = {
        # By default every rank of a host starts as many as the host has cores, up to 32.
        "TORCHINDUCTOR_COMPILE_THREADS": max(1, min(cores, MOST_COMPILE_WORKERS)),
        # Collect no garbage after each graph: it would look at all that `garbage` leaves alone.
        "TORCH_DYNAMO_RUN_GC_AFTER_COMPILE": 0,
    }
    for name, value in chosen.items():
        os.environ.setdefault(name, str(value))
