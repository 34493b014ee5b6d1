"""What several parts of the suite share: a small real data set and a way to run the programs."""

import email
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch

from i3dist.distributed.collectives import leave_group
from i3dist.distributed.job import Job
from tests.launcher import Launcher

# Tensors are tiny here: threads would only wait for each other.
torch.set_num_threads(1)

# How long an example takes says how busy the machine is, and nothing else.
hypothesis.settings.register_profile("i3dist", deadline=None)
hypothesis.settings.load_profile("i3dist")

ROOT = Path(__file__).parent.parent
STARTUP = ROOT / "tests" / "startup"  # what Python does first in the programs that tests start
# Small enough for seconds; history is on from the first step, so every part takes part.
QUICK = [
    *("--config", "configs/tiny.yaml", "model.d_model=32", "model.rwkv_layers=2"),
    *("train.window_chunks=2", "train.lanes=4", "log.every=1", "optimizer.warmup_steps=2"),
    *("compression.off_steps=0", "compression.ramp_steps=2", "optimizer.decay_steps=20"),
    *("checkpoint.every=0", "validate.every=0", "validate.chunks=4", "tracking.enabled=false"),
    "validate.samples=0",
]
# Of a run to compare others with: checkpoints of steps 5, 10 and 12, all of which stay.
STEPS = 12
SAVING = [f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.keep=9"]


def made_once(name: str, make: Callable[[Path], Path], factory: pytest.TempPathFactory) -> Path:
    """What `make` makes in a folder that it is given, once for all processes that run tests."""
    place = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # which all have
    folder, made = place / name, place / f"{name}.made"
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            made.write_text(str(make(folder)))
    return Path(made.read_text())


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few modules of the standard library: some 240 chunks in shards of 8."""

    def make(folder: Path) -> Path:
        return shards_of(texts(), folder, "--vocab-size", 512)

    return made_once("data", make, tmp_path_factory)


def texts() -> list[str]:
    """A few modules of the standard library."""
    modules = sorted(Path(email.__file__).parent.rglob("*.py"))
    return [module.read_text("utf-8") for module in modules]


def shards_of(documents: Iterable[str], folder: Path, *words: object) -> Path:
    """Make training data of documents, in shards of 8 chunks, as `words` say; returns its place."""
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    options = ["--source", folder / "text.jsonl", "--out", folder / "data", "--workers", 1]
    options += ["--chunks-per-shard", 8, "--valid-fraction", 0.1]
    result = program("data_prep/shard.py", *options, *words)
    assert result.returncode == 0, result.stderr
    return folder / "data"


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of two ranks, with `QUICK` and `SAVING`; only to be read."""

    def make(folder: Path) -> Path:
        places = f"data.path={data}", f"run.path={folder / 'run'}"
        result = run_ranks(*QUICK, *SAVING, "validate.samples=2", *places)
        assert result.returncode == 0, result.stderr
        return folder / "run"

    return made_once("whole", make, tmp_path_factory)


def environment() -> dict[str, str]:
    """The environment of a user who activated the virtual environment of these tests.

    With one thread a process, as above: on a busy machine more take several times as long.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = os.pathsep.join(filter(None, (str(STARTUP), os.environ.get("PYTHONPATH"))))
    # "1" is what torchrun sets where nobody chose a number, so that ranks take it for no choice.
    return os.environ | {"PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "01"}


@cache
def launcher() -> Launcher:
    """The one of these tests; it ends when they do."""
    return Launcher(ROOT, environment())


def program(*words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run one of the programs as one process; those of launch/ as a fork (tests/launcher.py)."""
    if str(words[0]).startswith("launch/"):
        return launcher().run(list(map(str, words)), [environment()], timeout)
    return _run([sys.executable, *words], timeout)


def run_ranks(
    *words: object, ranks: int = 2, timeout: float = 300, script: str = "launch/train.py"
) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py as forks with torchrun's environment: a fourth of the launchers' time."""
    port = free_port()
    environs = [environment() | {"TORCHELASTIC_RUN_ID": "tests"} for _ in range(ranks)]
    for rank, environ in enumerate(environs):
        Job(rank, ranks, rank, ranks, "127.0.0.1", port, "torchrun").export(environ)
    return launcher().run([script, *map(str, words)], environs, timeout)


def deepspeed(
    *words: object,
    ranks: int = 2,
    timeout: float = 300,
    before: Sequence[object] = (),
    script: str = "launch/train.py",
    port: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py as `ranks` CPU processes under the deepspeed launcher."""
    return _run([*before, *deepspeed_command(ranks, script, port), *words], timeout)


def deepspeed_command(
    ranks: int = 2, script: str = "launch/train.py", port: int | None = None
) -> list[object]:
    """The words that start `script` under the launcher, up to its own arguments."""
    launcher = ["deepspeed", "--num_accelerators", ranks, "--master_port", port or free_port()]
    return [*launcher, script, "--deepspeed", "configs/zero2.json"]


@contextmanager
def one_rank() -> Iterator[None]:
    """A job of one rank, which leaves nothing in the environment of programs run later."""
    from i3dist.engine import setup  # with DeepSpeed: few tests need it
    from i3dist.engine.deepspeed_internals import deepspeed

    before = dict(os.environ)
    # Forget the groups of a job that has ended, so that this process can join another.
    deepspeed.utils.groups._WORLD_GROUP = None  # DeepSpeed's own group of all ranks
    deepspeed.comm.comm.cdb = None  # its communication backend
    setup.start(Job.detect({}))
    yield
    leave_group()
    os.environ.clear()
    os.environ.update(before)


def free_port() -> int:
    """A port for a rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(words: list[object], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def losses(run: Path) -> list[float]:
    """Loss of every step, as the run's metrics.jsonl says; a step written again counts once."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    by_step = {line["step"]: line["loss"] for line in map(json.loads, lines)}
    return [by_step[step] for step in sorted(by_step)]


def differences(run: Path, other: Path) -> list[str]:
    """What two finished runs differ in, though all should be equal bit for bit.

    Losses, ledger, weights, and of the last checkpoint optimizer, lanes' state and all counts.
    """
    ends = [folder / "checkpoints" / last_checkpoint(folder) for folder in (run, other)]
    names = sorted({path.name for end in ends for path in end.glob("*.safetensors")})
    pairs = [[end / name for end in ends] for name in names]
    pairs.append([run / "model.safetensors", other / "model.safetensors"])
    found = [a.name for a, b in pairs if a.read_bytes() != b.read_bytes()]
    counts = [json.loads((end / "state.json").read_text()) | {"settings": None} for end in ends]
    found += ["state.json"] * (counts[0] != counts[1])
    found += ["losses"] * (losses(run) != losses(other))
    checked = program("launch/ledger.py", run, other)
    return [*found, error_line(checked)] if checked.returncode else found


def last_checkpoint(run: Path) -> str:
    """Name of a run's newest checkpoint."""
    return (run / "checkpoints" / "latest").read_text()


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed program printed for its user."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]
