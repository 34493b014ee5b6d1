"""The programs as a user meets them: help, dry runs, and one clear line for what is wrong."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from i3dist.cli.settings_text import all_settings
from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.programs.generate import read_prompt
from i3dist.training.record import recorded
from tests.conftest import QUICK, ROOT, error_line, program


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda p: p.name)
def test_every_program_starts_in_an_interpreter_of_its_own(path: Path) -> None:
    """Other tests fork them from one that has imported much already."""
    words = [sys.executable, path, "--help"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {path.name}")


def test_help_lists_every_setting() -> None:
    text = program("launch/train.py", "--help").stdout
    assert all(f"{name}=" in text for name in all_settings(Settings))


def test_a_dry_run_without_data_is_the_card() -> None:
    result = program("launch/train.py", "--dry-run", "data.path=nowhere")
    assert result.returncode == 0, result.stderr
    total = int(re.search(r"^parameters_total=(\d+)$", result.stdout, re.MULTILINE)[1])
    assert 335e6 <= total <= 348e6
    assert "tokens_per_step=16384" in result.stdout
    unknown = "no data at nowhere, so vocabulary and epochs are not known"
    assert f"tokens_total=327680000 ({unknown})" in result.stdout
    assert "8 heads do not divide width 1180: using 10" in result.stdout + result.stderr
    assert "note:" not in result.stdout and "warning:" not in result.stdout + result.stderr


def test_a_dry_run_with_data_follows_its_vocabulary(data: Path) -> None:
    result = program("launch/train.py", "--dry-run", *QUICK, f"data.path={data}")
    assert re.search(r"model\.vocab_size\W+512\b", result.stdout)


def test_settings_and_options_come_in_any_order() -> None:
    words = ["train.steps=5", "--config", "configs/tiny.yaml", "train.seed=7", "data.path=nowhere"]
    result = program("launch/train.py", "--dry-run", *words)
    assert result.returncode == 0, result.stderr
    for setting, value in (("train.steps", 5), ("train.seed", 7), ("model.d_model", 128)):
        assert re.search(rf"{re.escape(setting)}\W+{value}\b", result.stdout)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["train.stpes=1"], "unknown setting train.stpes; did you mean train.steps"),
        (["train.steps=0"], "train.steps=0 should be greater than or equal to 1"),
        (["data.path=nowhere"], "python data_prep/shard.py"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--deepspeed", "nowhere.json", "DATA"], "nowhere.json"),
        (["DATA", "model.chunk_length=64"], "chunks of 512 tokens; set model.chunk_length=512"),
        (["DATA", "train.lanes=4", "train.micro_batch=3"], "legal: 1, 2, 4, auto"),
    ],
)
def test_bad_input_to_train_is_one_line(
    data: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    words = [f"data.path={data}" if word == "DATA" else word for word in words]
    result = program("launch/train.py", *words, f"run.path={tmp_path / 'run'}", timeout=60)
    assert says in error_line(result)


def test_lanes_that_ranks_cannot_share_are_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by the first of three ranks, before it waits for the others."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29501")
    words = [f"data.path={data}", f"run.path={tmp_path / 'run'}", "train.lanes=4"]
    result = program("launch/train.py", *words, timeout=60)
    assert "train.lanes=4 cannot be shared by 3 ranks" in error_line(result)
    assert "1, 2, 4" in error_line(result)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["launch/evaluate.py", "--checkpoint", "nowhere", "--data", "x"], "model.safetensors"),
        (["launch/generate.py", "--checkpoint", "nowhere"], "model.safetensors"),
        (["launch/evaluate.py", "--data", "x"], "--checkpoint"),
        (["launch/generate.py", "--checkpoint", "x", "--tokens", "0"], "--tokens 0"),
        (["launch/generate.py", "--checkpoint", "x", "--seed", "-1"], "--seed -1"),
        (["launch/generate.py", "--checkpoint", "x", "--top-p", "2"], "top_p 2.0"),
        (["launch/generate.py", "--checkpoint", "x", "--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_bad_input_to_the_other_programs_is_one_line(words: list[str], says: str) -> None:
    if "cuda" in words:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    assert says in error_line(program(*words, timeout=60))


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape", "ascii:strict"])
def test_a_prompt_that_is_no_text_is_refused(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of it is written. As another program converts it, it is taken."""
    name, errors = encoding.split(":")

    def prompt(content: bytes) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), name, errors))
        return read_prompt(None)

    latin = "café".encode("latin-1")
    with pytest.raises(UserError, match="standard input is not UTF-8 text") as error:
        prompt(latin)
    command = str(error.value).partition("for instance with ")[2]
    converted = subprocess.run(command.split(), input=latin, capture_output=True, check=True)
    if name == "utf-8":
        assert prompt(converted.stdout) == "café"
    assert prompt(b"plain") == "plain" and prompt(b"") == ""


def test_a_prompt_that_is_missing_or_no_text_on_the_command_line_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match="--prompt is not UTF-8 text"):
        read_prompt(os.fsdecode(b"caf\xe9"))
    assert read_prompt("café") == "café"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed: give a --prompt"):
        read_prompt(None)
    assert read_prompt("given") == "given"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA"), "train.micro_batch=auto"),
        (torch.distributed.DistError("gone"), "another rank.*: DistError: gone"),
        (UserError("as it is"), "as it is"),
    ],
)
def test_what_fails_is_recorded_and_explained(error: Exception, says: str) -> None:
    tracker = mock.Mock()
    with pytest.raises(UserError, match=says), recorded(tracker, None):
        raise error
    tracker.finish.assert_called_once_with("FAILED")
