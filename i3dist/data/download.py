"""Reads a file at a URL through webdataset's openers, again and again if that fails.

webdataset runs a program for each kind of URL (curl for http and https, gsutil for gs, a shell for
pipe). What such a program says in its exit status is little, so a failed http request is sent once
more to learn why. A program that delivers nothing for a while is ended.
"""

import http.client
import logging
import os
import select
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from i3dist.errors import UserError, printable
from i3dist.files import regular

Result = TypeVar("Result")
log = logging.getLogger(__name__)

TRIES = 3
STALL_SECONDS = 15.0
"""How long a server may deliver nothing."""
PATIENCE_SECONDS = 3.0
"""After so long without a byte the log says, once, what is waited for."""
PROBE_SECONDS = 10.0
_PART = 1 << 18
TEMPORARY = (408, 425, 429)
"""Of the answers 400 to 499, those that may be others next time."""


class FetchError(UserError):
    """A file at a URL cannot be read."""

    def __init__(self, url: str, why: str, temporary: bool) -> None:
        self._url, self._why, self.temporary = url, why, temporary
        super().__init__(self.told(f"tried {TRIES} times" if temporary else "not tried again"))

    def told(self, tried: str) -> str:
        """The message; `tried` says how often or for how long it was."""
        return f"{shown(self._url)} cannot be fetched ({self._why}; {tried}): check URL and server"


def shown(url: str) -> str:
    """A URL without the password and the query that it may hold."""
    head, mark, rest = url.partition("://")
    if not mark:
        return url
    host, slash, path = rest.partition("/")
    return f"{head}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def download(url: str, sink: Callable[[], BinaryIO], most: int) -> BinaryIO:
    """Read the file at `url`, at most `most` + 1 bytes of it, into a new sink at each try.

    Returns:
        The sink, at its beginning. A longer file is cut off there, so that the caller sees it.

    Raises:
        FetchError: the file is not there, or cannot be read in `TRIES` tries.
    """
    return tried(lambda: download_once(url, sink(), most))


def tried(work: Callable[[], Result]) -> Result:
    """Do `work`, and again up to `TRIES` times in all while it raises a temporary `FetchError`."""
    from urllib3.exceptions import MaxRetryError
    from urllib3.util import Retry

    retry = Retry(TRIES - 1, backoff_factor=0.5, backoff_jitter=0.5)
    while True:
        try:
            return work()
        except FetchError as error:
            if not error.temporary:
                raise
            try:
                retry = retry.increment(error=error)
            except MaxRetryError:
                raise error from None
        retry.sleep()


def download_once(url: str, sink: BinaryIO, most: int) -> BinaryIO:
    """As `download`, in one try."""
    length = 0
    for part in _parts(url):
        sink.write(part[: most + 1 - length])
        length += len(part)
        if length > most:
            break
    sink.seek(0)
    return sink


def _parts(url: str) -> Iterator[bytes]:
    with _opened(url) as stream:
        pipe = getattr(stream, "stream", stream)  # of a program, or a file of another kind
        while _is_ready(pipe, url) and (part := os.read(pipe.fileno(), _PART)):
            yield part
        program = getattr(stream, "proc", None)
        status = program.wait(STALL_SECONDS) if program else 0
    if status:
        raise FetchError(url, *_why(url, f"the program that reads it ended with {status}"))


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    from webdataset.gopen import gopen

    try:
        _refuse_no_file(url)
        stream = gopen(url, "rb")
    except FileNotFoundError as error:
        why = f"{error.filename} is missing, which webdataset reads such URLs with"
        raise FetchError(url, why, temporary=False) from None
    except (OSError, ValueError) as error:
        raise FetchError(url, printable(error), temporary=False) from None
    program = getattr(stream, "proc", None)
    try:
        yield stream
    except subprocess.TimeoutExpired:
        raise FetchError(url, "the program that reads it does not end", temporary=True) from None
    finally:
        if program is not None:
            program.kill()
            stream.ignore_errors = True  # its status is known, or does not matter any more
        stream.close()


def _refuse_no_file(url: str) -> None:
    """Of a file:// URL, raise `FetchError` if it leads to no file: opening it could take for ever.

    Raises:
        ValueError: it is no URL.
    """
    from webdataset.gopen import rewrite_url

    address = urlsplit(rewrite_url(url))
    if address.scheme == "file":
        try:
            regular(Path(url2pathname(address.path)))
        except OSError as error:
            raise FetchError(url, str(error.strerror), temporary=False) from None


def _is_ready(pipe: Any, url: str) -> bool:
    """Wait for data or the end; raises `FetchError` if neither comes."""
    if select.select([pipe], [], [], PATIENCE_SECONDS)[0]:
        return True
    _say_once(shown(url).rpartition("/")[0])
    if select.select([pipe], [], [], STALL_SECONDS - PATIENCE_SECONDS)[0]:
        return True
    raise FetchError(url, *_why(url, f"nothing came for {STALL_SECONDS:.0f} s"))


@cache
def _say_once(place: str) -> None:
    log.warning("waiting for data from %s", place)


def _why(url: str, otherwise: str) -> tuple[str, bool]:
    """Why a file could not be read, and whether it may be read later."""
    from webdataset.gopen import rewrite_url

    if not url.lower().startswith(("http:", "https:")):
        return otherwise, True
    try:
        with urllib.request.urlopen(rewrite_url(url), timeout=PROBE_SECONDS):
            return otherwise, True
    except urllib.error.HTTPError as error:
        final = 400 <= error.code < 500 and error.code not in TEMPORARY
        return f"HTTP {error.code} {error.reason}", not final
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        return printable(getattr(cause, "strerror", None) or cause or type(error).__name__), True
