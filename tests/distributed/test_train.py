"""Whole runs under the real launcher: two CPU ranks, one rank, stopped and continued."""

import fcntl
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from i3dist.checkpoint.weights import load_run
from i3dist.errors import UserError
from tests.conftest import (
    QUICK,
    ROOT,
    deepspeed,
    error_line,
    free_port,
    losses,
    program,
    run_ranks,
)

STEPS = 9


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks, with a checkpoint in its middle."""
    run = tmp_path_factory.mktemp("whole") / "run"
    words = [f"data.path={data}", f"run.path={run}", f"train.steps={STEPS}", "checkpoint.every=4"]
    port = free_port()  # which names the memory that ranks share
    output = succeed(deepspeed(*QUICK, *words, "checkpoint.keep=9", "validate.every=4", port=port))
    assert not list(Path("/dev/shm").glob(f"*_{port}_*")), "memory is given back"
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert len(lines) == STEPS, "one line per logging interval, from one rank"
    return run


def test_a_run_leaves_everything_behind(whole: Path) -> None:
    assert (whole / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}"
    assert {p.name for p in whole.glob("checkpoints/step-*")} == {
        f"step-{n:08d}" for n in (4, 8, STEPS)
    }
    for name in ("model.safetensors", "settings.yaml", "tokenizer.json", "plots/loss.png"):
        assert (whole / name).stat().st_size > 0, name
    assert not list(whole.glob("checkpoints/.*")), "nothing staged is left"
    validated = [json.loads(line) for line in (whole / "validation.jsonl").open()]
    assert [line["step"] for line in validated] == [0, 4, 8, STEPS]


def test_a_checkpoint_is_read_as_the_weights_that_a_run_leaves(whole: Path) -> None:
    """And an earlier one is another."""
    folder = whole / "checkpoints"
    (end, *_), (last, *_), (early, *_) = (
        load_run(path, torch.device("cpu"))
        for path in (whole, folder / f"step-{STEPS:08d}", folder / "step-00000004")
    )
    for name, tensor in end.state_dict().items():
        assert last.state_dict()[name].equal(tensor), name
    assert not early.head.weight.equal(end.head.weight)


def test_a_run_that_has_not_ended_names_its_newest_checkpoint(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    settings = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(settings.replace(f"steps: {STEPS}\n", "steps: 99\n"))
    newest = f".* continue .* or name .*/step-{STEPS:08d}$"
    with pytest.raises(UserError, match=f"is of step {STEPS}, and the run is to take 99: {newest}"):
        load_run(run, torch.device("cpu"))
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"safetensors is missing: {newest}"):
        load_run(run, torch.device("cpu"))
    (run / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-00000004: state\.json"):
        load_run(run / "checkpoints" / "step-00000004", torch.device("cpu"))


def test_it_learns(whole: Path) -> None:
    curve = losses(whole)
    assert len(curve) == STEPS
    assert curve[-1] < curve[0] - 0.05


@pytest.mark.parametrize("cut", [4, 8])
def test_continued_equals_uninterrupted(whole: Path, data: Path, tmp_path: Path, cut: int) -> None:
    """Bit for bit: losses, weights, optimizer and lanes; the cuts lie inside documents."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step-*", "metrics.jsonl", "model.*"))
    name = f"step-{cut:08d}"
    shutil.copytree(whole / "checkpoints" / name, run / "checkpoints" / name)
    (run / "checkpoints" / "latest").write_text(name)
    words = [f"data.path={data}", f"run.path={run}", f"train.steps={STEPS}", "checkpoint.every=4"]
    output = succeed(run_ranks(*QUICK, *words, "validate.every=4"))
    assert f"continued from step {cut}\n" in output
    assert losses(run) == losses(whole)[cut:]
    last = f"checkpoints/step-{STEPS:08d}"
    files = [
        "model.safetensors",
        *(f"{last}/{kind}-0000{r}.safetensors" for kind in ("optimizer", "lanes") for r in (0, 1)),
    ]
    for file in files:
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


