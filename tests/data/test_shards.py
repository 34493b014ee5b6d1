"""What is read is what was written, or nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.data.manifest import Manifest
from i3dist.data.shards import ShardCache, document_depth, read_shard
from i3dist.errors import UserError

BOS = 2


def naive_depth(tokens: np.ndarray) -> list[int]:
    """Walk the chunks and count how long the open document has been open."""
    depths, open_for = [], 0
    for position, chunk in enumerate(tokens):
        depths.append(0 if chunk[0] == BOS or position == 0 else open_for)
        open_for = 1 if BOS in chunk else depths[-1] + 1
    return depths


@given(
    st.lists(st.lists(st.sampled_from([BOS, 7]), min_size=3, max_size=3), min_size=1, max_size=40)
)
def test_depth_equals_a_walk_through_the_shard(chunks: list[list[int]]) -> None:
    tokens = np.array(chunks, np.uint16)
    assert document_depth(tokens, BOS).tolist() == naive_depth(tokens)


def test_a_shard_reads_back(data: Path) -> None:
    manifest = Manifest.load(data / "train")
    for index, shard in enumerate(manifest.shards):
        read = read_shard(data / "train", manifest, index)
        assert read.tokens.shape == (shard.chunks, manifest.chunk_length)
        assert read.depth[0] == 0
        assert read.tokens.max() < manifest.vocab_size


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "header", "payload", "swapped"])
def test_damage_is_an_error_that_names_the_shard(data: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "train"
    shutil.copytree(data / "train", folder)
    manifest = Manifest.load(folder)
    path = folder / manifest.shards[0].name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "swapped":
        shutil.copy(folder / manifest.shards[1].name, path)
    else:
        if damage == "cut":
            del content[1536:3072]
        elif damage == "longer":
            content += bytes(512)
        else:
            content[0 if damage == "header" else 700] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000000\.tar") as error:
        read_shard(folder, manifest, 0)
    assert "\n" not in str(error.value)


def test_the_cache_holds_no_more_than_it_may(data: Path) -> None:
    manifest = Manifest.load(data / "train")
    cache = ShardCache(data / "train", manifest, capacity=2, on_damage="stop")
    for index in (0, 1, 2, 0, 2, 1):
        expected = read_shard(data / "train", manifest, index).tokens
        assert np.array_equal(cache[index].tokens, expected)
        assert len(cache._held) <= 2
