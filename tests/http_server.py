"""A local HTTP server of a folder, which can be slow or fail."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KINDS = ("busy", "reset", "cut", "wrong")


@dataclass
class Behavior:
    """How the server behaves; may be changed while it runs."""

    delay: float = 0.0  # seconds before each answer
    failures: float = 0.0  # share of requests for shards that fail, each in one of `KINDS`
    failures_first: int = 0  # of each shard, so many first requests fail
    kinds: tuple[str, ...] = KINDS
    always: dict[str, int] = field(default_factory=dict)  # by name: the status of every answer
    silent: set[str] = field(default_factory=set)  # names that are never answered
    asked: Counter[str] = field(default_factory=Counter)
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def __init__(self, folder: Path, behavior: Behavior, *others: object) -> None:
        self.folder, self.behavior = folder, behavior
        super().__init__(*others)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        behavior, name = self.behavior, self.path.rpartition("/")[2]
        behavior.asked[self.path] += 1
        time.sleep(behavior.delay)
        if name in behavior.silent:
            time.sleep(60)
        path = self.folder / self.path.lstrip("/")
        status = behavior.always.get(name, 200 if path.is_file() else 404)
        if status != 200:
            self.send_error(status)
            return
        data = path.read_bytes()
        fails = name.endswith(".tar") and (
            behavior.chance.random() < behavior.failures
            or behavior.asked[self.path] <= behavior.failures_first
        )
        kind = behavior.chance.choice(behavior.kinds) if fails else ""
        if kind == "busy":
            self.send_error(503)
            return
        if kind == "wrong":
            data = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if kind in ("cut", "reset"):
            data = data[: len(data) // 2 if kind == "cut" else 0]
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that are killed break their connections."""


@contextmanager
def running(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server on this machine, and give its URL."""
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(folder: Path) -> Iterator[Behavior]:
    """Serve a folder at the behavior's `url`."""
    behavior = Behavior()
    with running(partial(Handler, folder, behavior)) as behavior.url:
        yield behavior
