"""What messages tell a user to do can be done, and helps: each test does it to the letter. 20 s.

Not repeated here: data.on_damage=quarantine (faults/test_shards.py), the same command that goes on
(faults/test_preemption.py, faults/test_killed_reader.py), a port to choose (test_dist.py), an
output to open (test_errors.py), a prompt to give (test_programs.py), what is said of data
(data_prep/test_advice_*.py) and by the script for Slurm (test_sbatch.py).
"""

import json
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from i3dist.checkpoint.weights import load_run
from i3dist.config import ModelSettings, Settings
from i3dist.data.corpus import Corpus
from i3dist.data.manifest import Manifest
from i3dist.data.schedule import lanes_of_rank
from i3dist.data.tokenizer import Tokenizer
from i3dist.distributed import collectives, devices, rendezvous
from i3dist.distributed.job import Job
from i3dist.engine.setup import read_engine_config
from i3dist.errors import UserError
from i3dist.model.state import LaneState
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.training.ledger import LEDGER
from i3dist.training.ledger_writer import LedgerWriter
from i3dist.training.micro_batch import check_micro_batch
from i3dist.training.run_folder import lay_out, lock_folder
from i3dist.training.startup import Start, agree, idle_lanes, resolve
from i3dist.training.summary import early_history
from tests.conftest import (
    QUICK,
    ROOT,
    SAVING,
    environment,
    error_line,
    free_port,
    program,
    run_ranks,
    shards_of,
    texts,
)
from tests.distributed.test_job import DEEPSPEED, SLURM, TORCHRUN
from tests.training.test_ledger import LANES, SCHEDULE, random_lanes
from tests.training.test_ledger import write as write_ledger

CPU = devices.pick_device("cpu")
ENGINE = ROOT / "configs" / "zero2.json"
# A job of one rank.
DEEPSPEED_ALONE = DEEPSPEED | dict.fromkeys(("RANK", "LOCAL_RANK", "CROSS_RANK"), "0")
DEEPSPEED_ALONE |= dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE"), "1")
SLURM_ALONE = SLURM | dict.fromkeys(("SLURM_PROCID", "SLURM_NODEID"), "0")
SLURM_ALONE |= dict.fromkeys(("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"), "1")


def begin(run: Path, data: Path, *words: str, engine: Path = ENGINE) -> Start:
    """What a run of `SAVING` starts from, as launch/train.py finds out; words may be options."""
    ours = [f"run.path={run}", f"data.path={data}", *(w for w in words if not w.startswith("--"))]
    settings = Settings.load(ROOT / "configs" / "tiny.yaml", [*QUICK[2:], *SAVING, *ours])
    corpus = Corpus.open(settings.data.path, settings.model)
    fresh = "--fresh" in words
    return resolve(settings, read_engine_config(engine), corpus, 2, fresh)


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as error:
        begin(*arguments, **options)  # type: ignore[arg-type]
    return str(error.value)


WAYS = ["choose another run.path", "start over with --fresh"]
REFUSED = [
    (["train.seed=7"], "choose another run.path", ["train.seed=7", "run.path=another"], 0),
    (["train.seed=7"], "start over with --fresh", ["train.seed=7", "--fresh"], 0),
    (["train.steps=3"], "raise train.steps", ["train.steps=12"], 12),
    (["train.steps=3"], "choose another run.path", ["train.steps=3", "run.path=another"], 0),
    (["train.steps=3"], "start over with --fresh", ["train.steps=3", "--fresh"], 0),
    (["model.chunk_length=64"], "set model.chunk_length=512", ["model.chunk_length=512"], 12),
    (["model.vocab_size=300"], "leave it at auto", ["model.vocab_size=auto"], 12),
    (["train.window_chunks=1"], "start over with --fresh", ["train.window_chunks=1", "--fresh"], 0),
]


@pytest.mark.parametrize(("words", "says", "instead", "step"), REFUSED)
def test_settings_that_are_refused(
    whole: Path, data: Path, words: list[str], says: str, instead: list[str], step: int
) -> None:
    assert says in refusal(whole, data, *words)
    start = begin(whole, data, *instead)
    assert (start.state.step if start.state else 0) == step


def test_settings_that_messages_name_may_change_when_a_run_continues(
    whole: Path, data: Path
) -> None:
    """For memory, for steps that are not finite, for readers that died."""
    words = ["train.micro_batch=1", "guard.bad_steps=99", "data.workers=0"]
    assert begin(whole, data, *words).state is not None