def test_looking_into_the_model_changes_nothing(whole: Path, data: Path, tmp_path: Path) -> None:
    """Bit for bit: a look in every step, against one in the last step only."""
    run = tmp_path / "run"
    words = [f"data.path={data}", f"run.path={run}", f"train.steps={STEPS}"]
    output = succeed(run_ranks(*QUICK, *words, "log.diagnose_every=1"))
    assert losses(run) == losses(whole)
    weights = "model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    seen, once = (
        [json.loads(line) for line in (folder / "diagnostics.jsonl").open()]
        for folder in (run, whole)
    )
    assert [line["step"] for line in seen] == list(range(1, STEPS + 1))
    for line in (*seen, *once):
        assert line.pop("time") > 0
    assert once == seen[-1:]
    diagnosed = [line for line in output.splitlines() if "  attention newest 0." in line]
    assert len(diagnosed) == STEPS
    for line in seen:
        assert 0 < line["attention_age_01"] < 1
        assert line["effective_rank"] > 1
        assert line["compressor_gradient_norm"] > 0


@pytest.mark.parametrize(("ramp", "said"), [(1, 1), (2, 0)])
def test_a_run_says_that_its_history_is_not_used(
    data: Path, tmp_path: Path, ramp: int, said: int
) -> None:
    """After a step with all of history, not before the first step and not on the ramp."""
    words = [f"data.path={data}", f"run.path={tmp_path / 'run'}", "train.steps=1"]
    words += [f"compression.ramp_steps={ramp}", "optimizer.lr=1e-9"]
    output = succeed(program("launch/train.py", *QUICK, *words, "validate.every=9"))
    assert output.count("\neval ") == 2
    assert output.count("history is not used (yet)") == said


def test_one_rank_walks_the_same_stream(whole: Path, data: Path, tmp_path: Path) -> None:
    """Lanes, not ranks, make the step: one rank gives two ranks' losses, up to bf16 rounding."""
    run = tmp_path / "one"
    words = [f"data.path={data}", f"run.path={run}", f"train.steps={STEPS}"]
    succeed(program("launch/train.py", *QUICK, *words, "train.micro_batch=1", "validate.every=9"))
    assert losses(run)[0] == pytest.approx(losses(whole)[0], abs=1e-5)
    assert losses(run) == pytest.approx(losses(whole), abs=2e-3)
    assert program("launch/ledger.py", run, whole, "--tolerance", 0.02).returncode == 0
    one, two = (validations(folder)[0] for folder in (run, whole))  # of the same weights
    assert (one["step"], one["tokens"]) == (two["step"], two["tokens"]) == (0, one["tokens"])
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)
    for a, b in zip(one["by_chunk"], two["by_chunk"], strict=True):
        given = [name for name in a if a[name] is not None]
        assert given == [name for name in b if b[name] is not None]
        assert [a[name] for name in given] == pytest.approx([b[name] for name in given], rel=1e-4)


def validations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").open()]


def test_a_checkpoint_of_two_ranks_continues_on_one(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "latest").write_text("step-00000008")
    words = [f"data.path={data}", f"run.path={run}", f"train.steps={STEPS}"]
    output = succeed(program("launch/train.py", *QUICK, *words))
    assert "continued from step 8\n" in output
    assert losses(run)[-1] == pytest.approx(losses(whole)[-1], abs=2e-3)


def test_every_parameter_moves(whole: Path) -> None:
    """The compressor included: its gradient is above zero."""
    before = load_checkpoint(whole, 4)
    after = load_checkpoint(whole, STEPS)
    still = [name for name in before if before[name].equal(after[name])]
    assert not still


def load_checkpoint(run: Path, step: int) -> dict:
    tensors = {}
    for file in (run / "checkpoints" / f"step-{step:08d}").glob("optimizer-*"):
        tensors |= load_file(file)
    return {key: value for key, value in tensors.items() if key.startswith("weight/")}


def test_other_settings_are_refused(whole: Path, data: Path) -> None:
    words = [f"data.path={data}", f"run.path={whole}", f"train.steps={STEPS}", "train.seed=1"]
    line = error_line(program("launch/train.py", *QUICK, *words))
    assert "train.seed is 1 but the saved run has 0" in line
    assert "run.path" in line and "--fresh" in line


