"""Atomic writes: a reader, or a power cut, finds the whole old file or the whole new one.

Reads: of files only, because others may never end.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TypeVar

from i3dist.errors import UserError

AnyPath = TypeVar("AnyPath", str, Path)

# Names of unfinished files begin with a dot and end in this.
PARTIAL = ".partial"
# What a user may name to be read though it is no file: what a shell opens, as `--config <(command)`
# and `--config /dev/stdin` do, and nothing at all.
_GIVEN = re.compile(r"/dev/(stdin|null|fd/\d+)|/proc/self/fd/\d+")


def regular(path: AnyPath) -> AnyPath:
    """A path to read from, once it is known to lead to a file.

    Opening a FIFO would wait for a writer, perhaps for ever, and a device may never end.

    Raises:
        OSError: nothing is there, or something else than a file; the reason says what it is.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) or _GIVEN.fullmatch(str(path)):
        return path
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
    raise OSError(errno.EINVAL, f"it is a {kind}, not a file", str(path))


def regular_or_new(path: Path) -> Path:
    """As `regular`, but a path to which nothing leads may be used too, to make a file there."""
    with suppress(FileNotFoundError):
        regular(path)
    return path


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        OSError: it cannot be made, or something else than a folder is there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically; see `written_aside`."""
    with written_aside(path) as partial:
        partial.write_bytes(data)


def write_result(path: Path, data: bytes) -> None:
    """Write a file that a user named: atomically, but through a link, and into a device or a pipe,
    which a new file must not replace. Standard output goes on where it is.

    Raises:
        UserError: it cannot be written; an earlier file is untouched.
    """
    with _refused(path):
        if is_output(path):
            sys.stdout.flush()
            with open(1, "wb", closefd=False) as output:
                output.write(data)
        elif path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(data)
        else:
            write_whole(path, data)


def is_output(path: Path) -> bool:
    """Whether it is this process's standard output, as /dev/stdout is."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(1))


@contextmanager
def printing_beside(*paths: Path | None) -> Iterator[None]:
    """Inside the `with`, print to standard error if a result goes to standard output."""
    taken = any(path is not None and is_output(path) for path in paths)
    with redirect_stdout(sys.stderr if taken else sys.stdout):
        yield


def check_writable(path: Path, appended: bool = False) -> None:
    """Find out before long work whether its result can be written; nothing is changed.

    A pipe or a device is not opened: the reader of a pipe would find its end.

    Args:
        path: what `write_result` will write.
        appended: it will be opened and added to instead, so its own permissions count.

    Raises:
        UserError: it is a folder, or cannot be written.
    """
    with _refused(path):
        there = _there(path)
        if there and (is_output(path) or not (path.is_file() or path.is_dir())):
            return
        if there and (appended or path.is_symlink() or path.is_dir()):
            os.close(os.open(path, os.O_WRONLY))
            return
        # As `written_aside` does: under a name that no other process has.
        partial = _partial_of(_target(path))
        partial.touch(exist_ok=False)
        partial.unlink()


def _there(path: Path) -> bool:
    """As `Path.exists`, but a link that leads to itself is an error."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Inside, a file is written that a user named: what fails is a `UserError`."""
    try:
        yield
    except OSError as error:
        folder = _target(path).parent
        while folder.name == "..":  # of `sub/../file` it is `sub` that is missing
            folder = folder.parent
        lacks = isinstance(error, FileNotFoundError) and not os.path.isdir(folder)
        remedy = f"make the folder {_target(folder)}, or name another file"
        raise UserError(
            f"{path} cannot be written: {error.strerror}; "
            f"{remedy if lacks else 'name another file'}"
        ) from None


def _target(path: Path) -> Path:
    """Where a link leads, though nothing may be there; every other path as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _partial_of(path: Path) -> Path:
    """A name for an unfinished file beside it.

    At random, because processes of several hosts may write the same file and have the same id.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")


def write_first(path: Path, data: bytes) -> None:
    """Write a file atomically unless it exists: of several writers the first one counts."""
    if path.exists():
        return
    partial = _partial_of(path)
    try:
        partial.write_bytes(data)
        sync(partial)
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; afterwards sync that file, rename it, sync its folder.

    If anything fails (such as a full disk), the file stays what it was.
    """
    partial = _partial_of(path)
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
    """Yield a UTF-8 name of a file, valid inside the `with`: some libraries open no other."""
    handle = os.open(regular(path), os.O_RDONLY)
    try:
        plain = os.fsencode(path).decode("utf-8", "replace") == str(path)
        yield path if plain else Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def clear_partials(folder: Path) -> None:
    """Remove the unfinished files that a killed process left in a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
