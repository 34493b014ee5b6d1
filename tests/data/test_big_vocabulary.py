"""Token ids as large as there are: to 65,535 in shards of uint16, and above in those of uint32."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer

from data_prep import report, show, verify
from data_prep.pack import Framing
from data_prep.tokenizer import check_vocabulary, train_tokenizer
from i3dist.config import ModelSettings, Settings
from i3dist.data.corpus import Corpus
from i3dist.data.encoders import Gigatoken
from i3dist.data.lanes import LaneWindows, windows
from i3dist.data.manifest import Manifest
from i3dist.data.shards import ShardCache, read_shard
from i3dist.data.token_types import LARGEST_VOCABULARY
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from tests.data_prep import fuzzing
from tests.data_prep.corpus import build, read_documents
from tests.data_prep.fuzzing import found, goes_unnoticed
from tests.data_prep.oracle import Packer

LARGEST = 1 << 16  # entries of a vocabulary whose ids take two bytes
SPECIALS, BYTES = 13, 256


def vocabulary(entries: int, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> bytes:
    """A tokenizer.json of so many entries: specials, bytes, and pairs of bytes."""
    spec = json.loads(train_tokenizer(["a"], SPECIALS + BYTES))
    vocab = spec["model"]["vocab"]
    single = sorted((name for name, n in vocab.items() if n >= SPECIALS), key=vocab.get)
    # Pairs of letters come last, so that text has the largest ids.
    letters = sorted(single, key=lambda c: c.isascii() and c.isalpha())
    pairs = [[a, b] for a in letters for b in letters][-(entries - SPECIALS - BYTES) :]
    spec["model"]["merges"] = pairs
    vocab.update({a + b: SPECIALS + BYTES + n for n, (a, b) in enumerate(pairs)})
    edit(spec)
    return json.dumps(spec).encode()


@pytest.fixture(scope="module")
def just() -> Tokenizer:
    """With the largest id that takes two bytes."""
    return Tokenizer(vocabulary(LARGEST), Path("just"))


@pytest.mark.parametrize(
    "edit", [lambda _: None, lambda spec: spec["model"].update(ignore_merges=True)]
)
def test_ids_above_65535_survive(edit: Callable[[dict[str, Any]], object]) -> None:
    """By the fast way and by the library's own."""
    data = vocabulary(LARGEST + 100, edit)
    big, reference = Tokenizer(data, Path("big")), HFTokenizer.from_str(data.decode())
    assert big.vocab_size == LARGEST + 100
    texts = ["zz", "the zebra zzyzx", "", "zy " * 50]
    wanted = [reference.encode(text).ids for text in texts]
    assert max(map(max, filter(None, wanted))) > LARGEST
    assert [big.encode(text) for text in texts] == wanted
    assert [big.encode_utf8(text.encode()).tolist() for text in texts] == wanted
    assert [big.decode(ids) for ids in wanted] == texts
    assert [big.token_bytes()[ids].sum() for ids in wanted] == [len(text) for text in texts]


def test_an_id_of_a_vocabulary_of_65536_fits_two_bytes(just: Tokenizer) -> None:
    ids = just.encode_utf8(b"zz")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [LARGEST - 1]
    assert just.decode(ids) == "zz"


def test_the_largest_ids_of_a_shard_arrive_as_inputs_and_targets(
    just: Tokenizer, tmp_path: Path
) -> None:
    """From the packer through the archive to the batch; none turns negative or small."""
    ids = [LARGEST - 1, 1 << 15, (1 << 15) - 1, LARGEST - 2, 300, LARGEST - 1]
    (tmp_path / "tokenizer.json").write_bytes(just.data)
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        packer = Packer(tmp_path / split, Framing(4, 2, just.bos_id, just.eos_id, just.pad_id))
        packer.add("0", "", ids)
        packer.close()
        Manifest(
            split=split,
            chunk_length=4,
            chunks_per_shard=2,
            vocab_size=just.vocab_size,
            tokenizer_sha256=just.sha256,
            bos_id=just.bos_id,
            eos_id=just.eos_id,
            pad_id=just.pad_id,
            source="",
            seed=0,
            documents=1,
            tokens=8,
            chunks=2,
            shards=tuple(packer.shards),
        ).write(tmp_path / split)
    model = ModelSettings(vocab_size=LARGEST, chunk_length=4, latents=4)
    train = Corpus.open(tmp_path, model).train
    stream = [just.bos_id, *ids, just.eos_id]
    assert read_shard(train.folder, train.manifest, 0).tokens.ravel().tolist() == stream
    reader = LaneWindows(train.folder, train.manifest, train.schedule(1, 2, 0), range(1))
    batch = next(windows(reader, 0, 1, 0, torch.device("cpu")))
    assert batch.tokens.ravel().tolist() == stream
    assert batch.targets.ravel().tolist() == [*stream[1:], -100]


