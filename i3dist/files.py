"""Writing files so that a reader, or a power cut, finds the old one or the new one, whole."""

import os
import shutil
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
    """Write a file aside, sync it, rename it into place, and sync the folder.

    Where that fails (a full disk, say) the file is what it was before.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def clear_partials(folder: Path) -> None:
    """Remove what a killed process left unfinished in a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
