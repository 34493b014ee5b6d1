"""What messages about files say can be done, and helps: each test does it to the letter. 10 s.

Of the data, the run's folder, its checkpoints and its ledger. Not repeated here:
data.on_damage=quarantine (faults/test_shards.py), an output to open (test_errors.py), what is said
of data while it is made (data_prep/test_advice_data.py).
"""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from i3dist.checkpoint.weights import load_run
from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.tokenizer import Tokenizer
from i3dist.distributed import collectives, devices
from i3dist.errors import UserError
from i3dist.model.state import LaneState
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.training.ledger import LEDGER
from i3dist.training.ledger_writer import LedgerWriter
from i3dist.training.run_folder import lay_out, lock_folder
from i3dist.training.startup import Start, agree
from tests.conftest import ROOT, environment, shards_of, texts
from tests.launch.starting import begin, refusal
from tests.training.test_ledger import LANES, SCHEDULE, random_lanes
from tests.training.test_ledger import write as write_ledger

CPU = devices.pick_device("cpu")


def test_data_that_a_trained_model_cannot_read(data: Path, whole: Path, tmp_path: Path) -> None:
    """Made again with the tokenizer that the line names, or another split asked for."""
    few = texts()[:6]
    without = shards_of(few, tmp_path, "--vocab-size", 300, "--valid-fraction", 0)
    with pytest.raises(UserError, match="with a --valid-fraction above 0"):
        Corpus.open(without, ModelSettings())
    trained_with = Tokenizer.load(whole / "tokenizer.json")
    (tmp_path / "again").mkdir()
    again = shards_of(few, tmp_path / "again", "--tokenizer", trained_with.path)
    Corpus.open(again, ModelSettings(), trained_with)
    (again / "tokenizer.json").write_bytes((without / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"made with another tokenizer .*--tokenizer"):
        Corpus.open(again, ModelSettings(), trained_with)
    with pytest.raises(UserError, match="restore it or make the data again"):
        Corpus.open(again, ModelSettings())
    shutil.copy(trained_with.path, again / "tokenizer.json")
    Corpus.open(again, ModelSettings(), trained_with)
    read = ModelSettings(chunk_length=64)
    with pytest.raises(UserError, match=r"tokens; make other data with --chunk-length 64$"):
        Corpus.open(again, read, trained_with)
    with pytest.raises(UserError, match=r"tokens; set model.chunk_length=512 or make other data"):
        Corpus.open(again, read)
    (tmp_path / "other").mkdir()
    words = ("--tokenizer", trained_with.path, "--chunk-length", 64)
    Corpus.open(shards_of(few, tmp_path / "other", *words), read, trained_with)


def copy_of(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def test_broken_checkpoints(whole: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    shutil.rmtree(checkpoints[-1])  # "remove its folder to continue from the one before it"
    start = begin(run, data)
    assert start.state is not None and start.state.step == 10
    kept = (checkpoints[0] / "manifest.json").read_bytes()
    for path in checkpoints[:-1]:
        (path / "manifest.json").write_text("{}")
    assert "restore one, or start over with --fresh" in refusal(run, data)
    assert begin(run, data, "--fresh").state is None
    (checkpoints[0] / "manifest.json").write_bytes(kept)
    start = begin(run, data)
    assert start.state is not None and start.state.step == 5


def test_a_run_without_weights_or_with_anothers_tokenizer(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    run = copy_of(whole, tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", run / "model.safetensors")
    (run / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"continue the run with launch/train\.py, or name"
    ) as error:
        load_run(run, CPU)
    load_run(Path(str(error.value).rpartition("or name ")[2]), CPU)
    shutil.copy(whole / "model.safetensors", run)
    own = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(own.replace("vocab_size: 512", "vocab_size: 300"))
    with pytest.raises(UserError, match="restore the run's own files"):
        load_run(run, CPU)
    (run / "settings.yaml").write_text(own)
    load_run(run, CPU)


def test_a_folder_that_another_process_holds(tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    script = (
        "import sys, pathlib; from i3dist.training.run_folder import lock_folder\n"
        "lock_folder(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match=r"end it first, or choose another run\.path"):
            lock_folder(tmp_path)
        lock_folder(tmp_path / "another")
        holder.kill()
    lock_folder(tmp_path)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most[1]))
    try:
        with pytest.raises(UserError, match="File too large; fix that, then run the same"):
            log.append(1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    log.append(1, {"loss": 1.0})


def test_hosts_that_see_other_folders(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each host has a disk of its own at the run's path; then both have the same."""
    run = tmp_path / "run"

    def seen(disk: Path) -> Start:
        run.unlink(missing_ok=True)
        run.symlink_to(disk)
        return begin(run, data)

    def of(start: Start) -> tuple[int, str]:
        return start.state.step if start.state else 0, start.settings.to_yaml()

    mine, empty = seen(whole), seen(tmp_path / "empty")
    monkeypatch.setattr(collectives, "gather_objects", lambda own: [own, of(empty)])
    with pytest.raises(UserError, match=rf"{run} is not .* put it on a file system that they sha"):
        agree(mine)
    shared = seen(whole)
    monkeypatch.setattr(collectives, "gather_objects", lambda own: [own, of(shared)])
    agree(mine)


def test_a_ledger_of_another_run_than_its_checkpoint(
    tmp_path: Path, whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(whole, tmp_path)
    own = write_ledger(tmp_path / "own", 1, range(1, 6), monkeypatch)
    ledger = shutil.copy(own, run / LEDGER)
    state, another = random_lanes(3), random_lanes(4)

    def resume(with_state: LaneState) -> None:
        LedgerWriter(run, SCHEDULE, 3, range(LANES)).resume(3, with_state)

    with pytest.raises(UserError, match="restore either of them, or start over with --fresh"):
        resume(another)
    resume(state)  # the checkpoint's is restored
    lines = own.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:2] + lines[3:4]).replace('"step": 4', '"step": 3'))
    with pytest.raises(UserError, match="restore either of them"):
        resume(state)
    shutil.copy(own, ledger)
    resume(state)
    lay_out(begin(run, data, "--fresh"), Corpus.open(data, ModelSettings()))
    assert not ledger.exists(), "it lies with the run that was set aside"
    write_ledger(run, 1, range(1, 6), monkeypatch)
    assert ledger.read_bytes() == own.read_bytes()


def test_checkpoints_on_a_disk_that_is_gone(whole: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    assert "bring it back, or start over with --fresh" in refusal(run, data)
    fresh = begin(run, data, "--fresh")
    (tmp_path / "elsewhere").rename(tmp_path / "disk")
    start = begin(run, data)
    assert start.state is not None and start.state.step == 12
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    lay_out(fresh, Corpus.open(data, ModelSettings()))
    (run / "checkpoints" / "step-1").mkdir(parents=True)
