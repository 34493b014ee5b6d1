"""The machine's oddities: what decides nothing ends no run, the rest is one line. 40 s."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from i3dist.config import ModelSettings, Settings
from i3dist.data.corpus import Corpus
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.training import run_folder
from i3dist.training.startup import Start
from tests.conftest import (
    QUICK,
    ROOT,
    deepspeed,
    environment,
    error_line,
    free_port,
    losses,
    run_ranks,
)

ODD = {
    "HOME": "/proc/nohome",  # cannot be written, and does not exist
    "PATH": "/usr/bin:/bin",  # without ninja
    "CXX": "no-such-compiler",
    "TORCH_EXTENSIONS_DIR": "/proc/nowhere",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # as a notebook exports it
    "PYTHONIOENCODING": "ascii",
}


def test_a_strange_environment_and_a_reader_that_leaves_end_no_run(
    data: Path, tmp_path: Path
) -> None:
    """As `train.py | head -n 1` under a service user, started from a notebook."""
    folder = tmp_path / "run"
    words = ["launch/train.py", *QUICK, f"data.path={data}", f"run.path={folder}", "train.steps=2"]
    environ = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    result = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {sys.executable} "$@" | head -n 1', "-", *words],
        cwd=ROOT,
        env=environ | ODD | {"OMP_NUM_THREADS": "01"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "warning: standard output: Broken pipe; the program goes on" in result.stderr
    assert "Traceback" not in result.stderr and "no plots" not in result.stderr
    assert len(losses(folder)) == 2
    assert (folder / "model.safetensors").exists() and (folder / "plots" / "loss.png").exists()


def test_ranks_need_no_home_no_compiler_and_no_shared_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's operator for CPUs, which training never uses, is not built."""
    for name in ("HOME", "CXX", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, ODD[name])
    before = set(Path("/dev/shm").glob("deepspeed_*"))
    folder = tmp_path / "run"
    done = run_ranks(*QUICK, f"data.path={data}", f"run.path={folder}", "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= before
    assert len(losses(folder)) == 2


def test_ranks_meet_under_a_path_that_is_no_unicode(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x\udcff"
    done = run_ranks(*QUICK, f"data.path={data}", f"run.path={folder}", "train.steps=1")
    assert done.returncode == 0, done.stderr
    assert len(losses(folder)) == 1 and (folder / "model.safetensors").exists()


def test_a_folder_that_the_first_rank_cannot_lay_out_is_one_line_and_ends_every_rank(
    data: Path, tmp_path: Path
) -> None:
    """Also where no launcher ends the others."""
    folder = tmp_path / "run"
    (folder / ".lock").mkdir(parents=True)
    words = [*QUICK, f"data.path={data}", f"run.path={folder}", "train.steps=1"]
    ranks, port = [], free_port()
    for rank in range(2):
        environ = environment() | {"TORCHELASTIC_RUN_ID": "tests"}
        Job(rank, 2, rank, 2, "127.0.0.1", port, "torchrun").export(environ)
        command = [sys.executable, "launch/train.py", *words]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environ, stderr=pipe, text=True))
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    line = f"error: run.path={folder} cannot be written: {folder}/.lock: Is a directory\n"
    assert said == [line, ""]


def test_a_port_in_use_ends_the_launcher_at_once(data: Path, tmp_path: Path) -> None:
    """Not after 30 s, when it kills a rank that waits in another job's rendezvous."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [*QUICK, f"data.path={data}", f"run.path={tmp_path / 'run'}", "train.steps=2"]
        result = deepspeed(*words, port=port, timeout=120)
    ended = time.time()
    line = error_line(result)
    assert f"port {port} of 127.0.0.1" in line and "deepspeed --master_port N" in line
    assert ended - first_words(result.stdout + result.stderr, "Killing subprocess") < 15
    assert not (tmp_path / "run").exists()


def first_words(said: str, words: str) -> float:
    """When the launcher first logged these words, in seconds since the epoch."""
    line = next(line for line in said.splitlines() if words in line)
    stamp = line.partition("[")[2].partition(",")[0]
    return time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S"))


def test_plots_that_cannot_be_drawn_cost_a_line(data: Path, tmp_path: Path) -> None:
    """Whether the run is through, or was told to stop."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plots").write_text("in the way")
    words = [*QUICK, f"data.path={data}", f"run.path={folder}", "train.steps=1"]
    done = run_ranks(*words, ranks=1)
    assert done.returncode == 0, done.stderr
    assert "warning: no plots: " in done.stdout
    assert json.loads((folder / "metrics.jsonl").read_text())["step"] == 1


def hold_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    run_folder.lock_folder(folder)


@pytest.mark.parametrize("number", sorted(set(run_folder.NO_LOCKS)))
def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    hold_without_locks(tmp_path, monkeypatch, number)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: the file system of run.path={tmp_path} has no locks")
    hold_without_locks(tmp_path, monkeypatch, number)  # what this process holds is its own


def test_without_locks_a_living_process_of_this_host_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else: what a killed run, or anything else, left there is written over."""
    host, other = socket.gethostname(), psutil.Process(os.getppid())
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps([host, other.pid, other.create_time()]))
    with pytest.raises(UserError, match=f"another process runs in run.path={tmp_path}"):
        hold_without_locks(tmp_path, monkeypatch, errno.ENOLCK)
    for left in (
        [host, other.pid, 1.5],  # the number is another process's now
        [host, 2**22 + 1, other.create_time()],
        ["elsewhere", other.pid, other.create_time()],
        *("text", [], {}, [host, "x", 0], [host, 10**30, 0], [host, -1, 0]),
    ):
        lock.write_text(json.dumps(left))
        hold_without_locks(tmp_path, monkeypatch, errno.ENOLCK)
        assert json.loads(lock.read_text())[1] == os.getpid()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_process_has_is_told_from_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with pytest.raises(UserError, match="end it first"):
        hold_without_locks(tmp_path, monkeypatch, number)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: (folder / ".lock").mkdir(parents=True), ".lock: Is a directory"),
        (lambda folder: folder.write_text("a file"), "Not a directory"),
        (lambda folder: folder.symlink_to("/proc/1/task"), "/.lock: "),
    ],
)
def test_a_run_folder_that_cannot_be_written_is_one_line(
    data: Path, tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    folder = tmp_path / "run"
    make(folder)
    corpus = Corpus.open(data, ModelSettings())
    with pytest.raises(UserError, match=f"run.path={folder} cannot be written: .*{says}") as error:
        run_folder.lay_out(Start(Settings.load(None, [f"run.path={folder}"])), corpus)
    assert "\n" not in str(error.value)


def read(data: Path, workers: int) -> list[Batch]:
    """The first windows of a data set."""
    train = Corpus.open(data, ModelSettings()).train
    lanes = LaneWindows(train.folder, train.manifest, train.schedule(4, 2, seed=0), range(4))
    return list(windows(lanes, 0, 5, workers, torch.device("cpu")))


@pytest.mark.timeout(60)
def test_shared_memory_that_is_full_is_one_line(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Containers have little of it. Without it the rank would wait for ever."""

    def refuse(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
    with pytest.raises(UserError, match=r"/dev/shm is full.*with fewer data\.workers"):
        read(data, workers=1)
    assert "Traceback" not in capfd.readouterr().err
    assert len(read(data, workers=0)) == 5


def test_a_host_without_semaphores_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    with pytest.raises(UserError, match=r"/dev/shm can be written .* or set data\.workers=0"):
        read(data, workers=1)
    assert len(read(data, workers=0)) == 5
