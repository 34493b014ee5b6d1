"""Shards at a URL: the stream is that of local files, whatever server, cache and processes do."""

import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from i3dist.config import DataSettings, ModelSettings, OnDamage
from i3dist.data import download, folder
from i3dist.data.corpus import Corpus
from i3dist.data.disk_cache import DiskCache
from i3dist.data.folder import RemoteFolder, cache_folder
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.data.schedule import lanes_of_rank
from i3dist.data.shards import check_shards, read_shard
from i3dist.errors import UserError
from tests.http_server import Behavior, serving

CPU = torch.device("cpu")
LANES, K, WINDOWS = 4, 2, 24
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on a silent server soon, and wait little before another try."""
    monkeypatch.setattr(download, "STALL_SECONDS", 2.5)
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("urllib3.util.Retry.DEFAULT_BACKOFF_MAX", 0.1)


@pytest.fixture
def server(data: Path, tmp_path: Path) -> Iterator[Behavior]:
    """Serves a copy of the data, tmp_path / "served"."""
    shutil.copytree(data, tmp_path / "served")
    with serving(tmp_path / "served") as behavior:
        yield behavior


def size_of_a_shard(data: Path) -> int:
    return (data / "train" / "shard-000000.tar").stat().st_size


def opened(server: Behavior, cache: Path, shards: float = 1000, data: Path | None = None) -> Corpus:
    """The corpus at the server; the cache has room for so many shards."""
    room = 1.0 if data is None else shards * size_of_a_shard(data) / 1e9
    settings = DataSettings.model_validate({"cache": cache, "cache_gb": room})
    return Corpus.open(server.url, ModelSettings(), data=settings)


def stream(
    corpus: Corpus,
    workers: int = 0,
    start: int = 0,
    stop: int = WINDOWS,
    lanes: range = range(LANES),
    on_damage: OnDamage = "stop",
) -> list[Batch]:
    train = corpus.train
    schedule = train.schedule(LANES, K, seed=1)
    reader = LaneWindows(train.folder, train.manifest, schedule, lanes, on_damage)
    return list(windows(reader, start, stop, workers, CPU))


def shards_read(corpus: Corpus) -> set[int]:
    """The shards that `stream` reads."""
    schedule = corpus.train.schedule(LANES, K, seed=1)
    chunks = [schedule.chunks(n, lane) for n in range(WINDOWS) for lane in range(LANES)]
    return {place[0] for places in chunks for place in places if place}


def equal(found: list[Batch], expected: list[Batch]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def local(data: Path) -> list[Batch]:
    return stream(Corpus.open(data, ModelSettings()))


def usage(cache: Path) -> int:
    """Bytes of the shards in a cache, of unfinished ones too."""
    sizes = {}
    with (cache / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # so that nothing comes or goes; names may change
        for entry in os.scandir(cache):
            with suppress(FileNotFoundError):
                at = entry.stat()
                sizes[at.st_ino] = 0 if entry.name == ".lock" else at.st_size
        fcntl.flock(lock, fcntl.LOCK_UN)  # a process that is forked now has a copy of the file
    return sum(sizes.values())


class Watch(threading.Thread):
    """Looks at a cache all the time."""

    def __init__(self, cache: Path) -> None:
        super().__init__(daemon=True)
        self.cache, self.most, self.ended = cache, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            time.sleep(0.001)
            if (self.cache / ".lock").exists():
                self.most = max(self.most, usage(self.cache))

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_stream_is_that_of_local_files(
    data: Path, server: Behavior, tmp_path: Path, local: list[Batch], workers: int
) -> None:
    corpus = opened(server, tmp_path / "cache")
    assert corpus.fingerprint == Corpus.open(data, ModelSettings()).fingerprint
    check_shards(corpus.train.folder, corpus.train.manifest)
    assert equal(stream(corpus, workers), local)
    assert equal(stream(corpus, workers), local)
    read = {f"/train/{corpus.train.manifest.shards[number].name}" for number in shards_read(corpus)}
    assert {server.asked[name] for name in read} == {1}  # once, by one of the processes


def test_an_upload_that_has_not_ended_is_found_before_the_first_step(
    server: Behavior, tmp_path: Path
) -> None:
    corpus = opened(server, tmp_path / "cache")
    folder, manifest = corpus.train.folder, corpus.train.manifest
    last = manifest.shards[-1].name
    server.always[last] = 404
    with pytest.raises(UserError, match=rf"train/{last} cannot be fetched \(HTTP 404"):
        check_shards(folder, manifest, "quarantine")
    server.always.clear()
    server.failures, server.kinds = 1.0, ("wrong",)
    check_shards(folder, manifest, "quarantine")
    with pytest.raises(UserError, match=f"train/{last}: shard differs from its manifest; restore"):
        check_shards(folder, manifest)
    server.failures = 0.0
    check_shards(folder, manifest)
    assert server.asked[f"/train/{last}"] > 0
    assert set(server.asked) == {"/train/manifest.json", "/valid/manifest.json",
                                 "/tokenizer.json", f"/train/{last}"}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [0.5, 1, 3.5])
def test_a_cache_that_is_too_small_is_never_exceeded(
    data: Path, server: Behavior, tmp_path: Path, local: list[Batch], workers: int, shards: float
) -> None:
    cache = tmp_path / "cache"
    corpus = opened(server, cache, shards, data)
    with Watch(cache) as watch:
        for start in (0, 0, 7):  # the second time after evictions; a run that continues
            assert equal(stream(corpus, workers, start), local[start:])
    assert watch.most <= shards * size_of_a_shard(data)
    assert watch.most > 0 or shards < 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_fails_changes_nothing(
    data: Path,
    server: Behavior,
    tmp_path: Path,
    local: list[Batch],
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers of 503, reset connections, truncated and altered bodies."""
    monkeypatch.setattr(download, "TRIES", 12)
    server.failures = 0.4
    assert equal(stream(opened(server, tmp_path / "cache", 4, data), workers), local)


