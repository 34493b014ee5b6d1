"""What messages about data that training reads say can be done, and helps.

Each test does it to the letter.
"""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import shard
from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.manifest import Manifest
from i3dist.data.shards import check_shards, read_shard
from i3dist.errors import UserError
from tests.data_prep.advice import build, refusal


@pytest.mark.parametrize("name", ["plain", "with a blank", "~home"])
def test_data_that_are_not_there(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The command is typed as it stands, and --source with it, as the hub is far away."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        Manifest.load(Path(name) / "train")
    (command,) = re.findall(r"`(.*?)`", str(error.value))
    python, program, *words = shlex.split(command)
    assert (python, program) == ("python", "data_prep/shard.py")
    small = ["--vocab-size", "300", "--workers", "1", "--valid-fraction", "0.2"]
    shard.main([*words, "--source", str(texts), *small])
    Corpus.open(Path(name), ModelSettings())


def every_shard(out: Path) -> None:
    for split in ("train", "valid"):
        manifest = Manifest.load(out / split)
        check_shards(out / split, manifest)
        for number in range(len(manifest.shards)):
            read_shard(out / split, manifest, number)
    Corpus.open(out, ModelSettings(chunk_length=64))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_damaged_data_are_restored_or_made_again(
    texts: Path, tmp_path: Path, damage: Callable[[Path], None], split: str
) -> None:
    """Where the line says `delete FOLDER first`, because shard.py would take it for complete."""
    out = tmp_path / "out"
    build(texts, out)
    path = out / split / "shard-000000.tar"
    kept = path.read_bytes()
    damage(path)
    with pytest.raises(UserError, match=r"restore it.* make the data again") as error:
        every_shard(out)
    path.write_bytes(kept)
    every_shard(out)
    damage(path)
    if first := re.search(r"\(delete (.*) first\)", str(error.value)):
        shutil.rmtree(first[1])
        build(texts, out)
    else:
        assert refusal(texts, out).endswith(f": delete {out} and make it again")
        shutil.rmtree(out)
        build(texts, out)
    every_shard(out)


def test_a_tokenizer_of_other_data(texts: Path, tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    build(texts, out)
    shutil.copy(tokenizer, out / "tokenizer.json")
    with pytest.raises(UserError, match=r"make the data again \(delete .* first\)") as error:
        every_shard(out)
    shutil.rmtree(re.findall(r"\(delete (.*) first\)", str(error.value))[0])
    build(texts, out)
    every_shard(out)


def test_shards_of_another_make(texts: Path, tmp_path: Path) -> None:
    build(texts, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    manifest = Manifest.load(folder)
    smaller = manifest.model_copy(update={"vocab_size": 20})
    with pytest.raises(UserError, match=r"make the data with data_prep/shard\.py"):
        read_shard(folder, smaller, 0)
    build(texts, tmp_path / "again")
    every_shard(tmp_path / "again")
