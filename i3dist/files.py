"""Writing files so that a reader, or a power cut, finds the old one or the new one, whole."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Make sure that what was written to a file or folder survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file aside, sync it, and rename it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    sync(partial)
    partial.replace(path)