def test_a_server_of_shards_may_be_away_for_a_while_but_not_for_ever(
    server: Behavior, tmp_path: Path, local: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than any other file is tried, once while it is fetched ahead and once after."""
    corpus = opened(server, tmp_path / "cache")
    number = corpus.train.schedule(LANES, K, seed=1).chunks(0, 0)[0][0]  # type: ignore[index]
    name = corpus.train.manifest.shards[number].name

    def come_back() -> None:
        while server.asked[f"/train/{name}"] < 10:
            time.sleep(0.01)
        server.always.clear()

    monkeypatch.setattr(download, "TRIES", 1)
    server.always[name] = 503
    monkeypatch.setattr(folder, "OUTAGE_SECONDS", 0.0)
    with pytest.raises(UserError, match=rf"{name} .*503 Service Unavailable; tried for \d+ s\)"):
        stream(corpus)
    server.asked.clear()
    monkeypatch.setattr(folder, "OUTAGE_SECONDS", 60.0)
    threading.Thread(target=come_back, daemon=True).start()
    assert equal(stream(corpus), local)
    assert not server.always


def test_shards_are_fetched_while_others_are_read(
    data: Path, server: Behavior, tmp_path: Path
) -> None:
    """While a lane reads a shard, its next one arrives."""
    corpus = opened(server, tmp_path / "cache")
    schedule = corpus.train.schedule(LANES, K, seed=1)
    reader = LaneWindows(corpus.train.folder, corpus.train.manifest, schedule, range(LANES))
    assert reader[0]
    read = {place[0] for lane in range(LANES) for place in schedule.chunks(0, lane) if place}
    following = {schedule.shard_after(0, lane)[0] for lane in range(LANES)}
    hashes = [corpus.train.manifest.shards[n].sha256 for n in read | following]
    deadline = time.monotonic() + 30
    while not all((tmp_path / "cache" / f"{name}.shard").exists() for name in hashes):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_next_shard_is_the_one_that_comes_next(data: Path) -> None:
    train = Corpus.open(data, ModelSettings()).train
    for version in (1, 2):
        schedule = train.schedule(LANES, K, seed=3, version=version)
        for lane in range(LANES):
            for index in range(20):
                places = [p for n in range(index, index + 9) for p in schedule.chunks(n, lane)]
                shards = list(dict.fromkeys(place[0] for place in places if place))
                now = {p[0] for p in schedule.chunks(index, lane) if p}
                if now and None not in places:
                    later = [shard for shard in shards if shard not in now]
                    assert schedule.shard_after(index, lane) == later[:1]


def test_a_shard_that_is_damaged_at_the_server_is_the_usual_error(
    server: Behavior, tmp_path: Path, local: list[Batch]
) -> None:
    """After several tries, in one line that names it; quarantine goes on without it."""
    corpus = opened(server, tmp_path / "cache")
    number = corpus.train.schedule(LANES, K, seed=1).chunks(0, 0)[0][0]  # type: ignore[index]
    path = tmp_path / "served" / "train" / corpus.train.manifest.shards[number].name
    whole = path.read_bytes()
    for bad in (whole[:700] + b"\1" + whole[701:], whole[:-1], whole + b"x", b""):
        path.write_bytes(bad)
        server.asked.clear()
        with pytest.raises(UserError, match=rf"{server.url}/train/{path.name}: shard differs"):
            stream(corpus)
        assert server.asked[f"/train/{path.name}"] >= download.TRIES
        batches = stream(corpus, on_damage="quarantine")
        assert batches[0].tokens.shape == local[0].tokens.shape
        assert (batches[0].tokens[0] == corpus.train.manifest.pad_id).all()
    path.write_bytes(whole)
    assert equal(stream(corpus), local)


def test_a_cached_shard_that_the_disk_damages_is_fetched_again(
    server: Behavior, tmp_path: Path, local: list[Batch]
) -> None:
    corpus = opened(server, tmp_path / "cache")
    assert equal(stream(corpus), local)
    for number, path in enumerate((tmp_path / "cache").glob("*.shard")):
        whole = path.read_bytes()
        path.write_bytes((whole[:900], b"", whole[:9] + b"?" + whole[10:])[number % 3])
    assert equal(stream(corpus, workers=2), local)


FAULTS: list[tuple[Callable[[Behavior], object], str]] = [
    (lambda s: s.always.update({"manifest.json": 404}), "HTTP 404 Not Found; not tried again"),
    (lambda s: s.always.update({"manifest.json": 403}), "HTTP 403 Forbidden; not tried again"),
    (lambda s: s.always.update({"manifest.json": 503}), "HTTP 503 Service Unavailable; tried 3"),
    (lambda s: s.always.update({"tokenizer.json": 500}), "HTTP 500 Internal Server Error; tried"),
    (lambda s: s.silent.add("manifest.json"), "timed out; tried 3 times"),
    (lambda s: setattr(s, "url", "http://nowhere.invalid/x"), "Name or service not known"),
    (lambda s: setattr(s, "url", f"http://127.0.0.1:{unused()}"), "Connection refused"),
    (lambda s: setattr(s, "url", "gopher://x/y"), "no gopen handler defined"),
    (lambda s: setattr(s, "url", "http://[x/y"), "Invalid IPv6 URL; not tried again"),
    (lambda s: setattr(s, "url", "pipe:false"), "the program that reads it ended with 1"),
]


def unused() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("fault", "says"), FAULTS)
def test_what_cannot_be_fetched_is_one_line_soon(
    server: Behavior,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Behavior], object],
    says: str,
) -> None:
    monkeypatch.setattr(download, "PROBE_SECONDS", 1.0)
    fault(server)
    start = time.monotonic()
    with pytest.raises(UserError, match=says) as error:
        opened(server, tmp_path / "cache")
    assert time.monotonic() - start < 60 and "\n" not in str(error.value)


def test_a_program_that_is_missing_is_named(
    server: Behavior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="curl is missing, which webdataset reads such URLs with"):
        opened(server, tmp_path / "cache")


@pytest.mark.parametrize("what", ["full", "file", "read-only"])
def test_a_cache_that_cannot_be_written_is_one_line(
    server: Behavior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    cache = tmp_path / "cache"
    if what == "file":
        cache.touch()
    else:

        def refuse(*_: object) -> None:
            number = {"full": 28, "read-only": 30}[what]
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        UserError, match=r"cache, cannot be used .*set another data\.cache"
    ) as error:
        stream(opened(server, cache))
    assert ("data.cache_gb" in str(error.value)) == (what == "full")
    if what != "file":
        assert usage(cache) == 0


def test_a_command_reads_too(data: Path, tmp_path: Path, local: list[Batch]) -> None:
    """Its argument is the file's name, in the place of {} or at the end."""
    settings = DataSettings.model_validate({"cache": tmp_path / "cache"})
    for url in (f"pipe:cat {data}/{{}} | cat", f"pipe:cat {data}", f"file://{data}"):
        assert equal(stream(Corpus.open(url, ModelSettings(), data=settings)), local)


def test_passwords_and_queries_are_not_shown() -> None:
    assert download.shown("https://me:secret@host/a/b?key=1") == "https://host/a/b"
    assert download.shown("pipe:cat x") == "pipe:cat x"
    folder = RemoteFolder("https://u:p@host/{}?sig=1", DiskCache(Path("x"), 1))
    assert (folder / "train" / "x").full_url == "https://u:p@host/train/x?sig=1"
    assert str(folder / "train") == "https://host/train"


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(DataSettings()) == Path("/somewhere/i3dist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder(DataSettings()) == Path("/home/me/.cache/i3dist")


def read_at_random(url: str, cache: Path, room: float, seed: int) -> None:
    """Read shards of the training split for ever."""
    behavior = Behavior(url=url)
    settings = DataSettings.model_validate({"cache": cache, "cache_gb": room})
    train = Corpus.open(behavior.url, ModelSettings(), data=settings).train
    chooser = random.Random(seed)
    while True:
        read_shard(train.folder, train.manifest, chooser.randrange(len(train.manifest.shards)))


def test_killed_processes_leave_a_cache_that_works(
    data: Path, server: Behavior, tmp_path: Path, local: list[Batch]
) -> None:
    """Three processes share it, and are killed at random and started again."""
    cache, room = tmp_path / "cache", 5.5 * size_of_a_shard(data)
    server.delay = 0.01
    chooser = random.Random(1)

    def start(seed: int) -> multiprocessing.process.BaseProcess:
        words = (server.url, cache, room / 1e9, seed)
        process = FORK.Process(target=read_at_random, args=words, daemon=True)
        process.start()
        return process

    with Watch(cache) as watch:
        processes = [start(seed) for seed in range(3)]
        for seed in range(3, 15):
            time.sleep(chooser.uniform(0.1, 0.7))
            victim = processes.pop(0)
            assert victim.is_alive() and victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            processes.append(start(seed))
        for process in processes:
            process.kill()
            process.join()
        server.delay = 0
        settings = DataSettings.model_validate({"cache": cache, "cache_gb": room / 1e9})
        corpus = Corpus.open(server.url, ModelSettings(), data=settings)
        assert equal(stream(corpus, workers=2), local)
    assert 0 < watch.most <= room


def test_two_ranks_share_a_cache(
    data: Path, server: Behavior, tmp_path: Path, local: list[Batch]
) -> None:
    """Each rank's lanes are those of local files, and no shard is fetched twice."""
    results = FORK.SimpleQueue()

    def rank(number: int) -> None:
        corpus = opened(server, tmp_path / "cache")
        batches = stream(corpus, lanes=lanes_of_rank(LANES, number, 2))
        rest = stream(corpus)  # the other rank's too
        lanes = slice(2 * number, 2 * number + 2)
        expected = [Batch(*(part[lanes] for part in batch)) for batch in local]
        results.put(equal(batches, expected) and equal(rest, local))

    processes = [FORK.Process(target=rank, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    assert results.get() and results.get()
    for process in processes:
        process.join()
    corpus = Corpus.open(data, ModelSettings())
    names = {f"/train/{corpus.train.manifest.shards[n].name}" for n in shards_read(corpus)}
    assert {server.asked[name] for name in names} == {1}


def test_a_process_that_is_forked_while_a_lock_is_held_does_not_keep_it(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1000)
    child = FORK.Process(target=time.sleep, args=(60,), daemon=True)
    with cache._counted():
        child.start()
    with (cache.folder / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.kill()
    child.join()
