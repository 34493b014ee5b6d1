"""Packed documents of random tokens, in the format that training reads.

Notation: B rows, T tokens.

Lengths are log-normal with a mean of 1,030 tokens and a median of 512, as measured on FineWeb-Edu
(Penedo et al., 2024, arXiv:2406.17557) when the format was designed. Token frequencies follow the
Zipf-Mandelbrot law, so that rows of the embedding get as unequal gradients as in text.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.pack import write_shard
from i3dist.data.lanes import Batch, LaneWindows
from i3dist.data.manifest import Manifest
from i3dist.data.schedule import Schedule
from i3dist.errors import UserError
from i3dist.ops.cross_entropy import IGNORE

MEAN_TOKENS, MEDIAN_TOKENS = 1030, 512
PAD, BOS, EOS, SPECIALS = 1, 2, 3, 13
FIRST_CHUNK = 32  # of a shard, where batches that are used again and again begin


@dataclass(frozen=True)
class Data:
    """A split on disk, and its stream."""

    folder: Path
    manifest: Manifest
    stream: NDArray[np.uint16]  # all chunks, one after the other

    @classmethod
    def write(
        cls, folder: Path, vocab: int, chunk_length: int, shards: int, chunks_per_shard: int
    ) -> "Data":
        """Make the stream and write its shards and manifest into `folder`."""
        tokens, documents = make_stream(
            vocab, shards * chunks_per_shard * chunk_length, chunk_length
        )
        parts = tokens.reshape(shards, chunks_per_shard, chunk_length)
        manifest = Manifest(
            split="train",
            chunk_length=chunk_length,
            chunks_per_shard=chunks_per_shard,
            vocab_size=vocab,
            tokenizer_sha256="0" * 64,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            source="synthetic",
            seed=0,
            documents=documents,
            tokens=tokens.size,
            chunks=shards * chunks_per_shard,
            shards=tuple(write_shard(folder, i, part) for i, part in enumerate(parts)),
        )
        manifest.write(folder)
        return cls(folder, manifest, tokens)

    def lane_windows(self, lanes: int, window: int, own: range | None = None) -> LaneWindows:
        """The windows of the lanes that a rank reads, `own`, of so many in all; by default all."""
        sizes = tuple(shard.chunks for shard in self.manifest.shards)
        schedule = Schedule(sizes, lanes, window, seed=0)
        return LaneWindows(self.folder, self.manifest, schedule, own or range(lanes))

    def rows(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets [B, T] of successive pieces of the stream."""
        piece = torch.from_numpy(self.stream[: rows * length + 1].astype(np.int64))
        targets = piece[1:].clone()
        targets[targets == BOS] = IGNORE
        return piece[:-1].view(rows, length), targets.view(rows, length)


def make_stream(vocab: int, size: int, chunk_length: int) -> tuple[NDArray[np.uint16], int]:
    """``<BOS> document <EOS> <BOS> ...``, cut after `size` tokens, and the number of documents.

    Lengths are in proportion to `chunk_length`, and as above where that is 512.
    """
    random = np.random.default_rng(0)
    frequency = np.cumsum(1.0 / (np.arange(1, vocab - SPECIALS + 1) + 2.7))
    uniform = random.random(size) * frequency[-1]
    stream = (SPECIALS + np.searchsorted(frequency, uniform, side="right")).astype(np.uint16)
    scale = chunk_length / 512
    sigma = math.sqrt(2 * math.log(MEAN_TOKENS / MEDIAN_TOKENS))
    more_than_needed = int(2 * size / (scale * MEAN_TOKENS))
    lengths = random.lognormal(math.log(scale * MEDIAN_TOKENS), sigma, more_than_needed)
    starts = np.concatenate([[0], np.cumsum(np.maximum(lengths, 3).astype(np.int64))])
    starts = starts[starts < size]
    stream[starts] = BOS
    stream[starts[1:] - 1] = EOS
    return stream, len(starts)


def batches(windows: LaneWindows, count: int, device: torch.device) -> list[Batch]:
    """Successive windows from the middle of shards, where chunks have their history."""
    first = FIRST_CHUNK // windows.schedule.window
    found = [windows[index] for index in range(first, first + count)]
    return [read[0].to(device) for read in found if not isinstance(read, UserError)]
