"""Packing: the stream comes back from the shards whole, and the index finds every document."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.pack import Framing, Packer
from i3dist.data.archive import shard_bytes
from i3dist.data.manifest import archive_size, member_name, member_stride, shard_name
from tests.data_prep.corpus import read_chunks

BOS, EOS, PAD = 2, 3, 1
documents_strategy = st.lists(
    st.lists(st.integers(10, 65535), min_size=1, max_size=60), min_size=1, max_size=20
)


@settings(deadline=None, max_examples=150)
@given(documents_strategy, st.integers(2, 20), st.integers(1, 5))
def test_shards_hold_the_stream_and_the_index_every_piece(
    documents: list[list[int]], chunk_length: int, chunks_per_shard: int
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        packer = Packer(folder, Framing(chunk_length, chunks_per_shard, BOS, EOS, PAD))
        for number, ids in enumerate(documents):
            packer.add(f"id {number}", f"url {number}", np.array(ids, dtype=np.uint16))
        packer.close()
        shards = [read_chunks(folder / shard.name) for shard in packer.shards]
        index = pq.read_table(folder / "index.parquet").to_pylist()

    expected = [token for ids in documents for token in (BOS, *ids, EOS)]
    stream = np.concatenate(shards).reshape(-1).tolist()
    assert stream[: len(expected)] == expected
    padding = stream[len(expected) :]
    assert padding == [PAD] * len(padding) and len(padding) < chunk_length
    assert packer.tokens == len(expected) and packer.documents == len(documents)
    assert all(len(chunks) == chunks_per_shard for chunks in shards[:-1])
    assert 1 <= len(shards[-1]) <= chunks_per_shard

    pieces: dict[int, list[int]] = {}
    for row in index:
        pieces.setdefault(row["document"], [])
        start = row["chunk"] * chunk_length + row["offset"]
        assert row["offset"] < chunk_length
        flat = shards[row["shard"]].reshape(-1)
        pieces[row["document"]] += flat[start : start + row["length"]].tolist()
        assert row["id"] == f"id {row['document']}" and row["url"] == f"url {row['document']}"
    assert list(pieces.values()) == [[BOS, *ids, EOS] for ids in documents]
    assert len({(row["document"], row["shard"]) for row in index}) == len(index)
    for _, group in itertools.groupby(index, key=lambda row: row["document"]):
        rows = list(group)
        assert [row["piece"] for row in rows] == list(range(len(rows)))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(2, 700), st.integers(0, 999_999))
def test_every_chunk_stands_where_its_number_says(count: int, length: int, number: int) -> None:
    chunks = np.random.default_rng(0).integers(0, 1 << 16, (count, length), dtype=np.uint16)
    data = shard_bytes(number, chunks)
    assert len(data) == archive_size(count, length)
    for position, chunk in enumerate(chunks):
        start = position * member_stride(length)
        header = data[start : start + 512]
        assert header.startswith(member_name(number, position).encode() + b"\0")
        assert header[257:265] == b"ustar\x0000"
        payload = data[start + 512 : start + 512 + 2 * length]
        assert np.array_equal(np.frombuffer(payload, "<u2"), chunk)
    assert shard_name(number) == f"shard-{number:06d}.tar"


@pytest.mark.parametrize("documents", [0, 1, 2, 3])
def test_an_index_is_whole_where_its_last_rows_fill_a_group(
    documents: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.pack._ROWS_AT_A_TIME", 2)
    packer = Packer(tmp_path, Framing(4, 100, BOS, EOS, PAD))
    for number in range(documents):
        packer.add(f"id {number}", "", [7])
    packer.close()
    rows = pq.read_table(tmp_path / "index.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f"id {number}" for number in range(documents)]
