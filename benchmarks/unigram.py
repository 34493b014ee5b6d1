"""Measures the loss of a unigram model, which every language model should beat.

    python benchmarks/unigram.py DATA

It counts the tokens of DATA's train split (with add-one smoothing) and prints the mean loss of its
valid split under those frequencies, over the same targets as launch/evaluate.py.
"""

import json
from pathlib import Path

import numpy as np

from i3dist.cli.program import ArgumentParser
from i3dist.data.manifest import Manifest
from i3dist.data.shards import read_shard


def counts(folder: Path) -> np.ndarray:
    """Occurrences of each token as a target: [V]. <BOS> and <PAD> are never targets."""
    manifest = Manifest.load(folder)
    total = np.zeros(manifest.vocab_size, np.int64)
    for index in range(len(manifest.shards)):
        tokens = read_shard(folder, manifest, index).tokens.ravel()[1:]
        total += np.bincount(tokens, minlength=manifest.vocab_size)
    total[[manifest.bos_id, manifest.pad_id]] = 0
    return total


def main() -> None:
    """Print the figures as one JSON object."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="output folder of data_prep/shard.py")
    data = parser.parse_args().data
    train, valid = counts(data / "train"), counts(data / "valid")
    log_probability = np.log((train + 1) / (train + 1).sum())
    loss = -(valid * log_probability).sum() / valid.sum()
    print(json.dumps({"loss": round(float(loss), 4), "tokens": int(valid.sum())}))


if __name__ == "__main__":
    main()
