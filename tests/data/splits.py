"""Splits of made-up documents, written as data_prep writes them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.pack import Framing
from i3dist.data.corpus import Split
from tests.data_prep.oracle import Packer

BOS, EOS, PAD = 2, 3, 1


def documents_of(seed: int, lengths: Sequence[int], vocab: int) -> list[list[int]]:
    """Random documents of these lengths in tokens, <BOS> and <EOS> left out."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocab, length).tolist() for length in lengths]


def split_of(
    folder: Path,
    documents: Sequence[Sequence[int]],
    length: int,
    per_shard: int,
    vocab: int,
    tokenizer_sha256: str = "0" * 64,
    dtype: str = "uint16-le",
) -> Split:
    """A split of these documents in chunks of `length` tokens, named after its folder.

    Their tokens are given as they are stored.
    """
    folder.mkdir(parents=True)
    packer = Packer(folder, Framing(length, per_shard, BOS, EOS, PAD, dtype))
    for number, ids in enumerate(documents):
        packer.add(str(number), "", ids)
    packer.close()
    manifest = packer.manifest(
        split=folder.name,
        vocab_size=vocab,
        tokenizer_sha256=tokenizer_sha256,
        source="known",
        seed=0,
    )
    manifest.write(folder)
    return Split(folder, manifest)
