"""`i3dist COMMAND`: each starts what its file starts, from any folder, and names itself."""

import base64
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from i3dist.cli.paths import CONFIGS
from i3dist.cli.program import _Program, as_typed, type_as
from i3dist.config import Device, Settings
from i3dist.distributed import launcher
from i3dist.distributed.launcher import launcher_command
from i3dist.errors import UserError
from i3dist.programs.main import COMMANDS, parse_arguments
from i3dist.programs.train import without_gpus
from i3dist.tracking.metrics_log import read_lines
from tests.conftest import QUICK, ROOT, environment, error_line

# Prints --help of several commands, in forks that have imported torch.
FORKS = """
import os, runpy, sys, torch
for name in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv = ["i3dist", name, "--help"]
        runpy.run_module("i3dist", run_name="__main__")
    os.wait()
"""
STARTED = """
import sys, time
start = time.perf_counter()
sys.argv = ["i3dist", "--help"]
from i3dist.programs.main import main
try:
    main()
except SystemExit as left:
    assert not left.code
assert not {"torch", "numpy", "pydantic", "yaml", "rich"} & set(sys.modules), sys.modules
assert time.perf_counter() - start < 5
"""


# The import of torch, which takes seconds, ends in an exception.
IMPORTING = """
import sys
from i3dist.programs.main import main
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            raise {error}
sys.meta_path.insert(0, Finder())
main(["generate", "--checkpoint", "x", "--prompt", "a"])
"""


def i3dist(*words: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the program in a folder."""
    command = [sys.executable, "-m", "i3dist", *map(str, words)]
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("error", "says"),
    [("KeyboardInterrupt", "interrupted"), ("ImportError('no torch')", "ImportError: no torch")],
)
def test_an_end_while_modules_are_imported_is_one_line(error: str, says: str) -> None:
    command = [sys.executable, "-c", IMPORTING.format(error=error)]
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert says in error_line(result)


def test_each_command_is_a_file_that_is_there_and_all_files_are_commands() -> None:
    files = {command.file for command in COMMANDS.values()}
    assert files >= {str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.py")}
    for command in COMMANDS.values():
        text = (ROOT / command.file).read_text()
        assert f"from {command.module} import start" in text or command.module == command.file[
            :-3
        ].replace("/", ".")


def test_help_of_the_program_lists_all_and_imports_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert f"\n  {name} " in done.stdout and command.does in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_help_of_every_command_calls_it_and_the_others_by_their_names() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, *COMMANDS],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    texts = re.split("^(?=usage: )", done.stdout, flags=re.MULTILINE)[1:]
    assert [text.split(" [")[0] for text in texts] == [f"usage: i3dist {n}" for n in COMMANDS]
    for text in texts:
        assert max(map(len, text.splitlines())) <= 80
        assert not [command.file for command in COMMANDS.values() if command.file in text]
        assert "deepspeed i3dist" not in text


@pytest.mark.parametrize(
    ("word", "says"), [("trian", "use train "), ("x", "use shard, verify, "), ("", "use shard, ")]
)
def test_what_is_no_command_is_one_line(word: str, says: str) -> None:
    with pytest.raises(UserError, match=f"there is no command {word!r}: {says}"):
        parse_arguments([word])


def test_files_become_commands_in_texts_only_where_commands_were_typed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "run `python data_prep/shard.py --out x`, or see launch/train.py --help"
    assert as_typed(text) == text
    monkeypatch.setattr("i3dist.cli.program._this", _Program())
    type_as("i3dist train", {"data_prep/shard.py": "i3dist shard", "launch/train.py": "i3dist t"})
    assert as_typed(text) == "run `i3dist shard --out x`, or see i3dist t --help"


def test_settings_and_errors_are_those_of_the_command_in_any_folder(tmp_path: Path) -> None:
    assert "make the shards with `i3dist shard --out nowhere`" in error_line(
        i3dist("train", "--config", "tiny", "data.path=nowhere", folder=tmp_path)
    )
    (tmp_path / "tiny").write_text("train: {steps: nothing}\n")
    assert "tiny, line 1" in error_line(i3dist("train", "--config", "tiny", folder=tmp_path))
    line = error_line(i3dist("train", "--config", "tyni", folder=tmp_path))
    assert "'tyni' is no file, and none of 125M, 1B, 35M, i3-4096ctx, tiny" in line


def test_settings_that_come_with_the_package_are_those_of_the_tree() -> None:
    assert sorted(p.name for p in CONFIGS.iterdir()) == sorted(
        p.name for p in (ROOT / "configs").iterdir()
    )
    assert Settings.load(CONFIGS / "i3-4096ctx.yaml") == Settings()


def ranks_of(command: list[str]) -> list[object]:
    """The GPUs that a launcher's command names, one for each rank."""
    (info,) = (word.partition("=")[2] for word in command if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(info))["localhost"]


@pytest.mark.parametrize(
    ("visible", "ranks", "accelerator"),
    [
        (None, [0, 1], None),
        ("0,1,2", ["0", "1"], None),
        ("5, 3", ["5", "3"], None),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-b"], None),
        ("", [0, 1], "cpu"),
        ("-1", [0, 1], "cpu"),
    ],
)
def test_ranks_get_the_gpus_that_are_to_be_seen(
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    ranks: list[object],
    accelerator: str | None,
) -> None:
    machine(monkeypatch, gpus=2)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = launcher_command(2, ["--fresh", "train.steps=5"], environ)
    assert ranks_of(command) == ranks
    assert command[-4:] == ["i3dist", "train", "--fresh", "train.steps=5"]
    assert environ.get("DS_ACCELERATOR") == accelerator


HIDDEN, CHOSEN = {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "4,5"}
CPU = {"DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    ("number", "gpus", "environ", "device", "says"),
    [
        (3, 3, {}, "auto", None),
        (4, 3, {}, "auto", "this machine has 3; ask for at most as many"),
        (2, 2, CHOSEN, "auto", None),
        (3, 2, CHOSEN, "auto", "CUDA_VISIBLE_DEVICES=4,5 shows 2; ask for as many, or unset it"),
        (2, 0, CHOSEN, "auto", "CUDA_VISIBLE_DEVICES=4,5 shows 0; unset it to train on the CPU"),
        (2, 0, {}, "auto", None),
        (3, 0, {}, "auto", "there is no GPU .* of which there are 2; ask for at most as many"),
        (3, 8, {}, "cpu", "of which there are 2"),
        (2, 1, {}, "cpu", None),
        (3, 8, HIDDEN, "auto", "of which there are 2"),
        (3, 8, CPU | CHOSEN, "auto", "of which there are 2"),
        (2, 1, CPU | CHOSEN, "auto", None),
    ],
)
def test_each_rank_has_a_gpu_or_a_core(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    gpus: int,
    environ: dict[str, str],
    device: Device,
    says: str | None,
) -> None:
    machine(monkeypatch, gpus, cores=2)
    refused = nullcontext() if says is None else pytest.raises(UserError, match=says)
    with refused:
        launcher_command(number, [], dict(environ), device)


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, cores: int = 9) -> None:
    """The launcher sees so many GPUs and cores."""
    monkeypatch.setattr(launcher, "count_gpus", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))


