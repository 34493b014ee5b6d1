"""The legal values of every setting: the ends of its range are taken, what lies beyond is not."""

import math
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_model_name

from i3dist.config import Settings
from i3dist.errors import UserError

MOST = 2**40
COUNT = (1, MOST)
COUNT_OR_ZERO = (0, MOST)
# (lowest, highest) of whole numbers.
WHOLE = {
    "data.workers": (0, 256),
    "model.vocab_size": (16, 16_777_216),
    "model.d_model": (8, 65_536),
    "model.heads": (1, 4096),
    "model.ff_mult": (1, 64),
    "model.sub_latents": (1, 4096),
    "model.history_chunks": (1, 1024),
    "compression.off_steps": COUNT_OR_ZERO,
    "compression.ramp_steps": COUNT_OR_ZERO,
    "compression.join_after": (-MOST, MOST),
    "compression.join_steps": COUNT_OR_ZERO,
    "optimizer.warmup_steps": COUNT_OR_ZERO,
    "optimizer.decay_steps": COUNT,
    "train.steps": COUNT,
    "train.seed": (0, 2**32 - 1),
    "train.lanes": COUNT,
    "train.window_chunks": (1, 4096),
    "train.accumulation": (1, 4096),
    "train.micro_batch": COUNT,
    "log.every": COUNT,
    "log.diagnose_every": COUNT_OR_ZERO,
    "validate.every": COUNT_OR_ZERO,
    "validate.chunks": COUNT,
    "validate.samples": (0, 256),
    "checkpoint.every": COUNT_OR_ZERO,
    "checkpoint.keep": COUNT,
    "checkpoint.keep_every": COUNT_OR_ZERO,
    "guard.bad_steps": COUNT,
    "guard.rollbacks": COUNT_OR_ZERO,
    "guard.requeues": COUNT_OR_ZERO,
    "guard.spike_window": (1, 10_000),
    "guard.spike_steps": COUNT,
}
LEAST = math.nextafter(0, 1)
BELOW_1, ABOVE_1 = math.nextafter(1, 0), math.nextafter(1, 2)
LARGE = 1.7e308
# (legal, illegal) of other numbers; none takes what is not finite.
REAL = {
    "data.cache_gb": ((LEAST, 1e6), (0.0, -LEAST, math.nextafter(1e6, math.inf))),
    "optimizer.lr": ((LEAST, LARGE), (0.0, -LEAST)),
    "optimizer.min_lr_ratio": ((0.0, 1.0), (-LEAST, ABOVE_1)),
    "optimizer.decay_fraction": ((LEAST, 1.0), (0.0, -LEAST, ABOVE_1)),
    "optimizer.beta1": ((0.0, BELOW_1), (-LEAST, 1.0)),
    "optimizer.beta2": ((0.0, BELOW_1), (-LEAST, 1.0)),
    "optimizer.eps": ((LEAST, LARGE), (0.0, -LEAST)),
    "optimizer.weight_decay": ((0.0, 1.0), (-LEAST, ABOVE_1)),
    "train.clip": ((LEAST, LARGE), (0.0, -LEAST)),
    "guard.spike_factor": ((0.0, LARGE), (-LEAST,)),
    "guard.hang_seconds": ((0.0, 1e6), (-LEAST, math.nextafter(1e6, math.inf))),
}
# All of the words that are legal.
WORDS = {
    "data.on_damage": ("stop", "quarantine"),
    "model.vocab_size": ("auto",),
    "model.state_carry": (True, False),
    "guard.hang_seconds": ("auto",),
    "optimizer.decay_steps": ("auto",),
    "optimizer.schedule": ("cosine", "linear", "warmup-stable-decay"),
    "compression.schedule": ("cosine", "linear", "warmup-stable-decay"),
    "compression.join_after": ("never", "auto"),
    "compression.join_steps": ("auto",),
    "train.lanes": ("auto",),
    "train.schedule": (1, 2, "auto"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.engine": ("zero2", "stock"),
    "train.micro_batch": ("auto",),
    "train.compile": (True, False, "auto"),
    "slurm.successor": (True, False),
    "tracking.enabled": (True, False),
    "tracking.system_metrics": (True, False),
    "tracking.log_model": (True, False),
}
NAMES = (
    *(
        "run.path",
        "data.path",
        "data.cache",
        "train.compile_cache",
        "model.compressor",
        "optimizer.kind",
    ),
    *("train.init_from", "train.compile_cache", "tracking.experiment", "tracking.run_name"),
    "tracking.registered_model",
    "tracking.notify",
)
LAYERS = ("1xrwkv", "1024xrwkv,1xattention", "2xattention,1xmine,1xof-mine,1024xof_mine2")
NO_LAYERS = (
    *(
        "",
        "rwkv",
        "0xrwkv,1xattention",
        "1025xrwkv",
        "1024xrwkv,1xrwkv",
        "-1xrwkv",
        "1.5xrwkv",
        "1xrwkv,",
    ),
    *(
        "1 rwkv",
        "1 2xrwkv",
        "1xrwkv 1xattention",
        "9" * 5000 + "xrwkv",
        "2xRwkv",
        "2x",
        "x",
        "2xrwkv;1xattention",
        "1x2xrwkv",
        "9" * 99 + "xrwkv",
        12,
        None,
    ),
)
# Whose ends depend on each other.
PAIR = ("model.chunk_length", "model.latents")


def takes(**values: Any) -> bool:
    """Whether these are legal settings, and are what was given."""
    try:
        settings = Settings().with_values(**values)
    except UserError as error:
        assert any(name in str(error) for name in values)
        return False
    assert all(settings.flat()[name] == value for name, value in values.items())
    return True


def test_every_setting_has_its_range_here() -> None:
    assert {*WHOLE, *REAL, *WORDS, *NAMES, *PAIR, "model.layers"} == set(Settings().flat())


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_reaches_from_end_to_end(name: str) -> None:
    # A warm-up needs a curve that is as long.
    other = {"optimizer.decay_steps": MOST} if name == "optimizer.warmup_steps" else {}
    if name == "optimizer.decay_steps":
        other = {"optimizer.warmup_steps": 0}
    low, high = WHOLE[name]
    assert takes(**other, **{name: low}) and takes(**other, **{name: high})
    for wrong in (low - 1, high + 1, low + 0.5, "some", None):
        assert not takes(**other, **{name: wrong}), wrong


@pytest.mark.parametrize("name", REAL)
def test_a_number_reaches_from_end_to_end(name: str) -> None:
    legal, illegal = REAL[name]
    for value in legal:
        assert takes(**{name: value}), value
    for value in (*illegal, math.nan, math.inf, "some", None):
        assert not takes(**{name: value}), value


@pytest.mark.parametrize("name", WORDS)
def test_words_are_those_of_the_list(name: str) -> None:
    for word in WORDS[name]:
        assert takes(**{name: word})
    for wrong in ("Auto", "", "sometimes", None):
        assert not takes(**{name: wrong}), wrong


def test_a_chunk_has_as_many_latents_as_tokens_at_most() -> None:
    for length in (2, 512, 65_536):
        most = min(length, 4096)
        for latents in (1, most):
            assert takes(**{"model.chunk_length": length, "model.latents": latents})
        for latents in (0, most + 1):
            assert not takes(**{"model.chunk_length": length, "model.latents": latents})
    for length in (1, 65_537):
        assert not takes(**{"model.latents": 1, "model.chunk_length": length})


def test_names_are_taken_as_they_are() -> None:
    for name in NAMES:
        assert takes(**{name: "a b#c"})
    for name in (
        "tracking.run_name",
        "tracking.registered_model",
        "tracking.notify",
        "train.init_from",
    ):
        assert takes(**{name: None})


def test_a_registered_model_has_a_name_that_mlflow_takes() -> None:
    """Those that MLflow's own check takes, but for names that it would not store whole."""
    for name in ("x", "2024", "a.b.c", "it's", " x ", ".x", "x..", "é\n", "x" * 256):
        _validate_model_name(name)
        assert takes(**{"tracking.registered_model": name}), name
    for name in ("", " ", ".", "..", "..x", "a/b", "a:b", "/"):
        with pytest.raises(MlflowException):
            _validate_model_name(name)
        assert not takes(**{"tracking.registered_model": name}), name
    assert not takes(**{"tracking.registered_model": "x" * 257})
    for logged in (True, False):
        both = {"tracking.log_model": logged, "tracking.registered_model": "x"}
        assert takes(**both) == logged


def test_layers_are_counts_and_kinds() -> None:
    """Their order, and which kinds there are, the model knows (tests/model/test_layer_kinds.py)."""
    for legal in LAYERS:
        assert takes(**{"model.layers": legal})
    for wrong in NO_LAYERS:
        assert not takes(**{"model.layers": wrong}), wrong
    typed = " 1 x rwkv, 2xrwkv,\n1xattention,\t1xattention\n"
    settings = Settings().with_values(**{"model.layers": typed})
    assert settings.model.layers == "3xrwkv,2xattention"
    assert settings.model.layer_kinds == ["rwkv"] * 3 + ["attention"] * 2