def test_other_data_and_another_engine(whole: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "data")
    Manifest.load(other / "train").model_copy(update={"seed": 99}).write(other / "train")
    line = refusal(whole, other)
    assert "name the data it had" in line and all(way in line for way in WAYS)
    assert begin(whole, data).state is not None
    assert begin(tmp_path / "another", other).state is None
    engine = json.loads(ENGINE.read_text())
    engine["bf16"] = {"enabled": not engine.get("bf16", {}).get("enabled", False)}
    (tmp_path / "zero2.json").write_text(json.dumps(engine))
    line = refusal(whole, data, engine=tmp_path / "zero2.json")
    assert all(way in line for way in WAYS)
    assert begin(whole, data, "--fresh", engine=tmp_path / "zero2.json").state is None


def test_keys_of_the_engines_file(tmp_path: Path) -> None:
    """Removed, or "auto", as the line says; and a key of those that it lists."""
    path = tmp_path / "zero2.json"
    good = json.loads(ENGINE.read_text())

    def said(**keys: object) -> str:
        path.write_text(json.dumps(good | keys))
        try:
            read_engine_config(path)
        except UserError as error:
            return str(error)
        return ""

    assert 'remove it or write "auto"' in said(train_batch_size=8)
    assert said(train_batch_size="auto") == said() == ""
    legal = said(bf17={}).partition("legal: ")[2].split(", ")
    assert "comms_logger" in legal and said(comms_logger={"enabled": False}) == ""
    stage = good["zero_optimization"] | {"stage": 3}
    assert "stage must be 2" in said(zero_optimization=stage)
    assert said(zero_optimization=stage | {"stage": 2}) == ""


def test_numbers_that_a_line_offers_are_taken() -> None:
    """Ranks that share the lanes, lanes of a micro-batch, lanes for the shards there are."""
    with pytest.raises(UserError, match=r"a number of ranks that divides it: .*") as error:
        lanes_of_rank(12, 0, 5)
    for ranks in str(error.value).partition("divides it: ")[2].split(", "):
        assert len(lanes_of_rank(12, 0, int(ranks))) == 12 // int(ranks)
    job = Job.detect({})
    with pytest.raises(UserError) as error:
        check_micro_batch(Settings.load(None, ["train.lanes=12", "train.micro_batch=5"]), job)
    for number in str(error.value).partition("legal: ")[2].split(", "):
        words = ["train.lanes=12", f"train.micro_batch={number}"]
        check_micro_batch(Settings.load(None, words), job)


def test_notes_of_a_new_run(data: Path) -> None:
    corpus = Corpus.open(data, ModelSettings())
    line = idle_lanes(Settings.load(None, ["train.lanes=64", "train.schedule=2"]), corpus)
    assert line is not None and "set a smaller train.lanes" in line
    assert idle_lanes(Settings.load(None, ["train.lanes=4"]), corpus) is None
    note = early_history(Settings.load(None, ["train.lanes=4"]))
    assert note is not None
    word = note.rpartition(" ")[2]
    assert early_history(Settings.load(None, ["train.lanes=4", word])) is None


def test_names_that_a_line_guesses() -> None:
    with pytest.raises(UserError, match=r"did you mean train\.steps") as error:
        Settings.load(None, ["train.stpes=5"])
    meant = re.search(r"did you mean (\S+)\?", str(error.value))
    assert meant is not None and Settings.load(None, [f"{meant[1]}=5"]).train.steps == 5


def test_an_environment_that_is_set_by_halves() -> None:
    with pytest.raises(UserError, match="unset RANK and WORLD_SIZE"):
        Job.detect({"RANK": "0"})
    assert Job.detect({}).world_size == 1
    with pytest.raises(UserError, match="use --device cpu") as error:
        devices.pick_device("cuda")
    assert "--device cpu" in str(error.value) and devices.pick_device("cpu").type == "cpu"


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
    log.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device; see to it, then type the same"):
        log.append(1, {"loss": 1.0})
    log.path.unlink()
    log.append(1, {"loss": 1.0})


