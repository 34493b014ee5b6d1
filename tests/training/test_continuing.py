"""What a run may be continued with: the same data to the byte, and settings that decide nothing."""

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i3dist.config import ModelSettings, Settings
from i3dist.data.corpus import Corpus, Split
from i3dist.data.manifest import Manifest, SourceCounts
from i3dist.data.shards import read_shard
from i3dist.errors import UserError
from i3dist.training.continuing import first_conflict, inherit_decided
from tests.known import Known, documents, make

# Another legal value of every setting that may change when a run continues ...
FREE = {
    "run.path": "elsewhere",
    "data.path": "elsewhere",
    "data.cache": "elsewhere",
    "data.cache_gb": 2.5,
    "data.workers": 3,
    "data.on_damage": "quarantine",
    "train.steps": 9,
    "train.device": "cpu",
    "train.engine": "stock",
    "train.micro_batch": 2,
    "train.compile": False,
    "train.compile_cache": "elsewhere",
    "log.every": 7,
    "log.diagnose_every": 7,
    "validate.every": 7,
    "validate.samples": 7,
    "checkpoint.every": 7,
    "checkpoint.keep": 7,
    "checkpoint.keep_every": 7,
    "guard.bad_steps": 7,
    "guard.hang_seconds": 7.0,
    "guard.requeues": 7,
    "slurm.successor": True,
    "tracking.enabled": False,
    "tracking.experiment": "another",
    "tracking.run_name": "another",
    "tracking.system_metrics": True,
    "tracking.log_model": False,
    "tracking.registered_model": "another",
    "tracking.notify": "another",
}
# ... and of every one that may not.
KEPT = {
    "model.vocab_size": 300,
    "model.d_model": 64,
    "model.layers": "3xrwkv,3xattention",
    "model.heads": 2,
    "model.ff_mult": 2,
    "model.chunk_length": 64,
    "model.latents": 16,
    "model.compressor": "literal",
    "model.sub_latents": 2,
    "model.history_chunks": 4,
    "model.state_carry": True,
    "compression.off_steps": 7,
    "compression.ramp_steps": 7,
    "compression.schedule": "cosine",
    "compression.join_after": 7,
    "compression.join_steps": 7,
    "optimizer.kind": "lion",
    "optimizer.lr": 1e-3,
    "optimizer.schedule": "linear",
    "optimizer.min_lr_ratio": 0.2,
    "optimizer.warmup_steps": 7,
    "optimizer.decay_steps": 7777,
    "optimizer.decay_fraction": 0.5,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.8,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.2,
    "train.init_from": "another",
    "train.seed": 7,
    "train.lanes": 12,
    "train.schedule": 1,
    "train.window_chunks": 4,
    "train.accumulation": 2,
    "train.clip": 2.0,
    "validate.chunks": 7,
    "guard.rollbacks": 7,
    "guard.spike_factor": 7.0,
    "guard.spike_window": 7,
    "guard.spike_steps": 7,
}
# What a run has decided when it starts, so that no "auto" of these is left in a checkpoint.
SAVED = Settings().with_values(
    **{
        "model.vocab_size": 4096,
        "train.lanes": 8,
        "train.schedule": 2,
        "optimizer.decay_steps": 20_000,
    }
)


def test_every_setting_is_on_one_of_the_two_lists() -> None:
    """A new one has to be put there: may it change when a run continues?"""
    assert sorted([*FREE, *KEPT]) == sorted(Settings().flat())


@pytest.mark.parametrize("name", FREE)
def test_a_setting_that_decides_nothing_may_change(name: str) -> None:
    changed = SAVED.with_values(**{name: FREE[name]})
    assert changed != SAVED
    assert first_conflict(changed, SAVED) is None


@pytest.mark.parametrize("name", KEPT)
def test_every_other_setting_is_refused_by_name(name: str) -> None:
    changed = SAVED.with_values(**{name: KEPT[name]})
    values = changed.flat()[name], SAVED.flat()[name]
    assert values[0] != values[1]
    line = first_conflict(changed, SAVED)
    assert line is not None
    said, _, advice = line.partition("; ")
    assert said == f"{name} is {values[0]} but the saved run has {values[1]}"
    if values[1] is None:
        assert advice == f"leave {name} out to continue it"
        words = []
    else:
        words = [advice.removeprefix("type ").removesuffix(" to continue it")]
    assert Settings.load(None, words).flat()[name] == values[1], advice


