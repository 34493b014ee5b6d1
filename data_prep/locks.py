"""Locks that end with the process that holds them.

They are `flock`s. On NFS one of a folder holds on one host only, and one of a file on all hosts.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from i3dist.errors import UserError


def lock(handle: int, folder: Path, busy: str, shared: bool = False) -> None:
    """Lock an open file or folder that lies in `folder`.

    Raises:
        UserError: `busy`, if another process holds it, or the file system has no locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(busy) from None
    except OSError as error:
        raise UserError(
            f"{folder} lies on a file system without locks ({error.strerror}): choose an "
            "--out on a local disk, and move the folder when it is complete; tasks need one that "
            "has them, such as NFS, or Lustre mounted with -o flock"
        ) from None


@contextmanager
def locked_file(path: Path, busy: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file, which is made for it, and removed by the last one that holds it."""
    handle = _open_locked(path, busy, shared)
    try:
        yield
    finally:
        with suppress(OSError):  # others hold it too, or all around it is gone
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        os.close(handle)


def _open_locked(path: Path, busy: str, shared: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(handle, path.parent, busy, shared)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(handle)):
                    return handle  # otherwise the one that held it has removed it meanwhile
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