def test_other_engine_settings_are_refused(whole: Path, data: Path, tmp_path: Path) -> None:
    engine = json.loads((ROOT / "configs" / "zero2.json").read_text())
    (tmp_path / "fp32.json").write_text(json.dumps(engine | {"bf16": {"enabled": False}}))
    words = [f"data.path={data}", f"run.path={whole}", f"train.steps={STEPS}"]
    words += ["--deepspeed", str(tmp_path / "fp32.json")]
    assert "other engine settings" in error_line(program("launch/train.py", *QUICK, *words))


def test_a_run_killed_before_its_first_checkpoint_never_mixes(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    """Its folder is set aside, and the new run's logs begin anew; a running one is left alone."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints"))
    words = [f"data.path={data}", f"run.path={run}", "train.steps=1", "train.seed=3"]
    with (run / ".lock").open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        line = error_line(program("launch/train.py", *QUICK, *words))
        assert "another process runs in run.path" in line
    succeed(program("launch/train.py", *QUICK, *words))
    assert len(losses(run)) == 1
    assert losses(tmp_path / "run.1") == losses(whole)


def test_an_altered_shard_stops_every_rank_with_one_line(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "data"
    shutil.copytree(data, bad)
    for shard in (bad / "train").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[600] ^= 1
        shard.write_bytes(content)
    words = [f"data.path={bad}", f"run.path={tmp_path / 'run'}"]
    line = error_line(run_ranks(*QUICK, *words, timeout=90))
    assert "shard-" in line and "differs from its manifest" in line


def test_fresh_sets_the_earlier_run_aside(whole: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    words = [f"data.path={data}", f"run.path={run}", "train.steps=1", "train.seed=5"]
    succeed(program("launch/train.py", "--fresh", *QUICK, *words))
    assert (run / "checkpoints" / "latest").read_text() == "step-00000001"
    assert (tmp_path / "run.1" / "checkpoints" / f"step-{STEPS:08d}").is_dir()


def test_evaluate_reads_a_finished_run(whole: Path, data: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", whole, "--data", data, "--json", tmp_path / "figures.json"]
    output = succeed(program("launch/evaluate.py", *words))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"{figures['loss']:.4f}" in output
    assert set(figures) >= {"loss", "perplexity", "bits_per_byte", "by_chunk"}
    for chunk in figures["by_chunk"]:
        kinds = {"loss", "loss_without_history", "loss_other_history"}
        assert set(chunk) == {"index", "tokens", "bits_per_byte", *kinds}
    # The trainer validated a part of the same split in bf16.
    validated = json.loads((whole / "validation.jsonl").read_text().splitlines()[-1])
    assert figures["loss"] == pytest.approx(validated["loss"], abs=0.3)


def test_generate_continues_a_prompt(whole: Path) -> None:
    words = ["launch/generate.py", "--checkpoint", whole, "--tokens", 30, "--ignore-eos"]
    first = succeed(program(*words, "--prompt", "def "))
    assert first.startswith("def ") and len(first) > len("def \n")
    assert succeed(program(*words, "--prompt", "def ")) == first
    assert succeed(program(*words)).strip(), "an empty standard input is an empty prompt"


def test_data_of_another_tokenizer_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("other words make another tokenizer " * 400)
    (tmp_path / "more.txt").write_text("a second document, so that each split has one " * 300)
    made = tmp_path / "data"
    words = ["--source", tmp_path, "--vocab-size", 300, "--valid-fraction", 0.5, "--out", made]
    succeed(program("data_prep/shard.py", *words))
    line = error_line(program("launch/evaluate.py", "--checkpoint", whole, "--data", made))
    assert "tokenizer" in line
    words = [*QUICK, f"data.path={made}", f"run.path={whole}", f"train.steps={STEPS}"]
    line = error_line(program("launch/train.py", *words))
    assert f"data.path={made}, which has another tokenizer than {whole}" in line


def test_other_data_is_refused(whole: Path, data: Path, tmp_path: Path) -> None:
    made = tmp_path / "data"
    words = ["--source", data.parent / "text.jsonl", "--tokenizer", data / "tokenizer.json"]
    words += ["--chunks-per-shard", 8, "--valid-fraction", 0.1, "--seed", 3, "--out", made]
    succeed(program("data_prep/shard.py", *words))
    words = [*QUICK, f"data.path={made}", f"run.path={whole}", f"train.steps={STEPS}"]
    line = error_line(program("launch/train.py", *words))
    assert f"other data than data.path={made}, which has other shards" in line
