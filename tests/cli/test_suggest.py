"""Suggestions: a typo, another trainer's name, or another section leads to the right setting."""

from pathlib import Path

import pytest

from i3dist.cli.settings_text import all_settings
from i3dist.cli.suggest import MEANING, SYNONYMS, suggest
from i3dist.config import Settings
from i3dist.errors import UserError
from tests.conftest import error_line, program

KNOWN = list(all_settings(Settings))
MEANT = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "LR": "optimizer.lr",
    "optimizer.learning_rate": "optimizer.lr",
    "optimizer.learning-rate": "optimizer.lr",
    "optim.lr": "optimizer.lr",
    "train.lr": "optimizer.lr",
    "training.learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "train.weight_decay": "optimizer.weight_decay",
    "warmup": "optimizer.warmup_steps",
    "optimizer.warmup": "optimizer.warmup_steps",
    "lr_scheduler": "optimizer.schedule",
    "batch_size": "train.lanes",
    "train.batch_size": "train.lanes",
    "train.micro_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "seed": "train.seed",
    "run.seed": "train.seed",
    "steps": "train.steps",
    "max_steps": "train.steps",
    "train.max_iters": "train.steps",
    "train.stpes": "train.steps",
    "trian.steps": "train.steps",
    "checkpoint.evry": "checkpoint.every",
    "compression.schedul": "compression.schedule",
    "model.chunk": "model.chunk_length",
    "Train.Steps": "train.steps",
    "trainer.train.steps": "train.steps",
    "train.grad_clip": "train.clip",
    "max_grad_norm": "train.clip",
    "model.hidden_size": "model.d_model",
    "n_heads": "model.heads",
    "seq_len": "model.chunk_length",
    "model.history": "model.history_chunks",
    "dataset.path": "data.path",
    "dataset": "data.path",
    "data.num_workers": "data.workers",
    "output_dir": "run.path",
    "log_interval": "log.every",
    "log.interval": "log.every",
    "logging.every": "log.every",
    "checkpointing.every": "checkpoint.every",
    "eval.every": "validate.every",
    "eval_interval": "validate.every",
    "validate.interval": "validate.every",
    "save_every": "checkpoint.every",
    "checkpoint.interval": "checkpoint.every",
    "project": "tracking.experiment",
    "run_name": "tracking.run_name",
    "guard.timeout": "guard.hang_seconds",
    "optimizer.name": "optimizer.kind",
    "optim.type": "optimizer.kind",
    "train.optimizer": "optimizer.kind",
    "train_seed": "train.seed",
    "optimizer_lr": "optimizer.lr",
    "num_latents": "model.latents",
    "records": "model.sub_latents",
    "attention_layers": "model.layers",
    "validation.freq": "validate.every",
    "checkpoint.folder": "run.path",
    "training.grad_norm": "train.clip",
    "train.backend": "train.engine",
}


@pytest.mark.parametrize("typed", MEANT)
def test_a_word_leads_to_the_setting_that_was_meant(typed: str) -> None:
    assert suggest(typed, KNOWN) == [MEANT[typed]]
    with pytest.raises(UserError, match=rf"; did you mean {MEANT[typed]}\? ") as error:
        Settings.load(None, [f"{typed}=1"])
    assert typed in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", KNOWN)
def test_a_letter_too_few_or_the_key_alone_leads_to_the_setting(name: str) -> None:
    section, key = name.split(".")
    assert suggest(name, KNOWN) == [name]
    assert name in suggest(key, KNOWN)
    assert suggest(f"{section[:-1]}.{key}", KNOWN)[0] == name
    if len(key) > 3:
        assert name in suggest(f"{section}.{key[:-1]}", KNOWN)


def test_a_key_of_several_sections_names_all() -> None:
    assert suggest("path", KNOWN) == ["run.path", "data.path"]
    assert suggest("every", KNOWN) == ["log.every", "validate.every", "checkpoint.every"]


@pytest.mark.parametrize("typed", ["nothing.here", "qwertz", "", ".", "=", "no-such-option"])
def test_what_is_like_nothing_has_no_suggestion(typed: str) -> None:
    assert suggest(typed, KNOWN) == []


def test_other_trainers_names_lead_to_settings_that_there_are() -> None:
    assert sorted(set(SYNONYMS) - set(KNOWN)) == [], "rename these in SYNONYMS"
    words = [word for words in SYNONYMS.values() for word in words.split()]
    assert len(words) == len(MEANING), "a word stands there twice"
    keys = {name.partition(".")[2] for name in KNOWN}
    assert not keys & set(MEANING), "a setting has this name itself"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: 1e-3\n", "line 1: lr has no settings in it: write them as optimizer: {lr: 1e-3}"),
        (
            "train.steps: 3\n",
            "line 1: train.steps has no .*: write them as train: {steps: 3",
        ),
        ("log:\n  every: 3\ntrain:\n  lr: 1\n", "line 4: .* train.lr; did you mean optimizer.lr"),
        ("train:\n  steps: 3\noptim:\n  lr: 1\n", "line 3: .* optim; did you mean optimizer.lr"),
    ],
)
def test_a_file_gets_suggestions_too(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        Settings.load(tmp_path / "my.yaml")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lr", "1e-3"], "did you mean optimizer.lr? (launch/train.py --help lists all)"),
        (["--optimizer.lr=1e-3"], "; settings have no dashes: optimizer.lr=..."),
    ],
)
def test_a_setting_typed_as_an_option_is_explained(words: list[str], says: str) -> None:
    line = error_line(program("launch/train.py", "--dry-run", *words))
    assert "unrecognized arguments: --" in line
    assert line.endswith(says)
