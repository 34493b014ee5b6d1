"""Imports and caches of libraries: what to leave out, and where to write."""

import os
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path


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
