"""What a manifest may say: each number from end to end, and sizes of archives by hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from i3dist.data.manifest import MANIFEST_NAME, Manifest, archive_size
from i3dist.errors import UserError


def size(chunks: int, length: int) -> int:
    """A tar's: a block of header and whole blocks of two bytes a token for each chunk, two blocks
    of zeros at the end, and all of it in records of 20 blocks."""
    blocks = chunks * (1 + (2 * length + 511) // 512) + 2
    return 512 * 20 * ((blocks + 19) // 20)


def manifest(
    length: int = 4, chunks: int = 1, per_shard: int = 1, **changes: Any
) -> dict[str, Any]:
    """A valid one."""
    counts = [per_shard] * (chunks // per_shard) + [chunks % per_shard] * bool(chunks % per_shard)
    shards = [
        {
            "name": f"shard-{number:06d}.tar",
            "chunks": count,
            "size": size(count, length),
            "sha256": "0123456789abcdef" * 4,
        }
        for number, count in enumerate(counts)
    ]
    return {
        "split": "train",
        "chunk_length": length,
        "chunks_per_shard": per_shard,
        "vocab_size": 16,
        "tokenizer_sha256": "f" * 64,
        "bos_id": 2,
        "eos_id": 3,
        "pad_id": 1,
        "source": "",
        "seed": 0,
        "documents": 1,
        "tokens": length * chunks,
        "chunks": chunks,
        "shards": shards,
    }


def loads(folder: Path, content: dict[str, Any]) -> bool:
    """Whether it is taken; what is not is named in one line."""
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    try:
        return json.loads(Manifest.load(folder).model_dump_json()).items() >= content.items()
    except UserError as error:
        assert "\n" not in str(error) and MANIFEST_NAME in str(error)
        return False


@pytest.mark.parametrize(
    ("name", "legal", "illegal"),
    [
        ("vocab_size", [4, 1 << 16], [3, 0, -1, (1 << 16) + 1]),
        ("seed", [0, (1 << 63) - 1], [-1, 1 << 63]),
        ("source", ["", "x" * 4096], ["x" * 4097]),
        ("split", ["a", "a" + "z9_-" * 7 + "bcd"], ["", "A", "9a", "a" * 33, "a/b", "a."]),
        ("tokenizer_sha256", ["0" * 64, "9" * 64], ["0" * 63, "0" * 65, "g" * 64, "A" * 64]),
        ("pad_id", [0, 15], [16, -1, 2, 3]),
        ("bos_id", [0, 15], [16, -1, 1, 3]),
        ("eos_id", [0, 15], [16, -1, 1, 2]),
        ("chunks_per_shard", [1, 2, 1_000_000], [0, 1_000_001]),
        ("documents", [1, 2], [0, 3]),  # of four tokens; each has two around it
        ("tokens", [2, 3, 4], [0, 1, 5]),
        ("chunks", [1], [0, 2]),
    ],
)
def test_each_number_reaches_from_end_to_end(
    tmp_path: Path, name: str, legal: list[Any], illegal: list[Any]
) -> None:
    for value in legal:
        assert loads(tmp_path, manifest() | {name: value}), value
    for value in illegal:
        assert not loads(tmp_path, manifest() | {name: value}), value


@pytest.mark.parametrize("length", [2, 255, 256, 257, 512, 1 << 16])
def test_chunks_of_any_length_up_to_65536(tmp_path: Path, length: int) -> None:
    assert loads(tmp_path, manifest(length))


@pytest.mark.parametrize("length", [1, (1 << 16) + 1])
def test_chunks_are_no_shorter_and_no_longer(tmp_path: Path, length: int) -> None:
    assert not loads(tmp_path, manifest(length))


@pytest.mark.parametrize("chunks", [1, 2, 8, 9, 10, 18, 19, 1_000_000])
@pytest.mark.parametrize("length", [2, 256, 257, 512, 513, 1 << 16])
def test_an_archive_has_the_size_of_a_tar(chunks: int, length: int) -> None:
    assert archive_size(chunks, length) == size(chunks, length)


@pytest.mark.parametrize(
    ("last", "legal"), [({}, True), ({"chunks": 3}, False), ({"chunks": 0}, False)]
)
def test_a_shard_has_the_chunks_that_it_must(
    tmp_path: Path, last: dict[str, int], legal: bool
) -> None:
    """All are full but the last, which may be; five chunks in shards of two."""
    content = manifest(chunks=5, per_shard=2)
    content["shards"][-1] |= last | ({"size": size(last["chunks"], 4)} if last else {})
    assert loads(tmp_path, content) == legal
    assert loads(tmp_path, manifest(chunks=4, per_shard=2))
    assert loads(tmp_path, manifest(chunks=1_000_000, per_shard=1_000_000))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_shard_is_as_long_as_its_chunks_make_it(tmp_path: Path, number: int) -> None:
    content = manifest(chunks=5, per_shard=2)
    content["shards"][number]["size"] += 512
    assert not loads(tmp_path, content)


def test_tokens_of_a_shard_are_its_share(tmp_path: Path) -> None:
    """22 tokens in chunks of 4 and shards of two of them: 8, 8, and 6 in the last."""
    content = manifest(chunks=6, per_shard=2) | {"tokens": 22}
    assert loads(tmp_path, content)
    found = Manifest.load(tmp_path)
    assert [found.tokens_in(shard) for shard in range(3)] == [8, 8, 6]


def test_a_file_larger_than_any_manifest_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_NAME
    path.touch()
    os.truncate(path, (1 << 30) + 1)  # takes no room: nothing is written
    with pytest.raises(UserError, match="larger than any manifest"):
        Manifest.load(tmp_path)
