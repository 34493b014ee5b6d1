"""The manifest: it loads what it wrote, and no bytes whatever get more than one line out of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from i3dist.data.manifest import (
    MANIFEST_NAME,
    TAR_BLOCK,
    Manifest,
    Shard,
    archive_size,
    member_name,
    member_stride,
    shard_name,
)
from i3dist.data.token_types import TOKEN_TYPES
from i3dist.errors import UserError

here = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    length = draw(st.integers(2, 600))
    per_shard = draw(st.integers(1, 50))
    chunks = draw(st.integers(1, 200))
    tokens = draw(st.integers((chunks - 1) * length + 1, chunks * length))
    tokens = max(tokens, 2)
    full, rest = divmod(chunks, per_shard)
    kind = draw(st.sampled_from([*TOKEN_TYPES.values()]))
    counts = [per_shard] * full + [rest] * bool(rest)
    return Manifest(
        split=draw(st.sampled_from(["train", "valid"])),
        chunk_length=length,
        chunks_per_shard=per_shard,
        version=kind.version,
        dtype=kind.name,  # type: ignore[arg-type]
        vocab_size=draw(st.integers(4, kind.vocabulary)),
        tokenizer_sha256=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        bos_id=2,
        eos_id=3,
        pad_id=1,
        source=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        seed=draw(st.integers(0, (1 << 63) - 1)),
        documents=draw(st.integers(1, tokens // 2)),
        tokens=tokens,
        chunks=chunks,
        shards=tuple(
            Shard(
                name=shard_name(i),
                chunks=n,
                size=archive_size(n, length, kind.dtype.itemsize),
                sha256="0" * 64,
            )
            for i, n in enumerate(counts)
        ),
    )


def example() -> dict[str, Any]:
    shards = [
        {"name": shard_name(i), "chunks": n, "size": archive_size(n, 512), "sha256": "a" * 64}
        for i, n in enumerate((4, 4, 1))
    ]
    return {
        "format": "i3dist-chunks",
        "version": 1,
        "split": "train",
        "chunk_length": 512,
        "chunks_per_shard": 4,
        "dtype": "uint16-le",
        "vocab_size": 300,
        "tokenizer_sha256": "b" * 64,
        "bos_id": 2,
        "eos_id": 3,
        "pad_id": 1,
        "source": "books",
        "seed": 0,
        "documents": 7,
        "tokens": 8 * 512 + 1,
        "chunks": 9,
        "shards": shards,
    }


def test_places_in_a_shard() -> None:
    assert member_name(3, 41) == "000003-000041.u16"
    assert member_name(3, 41, 4) == "000003-000041.u32"
    assert TAR_BLOCK == 512
    assert member_stride(512) == 1536
    assert member_stride(513) == 2048
    assert archive_size(1, 512) == 10_240
    assert archive_size(256, 512) == 399_360
    assert (member_stride(512, 4), archive_size(1, 512, 4)) == (2560, 10_240)


@here
@given(manifests())
def test_loading_gives_back_what_was_written(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [entry.name for entry in tmp_path.iterdir()] == [MANIFEST_NAME]


@here
@given(manifests(), manifests())
def test_fingerprints_are_equal_where_contents_are(one: Manifest, other: Manifest) -> None:
    assert (one.fingerprint == other.fingerprint) == (one == other)
    assert one.fingerprint == Manifest.model_validate_json(one.model_dump_json()).fingerprint
    assert one.fingerprint != one.model_copy(update={"seed": one.seed ^ 1}).fingerprint


def test_a_manifest_cannot_be_changed() -> None:
    manifest = Manifest.model_validate_json(json.dumps(example()))
    with pytest.raises(ValidationError):
        manifest.seed = 1  # type: ignore[misc]


@here
@given(st.data())
def test_whatever_the_file_holds_the_error_is_one_line(tmp_path: Path, data: st.DataObject) -> None:
    good = json.dumps(example()).encode()
    at = data.draw(st.integers(0, len(good)))
    until = data.draw(st.integers(at, len(good)))
    raw = data.draw(st.one_of(st.binary(), st.just(b"[" * 10_000), st.just(b'{"a\\n\\u2028":1}')))
    (tmp_path / MANIFEST_NAME).write_bytes(good[:at] + raw + good[until:])
    try:
        Manifest.load(tmp_path)
    except UserError as error:
        assert str(error).isprintable()
        assert MANIFEST_NAME in str(error)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chunks": True}, "chunks"),
        ({"chunks": "9"}, "chunks"),
        ({"chunks": 10}, "hold 9 chunks"),
        ({"tokens": 8 * 512}, "do not fill"),
        ({"tokens": 9 * 512 + 1}, "do not fill"),
        ({"documents": 0}, "documents"),
        ({"documents": 4000}, "need more than"),
        ({"chunk_length": 1 << 40}, "chunk_length"),
        ({"chunk_length": 1000}, "has size"),
        ({"vocab_size": 1 << 17}, "vocab_size"),
        ({"vocab_size": 3}, "below vocab_size"),
        ({"pad_id": 2}, "not all different"),
        ({"seed": -1}, "seed"),
        ({"tokenizer_sha256": "B" * 64}, "tokenizer_sha256"),
        ({"tokenizer_sha256": "b" * 64 + "\n"}, "tokenizer_sha256"),
        ({"split": "../train"}, "split"),
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"dtype": "uint32-le"}, "version 1 where dtype and keys are of 2"),
        ({"dtype": "uint32-le", "version": 2}, "has size"),
        ({"dtype": "uint32-le-masked", "version": 2, "vocab_size": (1 << 24) + 1}, "vocab_size"),
        ({"version": 3}, "version"),
        ({"shards": []}, "shards"),
        ({"shards": example()["shards"][::-1]}, "is named"),
        ({"shards": example()["shards"][:2], "chunks": 8, "tokens": 4000}, None),
        ({"shards": [{**example()["shards"][0], "name": "../x.tar"}]}, "is named"),
        ({"shards": [{**example()["shards"][0], "size": 1 << 60}]}, "shards.0.size"),
        ({"chunks_per_shard": 3}, "more than 3 chunks"),
        ({"chunks_per_shard": 8}, "not the last"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    tmp_path: Path, change: dict[str, Any], problem: str | None
) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(example() | change))
    if problem is None:
        Manifest.load(tmp_path)
        return
    with pytest.raises(UserError, match=problem):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("key", sorted(set(example()) - {"format", "version", "dtype"}))
def test_every_key_is_needed(tmp_path: Path, key: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(
        json.dumps({name: value for name, value in example().items() if name != key})
    )
    with pytest.raises(UserError, match=rf"{key}: Field required"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("key", ["a\nb", "\u2028", "\x07"])
def test_a_key_cannot_break_the_line(tmp_path: Path, key: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**example(), key: 1}))
    with pytest.raises(UserError) as caught:
        Manifest.load(tmp_path)
    assert str(caught.value).isprintable()


def test_a_missing_manifest_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"shard\.py --out {tmp_path}`"):
        Manifest.load(tmp_path / "train")