@pytest.mark.parametrize("name", KEPT)
def test_what_is_left_at_auto_is_the_saved_runs(name: str) -> None:
    """And only that: a number that was typed is not replaced, nor an "auto" that may change."""
    typed = Settings().with_values(**{name: KEPT[name]})
    taken = inherit_decided(typed, SAVED)
    wanted = SAVED.with_values(**{name: KEPT[name]})
    assert taken == wanted
    assert (taken.train.micro_batch, taken.train.compile) == ("auto", "auto")


def test_weights_that_a_run_began_with_need_not_be_named_again() -> None:
    saved = SAVED.with_values(**{"train.init_from": "base"})
    assert inherit_decided(Settings(), saved) == saved


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make(tmp_path_factory.mktemp("known") / "data", documents(0, 6), documents(1, 4))


def read_all(folder: Path) -> str:
    """Open the data, read every shard of both splits, and return the fingerprint."""
    corpus = Corpus.open(folder, ModelSettings(chunk_length=8, latents=8))
    for split in (corpus.train, corpus.valid):
        for number in range(len(split.manifest.shards)):
            read_shard(split.folder, split.manifest, number)
    return corpus.fingerprint


def files(folder: Path) -> list[Path]:
    """All that training reads: shards, manifests, tokenizer."""
    kinds = ("*/shard-*.tar", "*/manifest.json", "tokenizer.json")
    return sorted(path for kind in kinds for path in folder.glob(kind))


@pytest.fixture(scope="module")
def copy(known: Known, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to spoil; whoever does so mends it."""
    folder = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(known.folder, folder)
    return folder


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_byte_of_the_data_changes_the_fingerprint_or_is_refused(
    known: Known, copy: Path, data: st.DataObject
) -> None:
    """But a manifest of the same content: a blank may take a line break's place."""
    path = data.draw(st.sampled_from(files(copy)))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    if path.name == "manifest.json" and same_json(content, bytes(changed)):
        return
    path.write_bytes(changed)
    try:
        fingerprint = read_all(copy)
    except UserError:
        return
    finally:
        path.write_bytes(content)
    assert fingerprint != read_all(known.folder), (path.name, place)


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("split", ["train", "valid"])
def test_honest_data_of_one_other_token_has_another_fingerprint(
    known: Known, tmp_path: Path, split: str
) -> None:
    texts = {"train": documents(0, 6), "valid": documents(1, 4)}
    same = make(tmp_path / "same", **texts)
    rng = random.Random(split)
    ids = texts[split][rng.randrange(len(texts[split]))]
    place = rng.randrange(len(ids))
    ids[place] = 13 + (ids[place] - 13 + 1) % 200
    other = make(tmp_path / "other", **texts)
    assert read_all(same.folder) == read_all(known.folder)
    assert read_all(other.folder) != read_all(known.folder)


OF_VERSION_2 = {
    "sources": (SourceCounts(name="a", weight=1, usable=1, documents=1, tokens=3),),
    "dropped": {"a": {"null": 1}},
}


def variants(manifest: Manifest) -> Iterator[Manifest]:
    """The manifest with one value changed, for each that it holds."""
    for name, value in manifest:
        if name not in ("format", "version", "dtype", "shards"):  # of one value, and nested
            other = OF_VERSION_2[name] if value is None else another(value)
            yield manifest.model_copy(update={name: other})
    for number, shard in enumerate(manifest.shards):
        for name, value in shard:
            shards = list(manifest.shards)
            shards[number] = shard.model_copy(update={name: another(value)})
            yield manifest.model_copy(update={"shards": tuple(shards)})


def another(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else value + "x"


def test_every_value_of_either_manifest_is_in_the_fingerprint(known: Known) -> None:
    corpus = Corpus.open(known.folder, ModelSettings(chunk_length=8, latents=8))
    found = [corpus.fingerprint]
    for name in ("train", "valid"):
        split: Split = getattr(corpus, name)
        for manifest in variants(split.manifest):
            changed = dataclasses.replace(split, manifest=manifest)
            found.append(dataclasses.replace(corpus, **{name: changed}).fingerprint)
    assert len(found) > 40 and len(set(found)) == len(found)


def test_the_splits_are_not_taken_for_one_another(known: Known) -> None:
    corpus = Corpus.open(known.folder, ModelSettings(chunk_length=8, latents=8))
    swapped = dataclasses.replace(corpus, train=corpus.valid, valid=corpus.train)
    assert swapped.fingerprint != corpus.fingerprint
