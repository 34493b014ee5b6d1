"""Where data lie: a folder of this host, or one at a URL, whose shards are cached on disk."""

import hashlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO

from i3dist.cli.paths import Place
from i3dist.config import DataSettings
from i3dist.data.disk_cache import BusyError, DiskCache, release
from i3dist.data.download import FetchError, download, download_once, shown, tried
from i3dist.data.shard_table import Shard
from i3dist.errors import UserError
from i3dist.files import regular

FETCHERS = 4
"""Shards that a process fetches at once."""
OUTAGE_SECONDS = 160.0
"""After so long no more tries to fetch a shard begin. `TRIES` of them at a server that is silent
take 80 s, and a job waits for data for 300."""
_GIGABYTE = 10**9
_FOR_NAME = "{}"  # in a URL: where the name of a file goes, if not to its end


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL, read as a `Path` is: `folder / "train"`."""

    url: str
    cache: DiskCache
    parts: tuple[str, ...] = ()
    # By SHA-256: shards that are to be fetched ahead, and those that were. The latter are open, so
    # they stay in the cache until they are read.
    _expected: set[str] = field(default_factory=set, compare=False, repr=False)
    _held: dict[str, BinaryIO] = field(default_factory=dict, compare=False, repr=False)

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(self.url, self.cache, (*self.parts, name))

    def __str__(self) -> str:
        return shown(self.full_url)

    @property
    def parent(self) -> "RemoteFolder":
        """The folder that this one is in."""
        return RemoteFolder(self.url, self.cache, self.parts[:-1])

    @property
    def full_url(self) -> str:
        """The URL of this folder or file."""
        name = "/".join(self.parts)
        if _FOR_NAME in self.url:
            return self.url.replace(_FOR_NAME, name)
        return "/".join(filter(None, (self.url.rstrip("/"), name)))

    def read(self, shard: Shard) -> bytes:
        """The bytes of a shard, from the cache or its URL.

        They are the manifest's, unless the file at the URL is not: then what was fetched last.

        Raises:
            UserError: it cannot be fetched, or the cache cannot be written.
        """
        self._expected.discard(shard.sha256)
        begun = time.monotonic()
        while True:
            held = self._held.pop(shard.sha256, None) or self.cache.open(shard)
            if held is not None:
                data = held.read()
                release(held)
                if is_intact(data, shard):
                    return data
                self.cache.discard(shard)
            try:
                with self.cache.room(shard) as room:
                    data = self._fetch_with_patience(shard, begun)
                    if room is not None and is_intact(data, shard):
                        room.fill(data)
                    return data
            except BusyError:
                self.cache.wait(shard)

    def fetch_ahead(self, shard: Shard) -> None:
        """Fetch a shard into the cache, and keep it there until it is read.

        Nothing happens if it cannot be fetched, or if files in use fill the cache: then `read`
        does it.
        """
        if shard.sha256 not in self._expected or shard.sha256 in self._held:
            return
        with suppress(BusyError, UserError):
            held = self.cache.open(shard)
            if held is None:
                with self.cache.room(shard) as room:
                    data = self._fetch(shard) if room else b""
                    if room and is_intact(data, shard):
                        room.fill(data)
                held = self.cache.open(shard)
            if held is None:
                return
            if shard.sha256 in self._expected:
                self._held[shard.sha256] = held
            else:  # it has been read meanwhile
                release(held)

    def expect(self, shard: Shard) -> None:
        """Say that `fetch_ahead` will be asked for a shard, and `read` after it."""
        self._expected.add(shard.sha256)

    def _fetch_with_patience(self, shard: Shard, begun: float) -> bytes:
        """As `_fetch`, again and again while the server is away; `begun` is when that began."""
        while True:
            try:
                return self._fetch(shard)
            except FetchError as error:
                seconds = time.monotonic() - begun
                if not error.temporary:
                    raise
                if seconds > OUTAGE_SECONDS:
                    raise UserError(error.told(f"tried for {seconds:.0f} s")) from None

    def _fetch(self, shard: Shard) -> bytes:
        """The bytes at a shard's URL; they may be damaged, if they are so at each try."""
        url = (self / shard.name).full_url
        data: bytes | None = None

        def fetch() -> None:
            nonlocal data
            data = None
            data = download_once(url, io.BytesIO(), shard.size).read()
            if not is_intact(data, shard):
                raise FetchError(url, "it differs from its manifest", temporary=True)

        try:
            tried(fetch)
        except FetchError:
            if data is None:
                raise
        assert data is not None
        return data


Folder = Path | RemoteFolder


class Ahead:
    """Fetches shards in the background before they are read; does nothing for local ones."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._wanted: SimpleQueue[Shard] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()

    def want(self, shards: Iterable[Shard]) -> None:
        """Fetch these shards, in this order."""
        if isinstance(self._folder, Path):
            return
        if self._process != os.getpid():  # threads do not survive a fork
            self._process, self._wanted, self._threads = os.getpid(), SimpleQueue(), []
        for shard in shards:
            self._folder.expect(shard)
            self._wanted.put(shard)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(min(FETCHERS - len(self._threads), self._wanted.qsize())):
            # A daemon, so that a process that ends does not wait for its server.
            thread = threading.Thread(target=self._work, args=(self._folder,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self, folder: RemoteFolder) -> None:
        with suppress(Empty):
            while True:
                folder.fetch_ahead(self._wanted.get_nowait())


def is_intact(data: bytes, shard: Shard) -> bool:
    """Whether the bytes have the size and the SHA-256 that the manifest gives."""
    return len(data) == shard.size and hashlib.sha256(data).hexdigest() == shard.sha256


def open_folder(place: Place, data: DataSettings | None = None) -> Folder:
    """The folder at a path or URL; fetched shards are kept as `data` says."""
    if isinstance(place, Path):
        return place
    data = data or DataSettings()
    return RemoteFolder(place, DiskCache(cache_folder(data), int(data.cache_gb * _GIGABYTE)))


def cache_folder(data: DataSettings) -> Path:
    """The folder for fetched shards: `data.cache`, or the user's cache folder."""
    if data.cache != "auto":
        return data.cache
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "i3dist"


def open_file(path: Folder, most: int) -> BinaryIO:
    """Open a file for reading; one at a URL is fetched, up to `most` + 1 bytes of it.

    Raises:
        OSError: it cannot be opened.
        UserError: it cannot be fetched.
    """
    if isinstance(path, Path):
        return regular(path).open("rb")
    return download(path.full_url, tempfile.TemporaryFile, most)