def test_more_ranks_than_this_machine_can_have_are_one_line() -> None:
    for number, says in ((9999, "--gpus 9999: "), (0, "--gpus 0 must be 1 or more")):
        for name in ("train", "preflight"):
            assert error_line(i3dist(name, "--gpus", number)).startswith(f"error: {says}")


def test_a_dry_run_starts_no_ranks_and_says_what_so_many_would_need() -> None:
    """More than this machine can start: on a login node it tells of the job to come."""
    result = i3dist("train", "--gpus", 512, "--dry-run", "data.path=nowhere")
    assert result.returncode == 0, result.stderr
    assert "tokens_per_step=8388608 (2048 lanes x " in result.stdout
    assert ", 512 ranks)" in result.stdout


def test_ranks_of_another_launcher_start_none() -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    rank |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for more, name in (({}, "deepspeed"), ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun")):
        with pytest.raises(UserError, match=f"leave it out under {name}"):
            launcher_command(2, [], rank | more)


@pytest.mark.parametrize("words", [["--gpus", "2"], ["--gpus=2"], ["--ranks", "2"]])
def test_ranks_are_not_told_to_start_ranks(words: list[str]) -> None:
    rest = ["train.steps=5", "--config", "tiny", "--fresh"]
    assert without_gpus([*rest[:2], *words, *rest[2:]]) == ["train.steps=5", *rest[1:]]
    assert without_gpus(rest) == rest


def test_ranks_train_and_their_status_is_the_programs(data: Path, tmp_path: Path) -> None:
    """A signal to one of two ranks: both save, and 75 asks to be started again.

    The event has the step that was saved, though it may not have been reported.
    """
    config, rest = ROOT / QUICK[1], QUICK[2:]
    words = ["--ranks", 2, "--config", config, *rest, f"data.path={data}", "run.path=run"]
    words.append("log.every=3")
    words.append('tracking.notify=echo "$I3DIST_EVENT" >> "$I3DIST_RUN/../told"')
    command = [sys.executable, "-m", "i3dist", "train", *map(str, words)]
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("w") as said:
        started = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=said, stderr=said)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = psutil.Process(started.pid).children()
    assert (
        i3dist("status", tmp_path / "run").stdout.splitlines()[1].startswith("state     training")
    )
    assert len(ranks) == 2, (tmp_path / "said").read_text()
    ranks[1].send_signal(signal.SIGUSR1)
    assert started.wait(100) == 75, (tmp_path / "said").read_text()
    text = (tmp_path / "said").read_text()
    assert "on 2 ranks" in text and "stopped on request at step" in text
    saved = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    event = read_lines(tmp_path / "run" / "events.jsonl")[-1]
    assert f"step-{event['step']:08}" == saved and event["event"] == "requeue"
    assert (tmp_path / "told").read_text() == "start\nrequeue\n"
    status = i3dist("status", tmp_path / "run")
    assert status.returncode == 3 and "state     waiting: " in status.stdout, status
    assert "\ni3dist_running{" in (tmp_path / "run" / "metrics.prom").read_text()
