"""What messages about settings say can be done, and helps: each test does it to the letter. 15 s.

Not repeated here: the same command that goes on (faults/test_preemption.py,
faults/test_killed_reader.py), a prompt to give (test_programs.py).
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from i3dist.config import ModelSettings, Settings
from i3dist.data.corpus import Corpus
from i3dist.data.manifest import Manifest
from i3dist.data.schedule import lanes_of_rank
from i3dist.distributed.job import Job
from i3dist.engine.setup import read_engine_config
from i3dist.errors import UserError
from i3dist.training.micro_batch import check_micro_batch
from i3dist.training.startup import idle_lanes
from tests.conftest import QUICK, error_line, program, run_ranks
from tests.launch.starting import ENGINE, begin, refusal

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


def test_names_that_a_line_guesses() -> None:
    with pytest.raises(UserError, match=r"did you mean train\.steps") as error:
        Settings.load(None, ["train.stpes=5"])
    meant = re.search(r"did you mean (\S+)\?", str(error.value))
    assert meant is not None and Settings.load(None, [f"{meant[1]}=5"]).train.steps == 5


def test_steps_that_are_not_finite(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on behind them where more are let pass; a lower rate starts over, from the
    beginning or from weights before them."""
    run = tmp_path / "run"
    words = [*QUICK, "checkpoint.every=1", "train.steps=6", f"data.path={data}", f"run.path={run}"]

    def with_faults(*more: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("INJECT_FAULT", "nan 0 2 3")
        return run_ranks(*words, *more, ranks=1, script="tests/faults/fault_injection.py")

    line = error_line(with_faults("guard.bad_steps=2"))
    assert "to continue past such steps, raise guard.bad_steps" in line
    assert "start over with --fresh and a lower optimizer.lr" in line
    word = re.search(r"with another run\.path, (train\.init_from=\S+) and a lower rate", line)
    assert word is not None
    other = [f"run.path={tmp_path / 'other'}", "train.steps=1", "optimizer.lr=1e-5"]
    begun = run_ranks(*words, *other, word[1], ranks=1)
    assert f"those of {run / 'checkpoints' / 'step-00000001'}\n" in begun.stdout, begun.stderr
    continued = with_faults("guard.bad_steps=9")
    assert continued.returncode == 0, continued.stderr
    assert "continued from step" in continued.stdout
    again = run_ranks(*words, "--fresh", "optimizer.lr=1e-5", ranks=1)
    assert again.returncode == 0, again.stderr


def test_help_lists_what_a_line_says_it_lists() -> None:
    line = error_line(program("launch/train.py", "no.such=1"))
    assert "launch/train.py --help lists all" in line
    assert "train.steps=" in program("launch/train.py", "--help").stdout


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
