"""A folder of fetched shards with bounded size, which all processes of a host may share.

A file's name is the SHA-256 of what is in it. All coordination is by `flock`, which the system
releases when a process ends, however it ends:

- `.lock` is held briefly, by whoever makes, renames, counts or removes a file. It holds the count
  of bytes, which is never too low: it rises before a file is made.
- An unfinished file is held while it is fetched, so each shard is fetched by one process at a time.
  It has its full size from the start. Nobody holds that of a killed process, so it is removed.
- A finished file is held, shared with other readers, while it is in use. Those are not evicted.

Nobody waits for another lock while holding `.lock`, so there is no deadlock. Every lock is released
by its name (`LOCK_UN`), not by closing its file alone: a process that is forked meanwhile has a
copy of the open file, which would keep the lock.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from i3dist.data.shard_table import Shard
from i3dist.errors import UserError
from i3dist.files import PARTIAL, make_folder, regular, regular_or_new

SUFFIX = ".shard"
LOCK = ".lock"
SPARE = 10  # an eviction leaves a tenth of the cache free, so that evictions are rare


class BusyError(Exception):
    """Another thread or process fetches the shard right now."""


@dataclass(frozen=True)
class DiskCache:
    """Shards on disk, up to `most` bytes in all."""

    folder: Path
    most: int

    def open(self, shard: Shard) -> BinaryIO | None:
        """Open a cached shard, which stays in the cache while the file is open; None without it.

        What the file holds has yet to be verified.
        """
        with self._explained():
            try:
                file = regular(self._path(shard)).open("rb")
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            if not os.fstat(file.fileno()).st_nlink:  # evicted meanwhile
                release(file)
                return None
            with suppress(OSError):
                os.utime(file.fileno())  # the time of its latest use
            return file

    def wait(self, shard: Shard) -> None:
        """Wait until nobody fetches the shard any more."""
        with (
            self._explained(),
            suppress(FileNotFoundError),
            regular(self._partial(shard)).open("rb") as file,
        ):
            fcntl.flock(file, fcntl.LOCK_SH)
            release(file)

    @contextmanager
    def room(self, shard: Shard) -> Iterator["Room | None"]:
        """Reserve the room for a shard; None if files in use leave none.

        Raises:
            BusyError: it is being fetched already; see `wait`.
            UserError: the folder cannot be written.
        """
        with self._explained():
            file = self._reserve(shard)
        if file is None:
            yield None
            return
        room = Room(self, shard, file)
        try:
            with self._explained():
                yield room
        finally:
            if not room.filled:
                with self._explained():
                    self._give_up(shard)
            release(file)

    def discard(self, shard: Shard) -> None:
        """Remove a shard, for example because the disk damaged it."""
        with self._explained(), self._counted() as count, suppress(FileNotFoundError):
            path = self._path(shard)
            size = path.stat().st_size
            path.unlink()
            count.add(-size)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}{SUFFIX}"

    def _partial(self, shard: Shard) -> Path:
        return self.folder / f".{shard.sha256}{PARTIAL}"

    def _reserve(self, shard: Shard) -> BinaryIO | None:
        """An unfinished file of the shard's size, locked."""
        with self._counted() as count:
            if self._path(shard).exists():
                raise BusyError
            path = regular_or_new(self._partial(shard))
            path.touch()
            file = path.open("r+b")
            if not _lock(file, fcntl.LOCK_EX):
                file.close()
                raise BusyError
            there = os.fstat(file.fileno()).st_size  # left by a killed process
            try:
                if not self._make_room(count, shard.size - there, path):
                    path.unlink()
                    count.add(-there)
                    release(file)
                    return None
                os.posix_fallocate(file.fileno(), 0, shard.size)
                os.ftruncate(file.fileno(), shard.size)
            except OSError:
                path.unlink()
                count.add(-shard.size)
                release(file)
                raise
        return file

    def _give_up(self, shard: Shard) -> None:
        with self._counted() as count, suppress(FileNotFoundError):
            self._partial(shard).unlink()
            count.add(-shard.size)

    def _make_room(self, count: "_Count", more: int, own: Path) -> bool:
        """Evict until `more` bytes fit, and count them; False if they cannot be made to fit."""
        if count.known and count.total + more <= self.most:
            count.add(more)
            return True
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((SUFFIX, PARTIAL)):
                at = entry.stat()
                unfinished = entry.name.endswith(PARTIAL)
                files.append((not unfinished, at.st_mtime_ns, at.st_size, entry.path))
        count.set(sum(size for _, _, size, _ in files))
        goal = self.most - more - self.most // SPARE if count.total + more > self.most else None
        # Unfinished files first: nobody completes one that is not locked.
        for finished, _, size, path in sorted(files):
            if path == str(own) or (finished and (goal is None or count.total <= goal)):
                continue
            if _remove_unless_held(path):
                count.add(-size)
        if count.total + more > self.most:
            return False
        count.add(more)
        return True

    @contextmanager
    def _counted(self) -> Iterator["_Count"]:
        """Hold `.lock`."""
        make_folder(self.folder)
        handle = os.open(regular_or_new(self.folder / LOCK), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield _Count(handle)
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a system error into a `UserError` that names the setting."""
        try:
            yield
        except OSError as error:
            more = ", or a smaller data.cache_gb" if error.errno == errno.ENOSPC else ""
            raise UserError(
                f"the folder for fetched shards, {self.folder}, cannot be used "
                f"({error.strerror}): free it, or set another data.cache{more}"
            ) from None


@dataclass
class Room:
    """Room for one shard, as a locked unfinished file."""

    cache: DiskCache
    shard: Shard
    file: BinaryIO
    filled: bool = False

    def fill(self, data: bytes) -> None:
        """Write the shard, and give the file its name."""
        os.pwrite(self.file.fileno(), data, 0)
        with self.cache._counted():
            self.cache._partial(self.shard).replace(self.cache._path(self.shard))
        self.filled = True
        fcntl.flock(self.file, fcntl.LOCK_SH)


class _Count:
    """The bytes in the folder, as the locked file `.lock` says."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        text = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
        self.known = text.isdigit()
        self.total = int(text) if self.known else 0

    def set(self, total: int) -> None:
        self.total, self.known = max(0, total), True
        os.pwrite(self._handle, f"{self.total:<31}\n".encode(), 0)

    def add(self, more: int) -> None:
        if self.known:
            self.set(self.total + more)


def release(file: BinaryIO) -> None:
    """Unlock and close a file."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _lock(file: BinaryIO, kind: int) -> bool:
    """Lock a file; False if another holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unless_held(path: str) -> bool:
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if not _lock(file, fcntl.LOCK_EX):
            return False
        os.unlink(path)
        release(file)
    return True