def test_steps_that_are_not_finite(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on behind them where more are let pass; a lower rate starts over."""
    run = tmp_path / "run"
    words = [*QUICK, "checkpoint.every=1", "train.steps=6", f"data.path={data}", f"run.path={run}"]

    def with_faults(*more: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("INJECT_FAULT", "nan 0 2 3")
        return run_ranks(*words, *more, ranks=1, script="tests/faults/fault_injection.py")

    line = error_line(with_faults("guard.bad_steps=2"))
    assert "to continue past such steps, raise guard.bad_steps" in line
    assert "start over with --fresh and a lower optimizer.lr" in line
    continued = with_faults("guard.bad_steps=9")
    assert continued.returncode == 0, continued.stderr
    assert "continued from step" in continued.stdout
    again = run_ranks(*words, "--fresh", "optimizer.lr=1e-5", ranks=1)
    assert again.returncode == 0, again.stderr


def test_help_lists_what_a_line_says_it_lists() -> None:
    line = error_line(program("launch/train.py", "no.such=1"))
    assert "launch/train.py --help lists all" in line
    assert "train.steps=" in program("launch/train.py", "--help").stdout


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


@pytest.mark.parametrize("launcher", [SLURM_ALONE, DEEPSPEED_ALONE], ids=["srun", "deepspeed"])
def test_a_first_rank_that_cannot_be_reached(launcher: dict[str, str]) -> None:
    """MASTER_ADDR is set to the address of its host; deepspeed sets it to its --master_addr."""

    def meet(seconds: float, **environ: str) -> None:
        with rendezvous.meet(Job.detect(launcher | environ), "runs/a", timedelta(seconds=seconds)):
            pass

    port = str(free_port())
    wrong = {"SLURM_STEP_NODELIST": "no-such-host.invalid"}
    if launcher is DEEPSPEED_ALONE:
        wrong = {"MASTER_ADDR": "no-such-host.invalid"}
    with pytest.raises(UserError, match=r"set MASTER_ADDR \(deepspeed: --master_addr\) to the"):
        meet(0.2, **wrong, MASTER_PORT=port)
    meet(20, **wrong | {"MASTER_ADDR": "127.0.0.1"}, MASTER_PORT=port)


CORRECTED = [
    (DEEPSPEED, "RANK", "x", "correct it"),
    (DEEPSPEED, "RANK", "4", "correct RANK"),
    (DEEPSPEED, "LOCAL_RANK", "2", "correct LOCAL_RANK"),
    (DEEPSPEED, "MASTER_PORT", "99999", "use 1 to 65535"),
    (TORCHRUN, "LOCAL_WORLD_SIZE", "9", "start the job again with one launcher"),
    (SLURM, "SLURM_NODEID", "2", "start the job with srun"),
    (SLURM, "SLURM_STEP_NODELIST", ",", "start the job with srun"),
    (SLURM, "SLURM_STEP_TASKS_PER_NODE", "2(x", "start the job with srun"),
]


@pytest.mark.parametrize(("right", "name", "value", "says"), CORRECTED)
def test_an_environment_that_is_wrong(
    right: dict[str, str], name: str, value: str, says: str
) -> None:
    """`right` is what a launcher sets."""
    with pytest.raises(UserError, match=says) as error:
        Job.detect(right | {name: value})
    assert name in str(error.value) or "start the job again" in says
    Job.detect(right)
    if name == "MASTER_PORT":
        assert [Job.detect(right | {name: port}).master_port for port in ("1", "65535")]


def test_gpus_that_are_too_few_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"use train\.device=auto or cpu"):
            devices.choose_device("cuda", {"CUDA_VISIBLE_DEVICES": ""})
        for wanted in ("auto", "cpu"):
            devices.choose_device(wanted, {"CUDA_VISIBLE_DEVICES": ""})
        with pytest.raises(UserError, match=r"set train\.device=cpu to train on the CPU"):
            devices.choose_device("auto", {"CUDA_VISIBLE_DEVICES": "0"})
        devices.choose_device("cpu", {"CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def ranks(count: int) -> None:
        for rank in range(count):
            devices.device(Job(rank, count, rank, count, 1, "host1", 29500, "slurm"))

    with pytest.raises(UserError, match="start at most one rank per GPU, and let each see all"):
        ranks(3)
    ranks(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as Slurm binds them
    with pytest.raises(UserError, match=r"let each see all GPUs of its host \(Slurm: --gpu-bind=n"):
        ranks(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks(2)


def test_names_that_are_none() -> None:
    """A name: `give one, or leave the setting out`, `give another`."""
    settings = Settings.load(None, [])
    for wrong, says in (("", "give one, or leave the setting out"), ("\udcff", "give another")):
        with pytest.raises(UserError, match=says):
            Settings.load(None, [f"tracking.experiment={wrong}"])
    assert Settings.load(None, ["tracking.experiment=mine"]).tracking.experiment == "mine"
    assert settings.tracking.experiment


@pytest.mark.parametrize("instead", ["optimizer.decay_steps=100", "optimizer.warmup_steps=10"])
def test_a_curve_that_is_shorter_than_its_warmup(tmp_path: Path, data: Path, instead: str) -> None:
    words = ["optimizer.decay_steps=20", "optimizer.warmup_steps=50"]
    line = refusal(tmp_path / "run", data, *words)
    assert line.endswith("raise it, or lower optimizer.warmup_steps")
    begin(tmp_path / "run", data, *words, instead)
