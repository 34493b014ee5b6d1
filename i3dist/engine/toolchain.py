"""What libraries bring along that is of no use here, and what they need of a host."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path


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


@contextmanager
def variables(**values: str | None) -> Iterator[None]:
    """Meanwhile environment variables have these values; None: they are not set."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def writable_caches(environ: MutableMapping[str, str] = os.environ) -> None:
    """See that Triton can keep the kernels that it compiles, also where no home can be written.

    Then they go to a temporary folder of this process: one that others know could hold theirs.
    """
    if environ.get("TRITON_CACHE_DIR"):
        return
    home = environ.get("TRITON_HOME") or environ.get("HOME") or os.path.expanduser("~")
    cache = Path(home, ".triton", "cache")
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):
        environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
