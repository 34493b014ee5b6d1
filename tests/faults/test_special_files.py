"""Where a program reads a file there may be something else: it says so at once.

A FIFO would keep it waiting, and a device would fill its memory.
"""

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from resource import RLIMIT_AS, getrlimit, setrlimit

import pytest
import torch

from data_prep import report as data_report
from data_prep import shard, show, verify
from data_prep.given_tokenizer import given_tokenizer
from data_prep.reading.files import file_source
from data_prep.reading.remote import url_source
from data_prep.store import Store
from i3dist.checkpoint import store
from i3dist.checkpoint import verify as verify_checkpoint
from i3dist.checkpoint.format import read_state
from i3dist.checkpoint.reader import OptimizerReader
from i3dist.checkpoint.weights import load_run
from i3dist.config import ModelSettings, Settings
from i3dist.data.chat import read_conversation
from i3dist.data.corpus import Corpus
from i3dist.data.disk_cache import DiskCache
from i3dist.data.manifest import Manifest
from i3dist.data.shards import check_shards, read_shard
from i3dist.engine.config_file import read_engine_file
from i3dist.errors import UserError, reason
from i3dist.export.card import Figures
from i3dist.files import regular
from i3dist.report.run import Run
from i3dist.report.status import lock_holder, read_status
from i3dist.tracking.metrics_log import MetricsLog, read_lines
from i3dist.training import ledger, run_folder
from i3dist.training.startup import Start
from tests.conftest import STEPS

CPU = torch.device("cpu")
KINDS = {
    "FIFO": "it is a FIFO, not a file",
    "socket": "it is a socket, not a file",
    "device": "it is a device, not a file",
    "folder": "Is a directory",
}
NO_FOLDERS = [kind for kind in KINDS if kind != "folder"]
MEMORY = 4 << 30  # bytes that a test may take: reading a device to its end would take all
CHECKPOINT = f"checkpoints/step-{STEPS:08d}"
Read = Callable[[Path], object]

