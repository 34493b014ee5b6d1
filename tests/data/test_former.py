"""Data of the former version of the format: it reads as before, and is still what is written.

former.tar.xz holds a source, `in/text.jsonl`, and `out`, which shard.py made of it before there
were uint32 shards and masks, with --vocab-size 300 --chunk-length 32 --chunks-per-shard 16
--valid-fraction 0.2.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.lanes import LaneWindows, windows
from i3dist.data.shards import read_shard
from tests.data_prep.corpus import build, read_chunks, read_documents
from tests.data_prep.fuzzing import found

FINGERPRINT = "4d8d3331e4a8e9043f788061a973b601a79da7ea8ea0c7ed7aac0b5d4b9cf351"
"""Of the former output, as the former version computed it."""


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("former")
    with tarfile.open(Path(__file__).parent / "former.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_former_data_reads(former: Path) -> None:
    out = former / "out"
    corpus = Corpus.open(out, ModelSettings(chunk_length=32))
    assert corpus.fingerprint == FINGERPRINT
    lines = (former / "in" / "text.jsonl").read_text().splitlines()
    texts = {row["id"]: row["text"] for row in map(json.loads, lines)}
    read = {}
    for split in (corpus.train, corpus.valid):
        assert split.manifest.version == 1
        for number, shard in enumerate(split.manifest.shards):
            held = read_shard(split.folder, split.manifest, number)
            assert held.learned is None
            assert np.array_equal(held.tokens, read_chunks(out / split.manifest.split / shard.name))
        documents = read_documents(out / split.manifest.split, corpus.tokenizer)
        read |= {name: text for name, _, text in documents}
    assert read == texts
    assert found(out) == []


def test_all_tokens_of_former_data_are_learned(former: Path) -> None:
    corpus = Corpus.open(former / "out", ModelSettings(chunk_length=32))
    train, manifest = corpus.train, corpus.train.manifest
    reader = LaneWindows(train.folder, manifest, train.schedule(1, 1, 0, version=1), range(1))
    count = reader.schedule.windows_in_epoch(0)
    batches = windows(reader, 0, count, 0, torch.device("cpu"))
    targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
    first = [
        read_shard(train.folder, manifest, n).tokens[0, 0] for n in range(len(manifest.shards))
    ]
    continued = sum(token != manifest.bos_id for token in first)
    assert targets == manifest.tokens - manifest.documents - continued


def test_the_same_text_still_makes_the_same_files(former: Path, tmp_path: Path) -> None:
    """All of them, byte for byte; `source.json` holds times."""
    options = ("--chunk-length", 32, "--chunks-per-shard", 16, "--vocab-size", 300)
    build(former / "in" / "text.jsonl", tmp_path / "out", *options)
    names = [path.relative_to(former / "out") for path in (former / "out").rglob("*.*")]
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")} == {
        *names
    }
    for name in names:
        one, other = former / "out" / name, tmp_path / "out" / name
        if name.suffix == ".parquet":  # names the version of pyarrow
            assert pq.read_table(one).equals(pq.read_table(other))
        elif name.name != "source.json":
            assert one.read_bytes() == other.read_bytes(), name
