"""A local imitation of the Hugging Face hub for one dataset, which can be slow or fail.

It serves what `huggingface_hub` and `datasets` ask for: the commit, lists of files, and files, also
parts of them. The files are those of a model of the same name too, and they are served below
/plain, as by an ordinary web server.
"""

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.http_server import running

DATASET = "owner/words"
COMMIT = "c0ffee" + 34 * "0"
KINDS = ("busy", "reset", "cut", "short")


@dataclass
class Behavior:
    """How the hub behaves; may be changed while it runs."""

    delay: float = 0.0  # seconds before each answer
    failures: float = 0.0  # share of requests for data that fail, each in one of `KINDS`
    busy_until: float = 0.0  # on time.monotonic(): until then every request gets 503
    busy_after: int | None = None  # so many requests for data are answered, and no more
    busy_seconds: float = 0.0  # the first request for data is followed by so many of 503
    stalls: int = 0  # so many of the next answers stop after their headers for a while
    stall_seconds: float = 3.0
    ranges: bool = True  # whether parts of files are served
    asked: Counter[str] = field(default_factory=Counter)  # by path
    sent: int = 0  # bytes of files
    answered: int = 0  # requests for data
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    url: str = ""

    def environment(self, home: Path) -> dict[str, str]:
        """What leads the libraries to this hub, with caches below `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, behavior: Behavior, *others: object) -> None:
        self.folder, self.behavior = folder, behavior
        super().__init__(*others)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(404)

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        behavior, path = self.behavior, unquote(urlsplit(self.path).path)
        behavior.asked[path] += 1
        time.sleep(behavior.delay)
        if time.monotonic() < behavior.busy_until:
            self.send_error(503)
            return
        api = f"/api/datasets/{DATASET}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self.send_json({"_id": "1", "id": DATASET, "sha": COMMIT, "siblings": []})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self.send_tree(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/"))
        elif path.startswith(f"/datasets/{DATASET}/resolve/{COMMIT}/"):
            self.send_file(path.removeprefix(f"/datasets/{DATASET}/resolve/{COMMIT}/"))
        elif path.startswith(f"/{DATASET}/resolve/main/"):  # a model of the same name
            self.send_file(path.removeprefix(f"/{DATASET}/resolve/main/"))
        elif path.startswith("/plain/"):
            self.send_file(path.removeprefix("/plain/"))
        else:
            self.missing("RepoNotFound" if path.startswith("/api") else "EntryNotFound")

    def missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_tree(self, below: str) -> None:
        if not (self.folder / below).is_dir():
            self.missing("EntryNotFound")
            return
        recursive = "recursive=true" in self.path.lower()
        found = (self.folder / below).rglob("*") if recursive else (self.folder / below).iterdir()
        self.send_json([self.entry(path) for path in sorted(found)])

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.folder).as_posix()
        oid = hashlib.sha1(name.encode()).hexdigest()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": oid, "size": 0}
        return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}

    def send_file(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            self.missing("EntryNotFound")
            return
        data = path.read_bytes()
        start, stop = 0, len(data)
        asked = self.headers.get("Range", "") if self.behavior.ranges else ""
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last or stop) + 1)
        if asked and self.is_busy():
            self.send_error(503)
            return
        fails = asked and self.behavior.chance.random() < self.behavior.failures
        kind = self.behavior.chance.choice(KINDS) if fails else ""
        if kind == "busy":
            self.send_error(503)
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        if self.behavior.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        body = data[start : (start + stop) // 2 if kind == "short" else stop]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.behavior.stalls:
            self.behavior.stalls -= 1
            time.sleep(self.behavior.stall_seconds)
        if kind in ("cut", "reset"):
            body = body[: len(body) // 2 if kind == "cut" else 0]
            self.close_connection = True
        self.behavior.sent += len(body)
        self.wfile.write(body)

    def is_busy(self) -> bool:
        behavior = self.behavior
        behavior.answered += 1
        if behavior.busy_seconds and behavior.answered == 1:
            behavior.busy_until = time.monotonic() + behavior.busy_seconds
        return behavior.busy_after is not None and behavior.answered > behavior.busy_after

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(folder: Path) -> Iterator[Behavior]:
    """Serve the files of a folder as the dataset `DATASET`, at the behavior's `url`."""
    behavior = Behavior()
    with running(partial(Handler, folder, behavior)) as behavior.url:
        yield behavior