def specials_last(spec: dict[str, Any]) -> None:
    """As in vocabularies that lacked them at first."""
    vocab, added = spec["model"]["vocab"], spec["added_tokens"]
    for name, number in vocab.items():
        vocab[name] = (number - SPECIALS) % len(vocab)
    for token in added:
        token["id"] += len(vocab) - SPECIALS


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What shard.py makes with a vocabulary whose ids, also of <BOS>, do not fit two bytes."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "big.json").write_bytes(vocabulary(LARGEST + 100, specials_last))
    texts = [f"zz zy the zebra {n} " + "zx" * n for n in range(40)]
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    build(folder / "in.jsonl", folder / "out", "--tokenizer", folder / "big.json")
    return folder / "out"


def test_a_larger_vocabulary_is_stored_as_uint32(big: Path) -> None:
    corpus = Corpus.open(big, ModelSettings(chunk_length=64))
    assert corpus.tokenizer.vocab_size == LARGEST + 100
    for split in (corpus.train, corpus.valid):
        assert (split.manifest.version, split.manifest.dtype) == (2, "uint32-le")
        documents = read_documents(split.folder, corpus.tokenizer)
        assert all(text.startswith("zz zy the zebra") for _, _, text in documents)
        reader = LaneWindows(split.folder, split.manifest, split.schedule(1, 2, 0), range(1))
        batch = next(windows(reader, 0, 1, 0, torch.device("cpu")))
        bos, eos = split.manifest.bos_id, split.manifest.eos_id
        assert batch.tokens.max() == batch.targets.max() == eos > bos > LARGEST
        assert (batch.tokens == bos).any() and not (batch.targets == bos).any()
    assert found(big) == []


def test_a_big_vocabulary_is_verified_shown_and_described(
    big: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify.main([str(big)])
    show.main([str(big), "--shard", "0", "--chunk", "0"])
    report.main([str(big)])
    said = capsys.readouterr().out
    assert "sound; train" in said and "zz zy the zebra" in said and "65,636" in said


def test_wrong_tokens_of_uint32_shards_are_found(big: Path, tmp_path: Path) -> None:
    """Also ids that are small again when cut to two bytes."""
    out = fuzzing.copied(big, tmp_path / "out")
    fuzzing.rewrite(out / "train", 0, lambda ids: np.put(ids, [5, 9], [LARGEST + 100, LARGEST + 2]))
    assert any("not below vocab_size 65,636" in line for line in found(out))
    assert not any("special id" in line for line in found(out))


def test_random_changes_of_uint32_shards_are_found(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(big / "tokenizer.json")  # which takes longer than all checks
    monkeypatch.setattr("data_prep.checks.folder_check.Tokenizer.load", lambda _: tokenizer)
    out = fuzzing.copied(big, tmp_path / "out")
    missed = [how for seed in range(100) if (how := goes_unnoticed(big, Random(seed), out))]
    assert missed == []
    assert found(out) == []


def test_a_quarantined_shard_is_padding(big: Path, tmp_path: Path) -> None:
    out = fuzzing.copied(big, tmp_path / "out")
    path = out / "train" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    train = Corpus.open(out, ModelSettings(chunk_length=64)).train
    assert train.manifest.pad_id > LARGEST
    held = ShardCache(train.folder, train.manifest, 1, "quarantine")[0]
    assert (held.tokens == train.manifest.pad_id).all() and "quarantined" in held.damage


def test_added_tokens_count_for_the_size_of_ids() -> None:
    """Where they alone do not fit two bytes, text still gets ids of the type of shards."""
    spec = json.loads(vocabulary(LARGEST - 5, specials_last))
    for token in spec["added_tokens"]:
        del spec["model"]["vocab"][token["content"]]
        token["id"] += 10
    assert max(spec["model"]["vocab"].values()) < LARGEST < spec["added_tokens"][-1]["id"]
    assert Gigatoken(spec)(b"zebra").dtype == np.uint32


def test_a_vocabulary_beyond_all_limits_is_refused() -> None:
    tokenizer = SimpleNamespace(path="t.json", vocab_size=LARGEST_VOCABULARY + 1)
    with pytest.raises(UserError, match=r"vocabulary of 16777217, and a token .* 16777216 at most"):
        check_vocabulary(tokenizer, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="16777216"):
        Settings.load(None, ["model.vocab_size=16777217"])
