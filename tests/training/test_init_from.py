"""A run that begins with trained weights: which it takes, which it refuses, and that it goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.tokenizer import train_tokenizer
from i3dist.checkpoint.weights import SavedModel, export_weights
from i3dist.config import OptimizerSettings, Settings
from i3dist.data.corpus import Corpus
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.training.continuing import further
from i3dist.training.init_from import history_is_off, initial_weights, joined_otherwise
from i3dist.training.startup import decide, foresee
from tests.conftest import QUICK, differences, error_line, program, run_ranks
from tests.known import BOS, MODEL, TOKENIZER, Known, documents, make
from tests.launch.starting import begin, refusal


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make(tmp_path_factory.mktemp("known") / "data", documents(0, 6), documents(1, 4))


def finished(folder: Path, tokenizer: bytes = TOKENIZER, **model: Any) -> Path:
    """The folder of a finished run of another model."""
    settings = Settings().with_values(**MODEL | model)
    folder.mkdir()
    export_weights(folder, I3LM(settings.model, BOS), settings.train.steps)
    (folder / "settings.yaml").write_text(settings.to_yaml())
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return folder


def found(known: Known, init_from: Path, **changes: Any) -> SavedModel | None:
    """What a run on the known data takes its weights from."""
    values = {"train.init_from": init_from, "run.path": "run", "data.path": known.folder}
    settings = Settings().with_values(**MODEL | values | changes)
    return initial_weights(settings, Corpus.open(known.folder, settings.model))


def refused(*words: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        found(*words, **changes)
    return str(error.value)


def test_weights_come_with_other_settings_of_data_and_history(known: Known, tmp_path: Path) -> None:
    base = finished(tmp_path / "base", **{"model.chunk_length": 16, "model.state_carry": True})
    torch.manual_seed(1)
    saved = found(known, base, **{"compression.off_steps": 5, "optimizer.lr": 1e-5})
    assert saved is not None and saved.path == base
    model = I3LM(Settings().with_values(**MODEL).model, BOS)
    saved.load_into(model)
    theirs = I3LM(saved.settings.model, BOS)
    saved.load_into(theirs)
    assert all(t.equal(theirs.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "other",
    [
        {"model.d_model": 24},
        {"model.layers": "2xrwkv,1xattention"},
        {"model.layers": "1xrwkv,1xdual-attention", "model.ff_mult": 2},
        {"model.history_chunks": 3, "model.chunk_length": 16},
        {"model.compressor": "literal"},
    ],
)
def test_other_shapes_are_refused_with_the_settings_that_fit(
    known: Known, tmp_path: Path, other: dict[str, Any]
) -> None:
    base = finished(tmp_path / "base", **other)
    line = refused(known, base)
    assert line.startswith(f"train.init_from={base} does not fit: ") and " here; set " in line
    advised = dict(word.split("=", 1) for word in line.rpartition("; set ")[2].split())
    assert advised == {k: str(v) for k, v in other.items() if k != "model.chunk_length"}
    assert found(known, base, **advised) is not None


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"model.heads": 1, "model.history_chunks": 4},
            {"model.heads": 2, "model.history_chunks": 2},
        ),
        (
            {"model.layers": "1xrwkv,1xattention,1xdual-attention"},
            {"model.layers": "1xrwkv,1xdual-attention,1xattention"},
        ),
    ],
    ids=["heads", "order"],
)
def test_equal_shapes_of_another_model_are_refused(
    known: Known, tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    shared = {"model.layers": "1xrwkv,1xattention"}
    base = finished(tmp_path / "base", **shared | theirs)
    line = refused(known, base, **shared | ours)
    assert line.endswith("; set " + " ".join(f"{key}={value}" for key, value in theirs.items()))
    assert found(known, base, **shared | theirs) is not None


def test_another_tokenizer_is_refused(known: Known, tmp_path: Path) -> None:
    """Though it has as many entries: they mean something else."""
    other = train_tokenizer(["cd cd cd"], 300)
    base = finished(tmp_path / "base", other)
    line = refused(known, base)
    assert "another tokenizer" in line
    assert line.endswith(f"data_prep/shard.py --tokenizer {base / 'tokenizer.json'}")


def test_what_is_no_model_or_lies_in_the_runs_folder_is_refused(
    known: Known, tmp_path: Path
) -> None:
    assert refused(known, tmp_path / "nowhere").startswith("train.init_from: ")
    base = finished(tmp_path / "base")
    line = refused(known, base / "checkpoints", **{"run.path": base})
    assert "lies in run.path" in line and "choose another run.path" in line
    (base / "model.safetensors").unlink()
    assert "a run writes it when it ends" in refused(known, base)


def test_without_data_all_is_checked_but_the_datas_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a dry run does, which then knows the vocabulary."""
    caplog.set_level("INFO", "i3dist")
    base = finished(tmp_path / "base")
    auto = {"model.vocab_size": "auto", "run.path": tmp_path / "run"}

    def foreseen(**values: Any) -> Settings:
        settings = Settings().with_values(**MODEL | auto | {"train.init_from": base} | values)
        return foresee(settings, None, 2, fresh=False)

    assert foreseen().model.vocab_size == MODEL["model.vocab_size"]
    assert f"train.init_from={base}: whether the data have its tokenizer" in caplog.text
    for values, says in (
        ({"train.init_from": tmp_path / "nowhere"}, "train.init_from: .*nowhere"),
        ({"run.path": base}, "lies in run.path"),
        ({"model.d_model": 24}, "does not fit: .*; set model.d_model="),
        ({"model.vocab_size": 555}, f"; set model.vocab_size={MODEL['model.vocab_size']}$"),
    ):
        with pytest.raises(UserError, match=says):
            foreseen(**values)
    assert foreseen(**{"train.init_from": None}).model.vocab_size == 32_000


