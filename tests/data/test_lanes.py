"""Every token of an epoch is an input exactly once, whoever reads it, with any number of hands."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.data.schedule import lanes_of_rank
from i3dist.data.shards import read_shard
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.export.description import tokenizer_file
from i3dist.ops.cross_entropy import IGNORE

CPU = torch.device("cpu")
LANES, K = 4, 3


@pytest.fixture(scope="module")
def corpus(data: Path) -> Corpus:
    return Corpus.open(data, ModelSettings())


def dataset(corpus: Corpus, lanes: range = range(LANES), seed: int = 1) -> LaneWindows:
    train = corpus.train
    schedule = train.schedule(LANES, K, seed, version=1)  # whose epochs end in a window
    return LaneWindows(train.folder, train.manifest, schedule, lanes)


def one_epoch(reader: LaneWindows, workers: int = 0) -> list[Batch]:
    count = reader.schedule.windows_in_epoch(0)
    return list(windows(reader, 0, count, workers, CPU))


def test_an_epoch_holds_every_chunk_once(corpus: Corpus) -> None:
    manifest, folder = corpus.train.manifest, corpus.train.folder
    stored = Counter(
        chunk.tobytes()
        for i in range(len(manifest.shards))
        for chunk in read_shard(folder, manifest, i).tokens
    )
    padding = np.full(manifest.chunk_length, manifest.pad_id, np.uint16).tobytes()
    read = Counter(
        chunk.numpy().astype(np.uint16).tobytes()
        for batch in one_epoch(dataset(corpus))
        for chunk in batch.tokens.flatten(0, 1)
    )
    del read[padding]  # idle lanes
    assert read == stored


def test_every_document_token_is_a_target_once(corpus: Corpus) -> None:
    """All but <BOS>, and but the first of a shard, whose history lies in another."""
    manifest, folder = corpus.train.manifest, corpus.train.folder
    expected: Counter[int] = Counter()
    for i in range(len(manifest.shards)):
        tokens = read_shard(folder, manifest, i).tokens.ravel()[1:]
        expected.update(t for t in tokens.tolist() if t not in (manifest.bos_id, manifest.pad_id))
    found: Counter[int] = Counter()
    for batch in one_epoch(dataset(corpus)):
        found.update(batch.targets[batch.targets != IGNORE].tolist())
    assert found == expected


@pytest.mark.parametrize("workers", [1, 3])
def test_the_stream_is_the_same_for_any_number_of_workers(corpus: Corpus, workers: int) -> None:
    alone, shared = one_epoch(dataset(corpus)), one_epoch(dataset(corpus), workers)
    for a, b in zip(alone, shared, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_stream_is_the_same_for_any_number_of_ranks(corpus: Corpus, world_size: int) -> None:
    whole = one_epoch(dataset(corpus))
    ranks = [
        one_epoch(dataset(corpus, lanes_of_rank(LANES, rank, world_size)))
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for field, *pieces in zip(batch, *parts, strict=True):
            assert torch.equal(torch.cat(pieces), field)


def test_a_run_that_starts_in_the_middle_reads_on(corpus: Corpus) -> None:
    whole = one_epoch(dataset(corpus))
    rest = list(windows(dataset(corpus), 2, len(whole), 0, CPU))
    for a, b in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_history_restarts_where_the_document_does(corpus: Corpus) -> None:
    """Depth along a lane: 0 at <BOS> and at a shard's start, else one more than before."""
    bos = corpus.train.manifest.bos_id
    batches = one_epoch(dataset(corpus))
    schedule = dataset(corpus).schedule
    for lane in range(LANES):
        open_for = 0
        for index, batch in enumerate(batches):
            for k, place in enumerate(schedule.chunks(index, lane)):
                tokens, depth = batch.tokens[lane, k], int(batch.depth[lane, k])
                if place is None:
                    assert depth == 0
                    continue
                starts = place[1] == 0 or tokens[0] == bos
                assert depth == (0 if starts else open_for)
                open_for = 1 if (tokens == bos).any() else depth + 1


def test_a_bad_shard_stops_the_reader_in_one_line(corpus: Corpus, tmp_path: Path) -> None:
    reader = dataset(corpus)
    reader.shards.folder = tmp_path
    for workers in (0, 1):
        with pytest.raises(UserError, match="shard cannot be read") as error:
            next(windows(reader, 0, 4, workers, CPU))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chunk_length": 256}, "model.chunk_length=256 but .* has chunks of 512"),
        ({"vocab_size": 300}, "model.vocab_size=300 but the data's tokenizer has 512"),
    ],
)
def test_data_of_another_shape_is_refused(data: Path, changes: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Corpus.open(data, ModelSettings.model_validate(changes))


def test_another_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "manifest.json").write_bytes(
            (data / split / "manifest.json").read_bytes()
        )
    tokenizer = (data / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer + "\n")
    with pytest.raises(UserError, match="is not the tokenizer that made"):
        Corpus.open(tmp_path, ModelSettings())


def test_an_exports_tokenizer_is_not_another(data: Path, tmp_path: Path) -> None:
    """Its file differs from the run's, and gives every text the same ids."""
    file = tokenizer_file(Tokenizer.load(data / "tokenizer.json"))
    exported = Tokenizer(json.dumps(file).encode(), tmp_path / "tokenizer.json")
    assert Corpus.open(data, ModelSettings(), exported).tokenizer.sha256 != exported.sha256


def test_missing_data_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_prep/shard\.py"):
        Corpus.open(tmp_path / "nowhere", ModelSettings())