pytestmark = pytest.mark.timeout(
    10, func_only=True, method="thread"
)  # a library may hold the signal up


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    before = getrlimit(RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    setrlimit(RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    setrlimit(RLIMIT_AS, before)


def place(kind: str, path: Path) -> None:
    """Put something else where a file is, or could be."""
    with suppress(FileNotFoundError):
        path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        folder = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{folder}/{path.name}")  # its full name may be too long
        os.close(folder)


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder, whose files are links to the same bytes."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def refused(read: Read, folder: Path, name: str, kind: str) -> None:
    """Reading says on one line what is there; the folder's own name is not in question."""
    with pytest.raises((UserError, OSError)) as caught:
        read(folder)
    said = reason(caught.value)
    assert Path(name).name in said and KINDS[kind] in said, said
    assert isinstance(caught.value, UserError) or caught.value.filename


def read_first(folder: Path) -> None:
    read_shard(folder / "train", Manifest.load(folder / "train"), 0)


def check_all(folder: Path) -> None:
    check_shards(folder / "train", Manifest.load(folder / "train"))


def again(folder: Path) -> None:
    """The command that made the data, in a finished output."""
    words = ["--source", folder.parent / "text.jsonl", "--out", folder, "--vocab-size", 512]
    words += ["--workers", 1, "--chunks-per-shard", 8, "--valid-fraction", 0.1]
    shard.main(list(map(str, words)))


DATA: dict[str, list[Read]] = {
    "train/manifest.json": [
        lambda folder: Corpus.open(folder, ModelSettings()),
        lambda folder: show.main([str(folder), "--shard", "0", "--chunk", "0"]),
        lambda folder: data_report.main([str(folder), "--html", "/dev/null"]),
        again,
    ],
    "train/shard-000000.tar": [
        read_first,
        check_all,
        lambda folder: show.main([str(folder), "--shard", "0", "--chunk", "0"]),
    ],
    "train/index.parquet": [
        lambda folder: show.main([str(folder), "--shard", "0", "--chunk", "0"]),
        lambda folder: data_report.main([str(folder), "--html", "/dev/null"]),
    ],
    "tokenizer.json": [
        lambda folder: Corpus.open(folder, ModelSettings()),
        lambda folder: show.main([str(folder), "--shard", "0", "--chunk", "0"]),
        lambda folder: data_report.main([str(folder), "--html", "/dev/null"]),
        given_tokenizer,
    ],
    "shard.json": [again],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DATA)
def test_data(data: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = linked(data, tmp_path / "data")
    shutil.copy(data.parent / "text.jsonl", tmp_path)
    place(kind, folder / name)
    for read in DATA[name]:
        refused(read, folder, name, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*DATA, "source.json"])
def test_verify_names_the_file_and_checks_the_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    folder = linked(data, tmp_path / "data")
    assert (folder / name).exists()
    place(kind, folder / name)
    with pytest.raises(UserError, match="is not sound: 1 damage in 1 file"):
        verify.main([str(folder), "--workers", "1"])
    assert capsys.readouterr().out.startswith(name)


RUN: dict[str, list[Read]] = {
    "settings.yaml": [Run.read, read_status, lambda run: load_run(run, CPU)],
    "metrics.jsonl": [Run.read, read_status, lambda run: Figures.of(run, 1)],
    "ledger.jsonl": [Run.read, ledger.read],
    "starts.jsonl": [Run.read, read_status],
    "model.safetensors": [lambda run: load_run(run, CPU)],
    "tokenizer.json": [lambda run: load_run(run, CPU)],
    ".lock": [run_folder.lock_folder],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUN)
def test_a_run(whole: Path, tmp_path: Path, name: str, kind: str) -> None:
    run = linked(whole, tmp_path / "run")
    place(kind, run / name)
    for read in RUN[name]:
        refused(read, run, name, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_such_a_file_is_not_whole_and_latest_is_not_believed(
    whole: Path, tmp_path: Path, kind: str
) -> None:
    run = linked(whole, tmp_path / "run")
    place(kind, run / "checkpoints" / "latest")
    newest, *_ = store.candidates(run / "checkpoints")
    assert newest == run / CHECKPOINT and verify_checkpoint.quick_fault(newest) is None
    for name in ("manifest.json", "state.json", "tokenizer.json", "optimizer-00000.safetensors"):
        copy = linked(newest, tmp_path / name)
        place(kind, copy / name)
        assert verify_checkpoint.quick_fault(copy) is not None
        with pytest.raises(UserError, match=f"{name} (cannot be read|has .* bytes)"):
            load_run(copy, CPU)
    refused(read_state, tmp_path / "state.json", "state.json", kind)
    optimizer = "optimizer-00000.safetensors"
    refused(OptimizerReader, tmp_path / optimizer, optimizer, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_who_holds_a_run_without_a_lock_file_is_not_known(tmp_path: Path, kind: str) -> None:
    place(kind, tmp_path / ".lock")
    assert lock_holder(tmp_path) is None


FILES: dict[str, Read] = {
    "c.yaml": lambda folder: Settings.load(folder / "c.yaml", []),
    "zero.json": lambda folder: read_engine_file(folder / "zero.json"),
    "chat.jsonl": lambda folder: read_conversation(folder / "chat.jsonl"),
    "log.jsonl": lambda folder: read_lines(folder / "log.jsonl"),
    "metrics.jsonl": lambda folder: MetricsLog(folder / "metrics.jsonl").append(1, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_named_file(tmp_path: Path, name: str, kind: str) -> None:
    place(kind, tmp_path / name)
    refused(FILES[name], tmp_path, name, kind)


@pytest.mark.parametrize("kind", NO_FOLDERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt.gz"])
def test_a_source(tmp_path: Path, name: str, kind: str) -> None:
    place(kind, tmp_path / name)
    for spec in (tmp_path / name, tmp_path, tmp_path / "*"):
        with pytest.raises(UserError, match=r"is no file or folder|pipes, sockets or devices"):
            file_source(spec)


@pytest.mark.parametrize("kind", KINDS)
def test_a_url_of_this_host(data: Path, tmp_path: Path, kind: str) -> None:
    """It may name a folder of sources, but all else that is no file is refused at once."""
    folder = linked(data, tmp_path / "data")
    url, store = f"file://{folder}", Store(f"file://{folder}")
    for name in ("train/manifest.json", "tokenizer.json"):
        place(kind, folder / name)
    place(kind, tmp_path / "a.jsonl")
    refused(lambda _: Corpus.open(url, ModelSettings()), folder, "manifest.json", kind)
    refused(lambda _: store.get("tokenizer.json"), folder, "tokenizer.json", kind)
    refused(lambda _: store.fetch("tokenizer.json", tmp_path / "x"), folder, "tokenizer.json", kind)
    says = "nothing at .*a.jsonl ends in" if kind == "folder" else "a.jsonl is no file or folder"
    with pytest.raises(UserError, match=says):
        url_source(f"file://{tmp_path}/a.jsonl")


@pytest.mark.parametrize("kind", NO_FOLDERS)
def test_the_place_of_a_folder(data: Path, tmp_path: Path, kind: str) -> None:
    taken = tmp_path / "place"
    place(kind, taken)
    corpus = Corpus.open(data, ModelSettings())
    settings = Settings.load(None, [f"run.path={taken}"])
    with pytest.raises(UserError, match=r"run\.path=.*place cannot be written: .*Not a directory"):
        run_folder.lay_out(Start(settings), corpus)
    with pytest.raises(UserError, match=r"--out .*place.*: Not a directory"):
        again_in(data, taken)


def again_in(data: Path, out: Path) -> None:
    shard.main(["--source", str(data.parent / "text.jsonl"), "--out", str(out)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_of_fetched_shards(data: Path, tmp_path: Path, kind: str) -> None:
    one = Manifest.load(data / "train").shards[0]
    for name in (f"{one.sha256}.shard", f".{one.sha256}.partial", ".lock"):
        cache = DiskCache(tmp_path / name, 1 << 30)
        cache.folder.mkdir()
        place(kind, cache.folder / name)
        with pytest.raises(UserError, match=re.escape(f"cannot be used ({KINDS[kind]})")):
            cache.open(one)
            with cache.room(one):
                pass


def test_what_a_shell_opens_may_be_read() -> None:
    """As `--config <(command)` and `--config /dev/stdin` do."""
    with piped(b"train: {steps: 7}\n") as path:
        assert Settings.load(path, []).train.steps == 7
    assert regular(Path("/dev/null")).read_bytes() == b""
    assert regular(Path("/dev/stdin"))


@contextmanager
def piped(data: bytes) -> Iterator[Path]:
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    yield Path(f"/dev/fd/{reader}")
    os.close(reader)