def test_a_dry_run_without_data_refuses_weights_that_are_not_there(tmp_path: Path) -> None:
    words = ["--dry-run", f"data.path={tmp_path / 'no'}", f"train.init_from={tmp_path / 'none'}"]
    line = error_line(program("launch/train.py", *words, f"run.path={tmp_path / 'run'}"))
    assert line.startswith("error: train.init_from: ")


def test_a_note_says_that_history_begins_later() -> None:
    note = history_is_off(Settings())
    assert note is not None and "history is off for 100 steps" in note
    assert history_is_off(Settings.load(None, note.split()[-2:])) is None


@pytest.mark.parametrize("steps", [None, 1, 3, 49, 1000])
def test_softmaxes_go_on_as_the_weights_ended_unless_settings_say_otherwise(
    known: Known, tmp_path: Path, steps: int | None
) -> None:
    """`steps` is how long the other run's share rises, of which it takes the first."""
    dual: dict[str, Any] = {"model.layers": "1xrwkv,1xdual-attention"}
    after = "never" if steps is None else Settings().train.steps - 1
    joins = {"compression.join_after": after, "compression.join_steps": steps or 5}
    saved = found(known, finished(tmp_path / "base", **dual, **joins), **dual)
    assert saved is not None and saved.joined == (0 if steps is None else 1 / steps)
    auto = Settings().with_values(**dual)
    ours = decide(auto, 1, 300, saved)
    first, second = (ours.compression.joined_at(step) for step in (0, 1))
    assert first == pytest.approx(saved.joined, abs=1 / 2000)
    assert second == pytest.approx(min(1, first + 1 / 2000) if steps else 0)
    assert ours.compression.joins == bool(steps)
    assert ours.compression.joined_after(2000) == bool(steps)
    assert joined_otherwise(ours, saved) is None
    later = decide(auto.with_values(**{"compression.join_after": 50}), 1, 300, saved)
    assert later.compression.join_steps == 2000
    for typed in ("never", 0):
        words = {"compression.join_after": typed, "compression.join_steps": 0}
        other = decide(auto.with_values(**words), 1, 300, saved)
        note, begins = joined_otherwise(other, saved), other.compression.joined_at(0)
        assert begins == (typed == 0) and (note is None) == (begins == saved.joined)
        if note is not None:
            advice = note.partition("; ")[2].split()[:2]
            assert decide(Settings.load(None, advice).with_values(**dual), 1, 300, saved) == ours


def test_only_a_new_run_takes_weights(whole: Path, data: Path, tmp_path: Path) -> None:
    """One that continues needs none: the word may be left out, but not name others."""
    for place in (whole, whole / "checkpoints", whole / "checkpoints" / "step-00000005"):
        start = begin(tmp_path / "new", data, f"train.init_from={place}")
        assert start.weights is not None and start.checkpoint is None
        assert start.settings.train.init_from == place
    continued = begin(whole, data)
    assert continued.checkpoint is not None and continued.weights is None
    assert "train.init_from is nowhere but the saved run has None" in refusal(
        whole, data, "train.init_from=nowhere"
    )


def test_a_run_begins_with_the_weights_and_is_continued_without_them(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    """Its first validation is the other run's last one; interrupted it is the same, bit for bit."""
    base = Path(shutil.copytree(whole, tmp_path / "base"))
    words = [*QUICK, f"data.path={data}", "optimizer.lr=1e-3", f"train.init_from={base}"]
    words += ["validate.every=9"]

    def train(run: Path, steps: int) -> str:
        done = run_ranks(*words, f"run.path={run}", f"train.steps={steps}", ranks=1)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"weights   those of {base}\n" in train(tmp_path / "at once", 4)
    train(tmp_path / "in two", 2)
    shutil.rmtree(base)
    assert "weights   " not in train(tmp_path / "in two", 4)
    assert differences(tmp_path / "at once", tmp_path / "in two") == []
    first, last = (
        json.loads((run / "validation.jsonl").read_text().splitlines()[line])["loss"]
        for run, line in ((tmp_path / "at once", 0), (whole, -1))
    )
    assert first == pytest.approx(last, abs=1e-6)


@given(
    ended=st.integers(1, 50),
    more=st.integers(1, 50),
    decay=st.integers(1, 100),
    schedule=st.sampled_from(["cosine", "linear", "warmup-stable-decay"]),
)
def test_a_run_that_is_trained_further_is_told_its_learning_rate(
    ended: int, more: int, decay: int, schedule: str
) -> None:
    def run(steps: int, decay: int = decay) -> Settings:
        values = {"train.steps": steps, "optimizer.decay_steps": decay}
        values |= {"optimizer.warmup_steps": 0, "optimizer.schedule": schedule}
        return Settings().with_values(**values)

    saved, longer = run(ended), run(ended + more)
    assert further(longer, saved, ended - 1) is None, "it has not ended"
    assert further(saved, saved, ended) is None, "it does not go on"
    note = further(longer, saved, ended)
    assert note is not None
    curve: OptimizerSettings = longer.optimizer
    now, last = (f"{curve.lr_at(step):.3g}" for step in (ended, ended + more - 1))
    if decay <= ended:
        assert f"stays at {now}, " in note
        assert f"with optimizer.decay_steps={ended + more} it goes on from " in note
    else:
        assert f"goes on from {now} and is {last} in the last step" in note
    other = run(ended + more, decay + ended + more)
    note = further(other, saved, ended)
    assert note is not None and f"(optimizer.decay_steps={decay + ended + more})" in note
