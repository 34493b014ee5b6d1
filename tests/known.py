"""Training data made token by token, so that a test knows all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.tokenizer import train_tokenizer
from i3dist.data.tokenizer import Tokenizer
from tests.data.splits import BOS, EOS, PAD, split_of

CHUNK, PER_SHARD = 8, 4
# Settings of a tiny model that reads such data.
MODEL = {
    "model.vocab_size": 271,
    "model.d_model": 16,
    "model.layers": "1xrwkv,1xattention",
    "model.heads": 2,
    "model.chunk_length": CHUNK,
    "model.latents": 2,
    "model.sub_latents": 2,
    "model.history_chunks": 2,
}
TOKENIZER = train_tokenizer(["ab ab ab"], 300)


@dataclass(frozen=True)
class Known:
    """A data folder, and what its shards hold."""

    folder: Path
    shards: dict[str, list[NDArray[np.int64]]]
    """By split: each shard's tokens [N, CHUNK]."""

    def targets(self, split: str, shard: int) -> NDArray[np.int64]:
        """[N, CHUNK]: the token behind each; -100 where none is to be predicted."""
        tokens = self.shards[split][shard]
        after = np.append(tokens.ravel()[1:], PAD).reshape(tokens.shape)
        return np.where((after == BOS) | (after == PAD), -100, after)

    def depth(self, split: str, shard: int) -> list[int]:
        """Chunks of the shard before each that hold a part of the document that it continues."""
        begins = [np.flatnonzero(chunk == BOS).tolist() for chunk in self.shards[split][shard]]
        depths = []
        for chunk in range(len(begins)):
            before = [c for c in range(chunk) if begins[c]]
            depths.append(0 if 0 in begins[chunk] else chunk - max(before, default=0))
        return depths


def documents(seed: int, count: int) -> list[list[int]]:
    """Texts of 1 to 60 random tokens, none special; the second begins where a chunk does."""
    rng = np.random.default_rng(seed)
    lengths = [2 * CHUNK - 2, *rng.integers(1, 61, count - 1).tolist()]
    return [rng.integers(13, 271, length).tolist() for length in lengths]


def make(folder: Path, train: Sequence[Sequence[int]], valid: Sequence[Sequence[int]]) -> Known:
    """Write both splits and the tokenizer to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    shards = {name: _split(folder, name, d) for name, d in (("train", train), ("valid", valid))}
    return Known(folder, shards)


def _split(folder: Path, name: str, texts: Sequence[Sequence[int]]) -> list[NDArray[np.int64]]:
    tokenizer = Tokenizer(TOKENIZER, folder / "tokenizer.json")
    vocab, sha256 = tokenizer.vocab_size, tokenizer.sha256
    split_of(folder / name, texts, CHUNK, PER_SHARD, vocab, sha256)
    stream = [token for ids in texts for token in (BOS, *ids, EOS)]
    stream += [PAD] * (-len(stream) % CHUNK)
    chunks = np.array(stream).reshape(-1, CHUNK)
    return [chunks[i : i + PER_SHARD] for i in range(0, len(chunks), PER_SHARD)]
