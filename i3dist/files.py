"""Writing files so that a reader, or a power cut, finds the old one or the new one, whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Ends the name, which begins with a dot, of whatever is not finished.
PARTIAL = ".partial"


def sync(path: Path) -> None:
    """Make sure that what was written to a file or folder survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole, or as it was before; see `written_aside`."""
    with written_aside(path) as partial:
        partial.write_bytes(data)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Another name to write a file under: in the end it is synced, renamed, and its folder synced.

    Where that fails (a full disk, say) the file is what it was before.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except Exception:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A name for a file that is UTF-8, inside the `with`, for libraries that open no other."""
    handle = os.open(path, os.O_RDONLY)
    try:
        plain = os.fsencode(path).decode("utf-8", "replace") == str(path)
        yield path if plain else Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def clear_partials(folder: Path) -> None:
    """Remove what a killed process left unfinished in a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
