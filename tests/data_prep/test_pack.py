"""Shards, the index, and the naive packer with which packing is compared in test_packing.py."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import pack
from data_prep.pack import Framing, IndexWriter, chunks_per_shard, index_rows
from i3dist.data.archive import shard_bytes
from i3dist.data.manifest import archive_size, member_name, member_stride, shard_name
from tests.data_prep.corpus import read_chunks
from tests.data_prep.oracle import Packer, RowWriter

BOS, EOS, PAD = IDS = 2, 3, 1
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
@given(st.integers(1, 12), st.integers(2, 700), st.integers(0, 4_000_000))
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


@pytest.mark.parametrize("documents", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_an_index_does_not_show_how_its_rows_came(
    documents: int, at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.pack._ROWS_AT_A_TIME", 2)
    monkeypatch.setattr("tests.data_prep.oracle.ROWS_AT_A_TIME", 2)
    rows = [(n, 0, f"id {n}", "", 0, n, 1, 3) for n in range(documents)]
    naive = RowWriter(tmp_path)
    for row in rows:
        naive.add(row)
    naive.close()
    expected = (tmp_path / "index.parquet").read_bytes()
    index = IndexWriter(tmp_path)
    for start in range(0, documents, at_a_time):
        part = zip(*rows[start : start + at_a_time], strict=True)
        index.add(pa.table(list(map(pa.array, part)), schema=pack.INDEX_SCHEMA))
    index.close()
    assert (tmp_path / "index.parquet").read_bytes() == expected
    read = pq.read_table(tmp_path / "index.parquet").to_pylist()
    assert [row["id"] for row in read] == [f"id {number}" for number in range(documents)]


def test_the_index_of_a_document_over_three_shards_by_hand() -> None:
    """Shards of two chunks of four; documents of 5, 14 and 3 tokens from token 4 on."""
    bounds = np.array([4, 9, 23, 26])
    table = index_rows(7, bounds, pa.array(list("abc")), pa.array(list("xyz")), Framing(4, 2, *IDS))
    assert table.schema == pack.INDEX_SCHEMA
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (7, 0, "a", "x", 0, 1, 0, 4),
        (7, 1, "a", "x", 1, 0, 0, 1),
        (8, 0, "b", "y", 1, 0, 1, 7),
        (8, 1, "b", "y", 2, 0, 0, 7),
        (9, 0, "c", "z", 2, 1, 3, 1),
        (9, 1, "c", "z", 3, 0, 0, 2),
    ]


@pytest.mark.parametrize(
    ("tokens", "chunks"),
    [
        (1, 16),
        (16 * 512 * 512, 16),
        (32 * 512 * 512 - 1, 16),
        (32 * 512 * 512, 32),
        (42_329_639, 128),
        (2048 * 512 * 512 - 1, 1024),
        (2048 * 512 * 512, 2048),
        (10**10, 2048),
        (13 * 10**11, 2048),
    ],
)
def test_the_default_size_of_shards_gives_512_of_them_where_it_can(
    tokens: int, chunks: int
) -> None:
    assert chunks_per_shard(tokens, 512) == chunks
    assert chunks_per_shard(2 * tokens, 1024) == chunks
