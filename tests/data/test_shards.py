"""What is read is what was written, or nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.data.manifest import Manifest
from i3dist.data.shards import ShardCache, check_shards, document_depth, read_shard
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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> tuple[Path, Manifest]:
    """The folder of a split's copy, and its manifest."""
    shutil.copytree(data / "train", tmp_path / "train")
    return tmp_path / "train", Manifest.load(tmp_path / "train")


@pytest.mark.parametrize("damage", [Path.unlink, folder_in_its_place, link_to_nothing])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_shard_that_is_missing_is_found_from_the_listing(
    copied: tuple[Path, Manifest], damage: Callable[[Path], None], split: str
) -> None:
    folder, manifest = copied[0], copied[1].model_copy(update={"split": split})
    damage(folder / "shard-000003.tar")
    for on_damage in ("stop", "quarantine"):
        with pytest.raises(UserError) as error:
            check_shards(folder, manifest, on_damage)
        why = "Is a directory" if damage is folder_in_its_place else "No such file or directory"
        assert str(error.value) == (
            f"{folder / 'shard-000003.tar'}: shard cannot be read ({why}); "
            "restore it or make the data again"
        )


@pytest.mark.parametrize("damage", [cut, longer])
def test_a_shard_of_another_size_is_found_from_the_listing(
    copied: tuple[Path, Manifest], damage: Callable[[Path], None]
) -> None:
    """Quarantine may go on with it, and so the message says."""
    folder, manifest = copied
    damage(folder / "shard-000003.tar")
    check_shards(folder, manifest, "quarantine")
    with pytest.raises(UserError, match=r"shard-000003\.tar: .*by data\.on_damage=quarantine$"):
        check_shards(folder, manifest)
    with pytest.raises(UserError, match=r"shard-000003\.tar: .*restore it or make the data again$"):
        check_shards(folder, manifest.model_copy(update={"split": "valid"}))


def test_the_first_is_named_and_the_others_are_counted(copied: tuple[Path, Manifest]) -> None:
    folder, manifest = copied
    for number in (2, 7, 9):
        (folder / manifest.shards[number].name).unlink()
    cut(folder / manifest.shards[5].name)
    with pytest.raises(UserError, match=r"shard-000002\.tar.*, and 3 more are missing or have an"):
        check_shards(folder, manifest)
    with pytest.raises(UserError, match=r"shard-000002\.tar.*, and 2 more are missing or have an"):
        check_shards(folder, manifest, "quarantine")


def test_no_shard_is_opened_and_links_are_followed(
    copied: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links to shards and to their folder, and other files among them."""
    folder, manifest = copied
    for shard in manifest.shards[:2]:
        (folder / shard.name).rename(folder.parent / shard.name)
        (folder / shard.name).symlink_to(folder.parent / shard.name)
    (folder / "shard-000999.tar").touch()
    (folder / "notes").mkdir()
    (folder.parent / "link").symlink_to(folder, target_is_directory=True)

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a file is opened")

    for name in ("builtins.open", "io.open", "os.open"):
        monkeypatch.setattr(name, opened)
    check_shards(folder.parent / "link", manifest)


def test_the_cache_holds_no_more_than_it_may(data: Path) -> None:
    manifest = Manifest.load(data / "train")
    cache = ShardCache(data / "train", manifest, capacity=2, on_damage="stop")
    for index in (0, 1, 2, 0, 2, 1):
        expected = read_shard(data / "train", manifest, index).tokens
        assert np.array_equal(cache[index].tokens, expected)
        assert len(cache._held) <= 2
