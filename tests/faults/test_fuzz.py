"""Files and words with anything in them: success or one line, never a traceback, never a hang.

Every case runs in this process, so an abort or a fault of memory inside a library ends the tests.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from i3dist.cli.settings_text import all_settings
from i3dist.config import Settings
from i3dist.data.manifest import MANIFEST_NAME, TAR_BLOCK, Manifest
from i3dist.data.shards import read_shard
from i3dist.data.tokenizer import Tokenizer
from i3dist.engine.setup import read_engine_config
from i3dist.errors import UserError
from tests.conftest import ROOT
from tests.faults.mutation import NASTY_WORDS, as_json, byte_mutants, value_mutants
from tests.faults.test_hostile import HOSTILE, with_shard

LONGEST_S = 10.0


def outcomes(read: Callable[[Any], object], cases: Iterable[Any]) -> tuple[int, int]:
    """(accepted, refused) of all cases; anything but success or one line fails the test."""
    accepted = refused = 0
    for case in cases:
        start = time.monotonic()
        try:
            read(case)
            accepted += 1
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1100, str(error)
        except BaseException as error:
            raise AssertionError(f"{error!r} from {case!r}"[:3000]) from error
        assert time.monotonic() - start < LONGEST_S, repr(case)[:3000]
    return accepted, refused


def mutants(valid: bytes, tree: Any, count: int) -> list[bytes]:
    """Half of them damaged as bytes, half as values."""
    values = [as_json(value) for value in value_mutants(tree, count // 2, seed=2)]
    return [*byte_mutants(valid, count // 2, seed=1), *values]


def test_manifests(data: Path, tmp_path: Path) -> None:
    valid = (data / "train" / MANIFEST_NAME).read_bytes()

    def read(content: bytes) -> None:
        (tmp_path / MANIFEST_NAME).write_bytes(content)
        assert Manifest.load(tmp_path).fingerprint

    accepted, refused = outcomes(read, mutants(valid, json.loads(valid), 700))
    assert accepted > 5 and refused > 500


def test_settings_files(tmp_path: Path) -> None:
    """What is accepted also comes back from the file that a run keeps."""
    valid = (ROOT / "configs" / "i3-4096ctx.yaml").read_bytes()

    def read(content: bytes) -> None:
        (tmp_path / "in.yaml").write_bytes(content)
        settings = Settings.load(tmp_path / "in.yaml")
        (tmp_path / "out.yaml").write_text(settings.to_yaml())
        assert Settings.load(tmp_path / "out.yaml") == settings

    accepted, refused = outcomes(read, mutants(valid, yaml.safe_load(valid), 200))
    assert accepted > 10 and refused > 130


LAUGHS = "a0: &a0 [1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,  # a hundred million values in 300 bytes
        *("[" * 60_000, "[" * 5000 + "]" * 5000, "- " * 3000, "{a: " * 3000, "? " * 3000),
        *(
            "&a [*a]",
            "log: {every: &n 5}\nvalidate: {every: *n}",
            "train: &t {steps: 1}\nlog: *t",
            "5",
            "text",
            "[1]",
            "null",
        ),
        *("!!python/object/apply:os.getcwd []", "train: !!binary aGk=", "1: 2", "? {a: 1}\n: 2"),
        *("--- 1\n--- 2", "train: {null: 2}", "train: {steps: !!set {a}}", "x" * 70_000),
    ],
    ids=lambda text: text[:20],
)
def test_settings_files_that_parsers_choke_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "in.yaml").write_text(text)
    assert outcomes(Settings.load, [tmp_path / "in.yaml"]) == (0, 1)


def test_settings_words() -> None:
    rng = random.Random(0)
    names = list(all_settings(Settings))
    keys = [*names, *(word + ".a" for word in NASTY_WORDS), *("a." + word for word in NASTY_WORDS)]
    words = [f"{key}=1" for key in keys] + [f"train.steps={value}" for value in NASTY_WORDS]
    values = [*NASTY_WORDS, "1", "true", "0.5", "name"]
    drawn = [
        [f"{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.choice((1, 1, 2)))]
        for _ in range(500)
    ]
    cases = [[word] for word in (*words, *NASTY_WORDS)] + drawn
    accepted, refused = outcomes(lambda case: Settings.load(None, case).to_yaml(), cases)
    assert accepted > 20 and refused > 400


def test_engine_configs(tmp_path: Path) -> None:
    """DeepSpeed's own validation included."""
    valid = (ROOT / "configs" / "zero2.json").read_bytes()

    def read(content: bytes) -> None:
        (tmp_path / "engine.json").write_bytes(content)
        read_engine_config(tmp_path / "engine.json")

    cases = mutants(valid, json.loads(valid), 600)
    accepted, refused = outcomes(read, [*cases, b"[" * 100_000, b'{"bf16":' * 100_000])
    assert accepted > 20 and refused > 300


def test_tokenizers(data: Path) -> None:
    valid = (data / "tokenizer.json").read_bytes()
    tree = json.loads(valid)
    far = {**tree, "model": {**tree["model"], "vocab": {**tree["model"]["vocab"], "zz": 1 << 31}}}

    def read(content: bytes) -> None:
        tokenizer = Tokenizer(content, Path("tokenizer.json"))
        text = "def history(of, tokens): <BOS> naïve 42\n"
        assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)
        assert len(tokenizer.token_bytes()) == tokenizer.vocab_size

    accepted, refused = outcomes(read, [*mutants(valid, tree, 500), as_json(far)])
    assert accepted > 5 and refused > 300


def test_tar_headers(data: Path, tmp_path: Path) -> None:
    """Any header but the one that the writer makes is refused, its manifest agreeing or not."""
    good = (data / "train" / "shard-000000.tar").read_bytes()
    folder, manifest = with_shard(data, tmp_path / "train", good)

    def read(header: bytes) -> None:
        content = header + good[TAR_BLOCK:]
        (folder / "shard-000000.tar").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        shard = manifest.shards[0].model_copy(update={"sha256": digest})
        with pytest.raises(UserError, match="differs from its manifest"):
            read_shard(folder, manifest, 0)
        shards = (shard, *manifest.shards[1:])
        read_shard(folder, manifest.model_copy(update={"shards": shards}), 0)

    valid = good[:TAR_BLOCK]
    seeds = [valid, *(evil[:TAR_BLOCK] for evil in HOSTILE.values())]
    mutated = [m for number, seed in enumerate(seeds) for m in byte_mutants(seed, 25, number)]
    headers = {mutant[:TAR_BLOCK].ljust(TAR_BLOCK, b"\0") for mutant in mutated} - {valid}
    assert len(headers) > 250
    assert outcomes(read, sorted(headers)) == (0, len(headers))
