"""A folder at a URL that fsspec can write to: s3, gs and others."""

import errno
import os
import posixpath
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.retries import is_final, retried, why
from i3dist.data.download import shown
from i3dist.errors import UserError
from i3dist.files import regular

Result = TypeVar("Result")

READ_ONLY = ("http", "https", "pipe", "data", "memory")
"""Protocols that cannot keep files: `memory` forgets them with the process."""


@dataclass(frozen=True)
class Store:
    """The folder. Every request that fails is sent again, with growing pauses."""

    url: str

    def __str__(self) -> str:
        """Its URL, without a password."""
        return shown(self.url)

    def check(self) -> None:
        """Refuse a URL that nobody can write to.

        Raises:
            UserError: its protocol is read-only or unknown, or needs a package.
        """
        scheme = self.url.partition(":")[0].lower()
        if scheme in READ_ONLY:
            raise UserError(
                f"--out {self}: {scheme} keeps no files; name a folder, or a URL that can be "
                "written to, such as s3://BUCKET/FOLDER"
            )
        self._open("")

    def put(self, path: Path, name: str) -> None:
        """Write a file, and see that all of its bytes are there.

        Raises:
            UserError: it cannot be written, after all tries.
        """
        size = path.stat().st_size

        def write(filesystem: Any, place: str) -> None:
            try:
                filesystem.put_file(str(path), place)
            except FileNotFoundError as error:
                if error.__cause__:  # as S3 tells of a bucket that is not there
                    raise
                filesystem.makedirs(posixpath.dirname(place), exist_ok=True)
                filesystem.put_file(str(path), place)
            filesystem.invalidate_cache()
            if (found := filesystem.info(place)["size"]) != size:
                raise OSError(f"{found:,} bytes are there instead of {size:,}")

        self._tried(write, name, "write")

    def get(self, name: str) -> bytes | None:
        """The bytes of a file; None if it is not there."""

        def read(filesystem: Any, place: str) -> bytes | None:
            try:
                _refuse_no_file(filesystem, place)
                data: bytes = filesystem.cat_file(place)
            except FileNotFoundError as error:
                if not is_final(error):
                    raise
                return None
            return data

        return self._tried(read, name, "read")

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to the disk.

        Raises:
            FileNotFoundError: it is not there.
        """

        def fetch(filesystem: Any, place: str) -> bool:
            try:
                _refuse_no_file(filesystem, place)
                filesystem.get_file(place, str(path))
                size = filesystem.info(place)["size"]
            except FileNotFoundError as error:
                if not is_final(error):
                    raise
                return False
            if size not in (None, found := path.stat().st_size):
                raise OSError(f"{found:,} bytes came instead of {size:,}")
            return True

        if not self._tried(fetch, name, "read"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The names in a folder, and the size of each file in bytes (0 for a folder)."""

        def names(filesystem: Any, place: str) -> dict[str, int]:
            filesystem.invalidate_cache()
            try:
                found = filesystem.ls(place, detail=True)
            except FileNotFoundError as error:
                if not is_final(error):
                    raise
                return {}
            paths = {info["name"].rstrip("/"): info.get("size") or 0 for info in found}
            paths.pop(place.rstrip("/"), None)  # an object that marks the folder
            return {posixpath.basename(path): size for path, size in paths.items()}

        return self._tried(names, folder, "read")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

        def remove(filesystem: Any, place: str) -> None:
            with suppress(FileNotFoundError):
                filesystem.rm_file(place)

        self._tried(remove, name, "write")

    def _tried(self, work: Callable[[Any, str], Result], name: str, doing: str) -> Result:
        """`work` with the filesystem and the path of a file, again and again if it fails."""

        def attempt() -> Result:
            filesystem, place = self._open(name)
            try:
                return work(filesystem, place)
            except Exception:
                type(filesystem).clear_instance_cache()  # its connection may be broken
                raise

        return retried(attempt, "/".join(filter(None, (str(self).rstrip("/"), name))), doing)

    def _open(self, name: str) -> tuple[Any, str]:
        """The filesystem, which each thread has its own of, and a path there."""
        from fsspec.core import url_to_fs

        try:
            filesystem, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"cannot open {self}: {why(error)}; install what it asks for, or name a folder"
            ) from None
        return filesystem, posixpath.join(root, name) if name else root


def _refuse_no_file(filesystem: Any, place: str) -> None:
    """Refuse what is no file on this host's disk, as a FIFO, which would never end."""
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(filesystem, LocalFileSystem):
        return
    try:
        regular(Path(place))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror}; remove it") from None
