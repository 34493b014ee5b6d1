"""An output of data_prep/shard.py, opened for training: two splits and a tokenizer."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from i3dist.cli.paths import Place
from i3dist.config import DataSettings, ModelSettings
from i3dist.data.folder import Folder, open_folder
from i3dist.data.held_out import HeldOut
from i3dist.data.manifest import Manifest
from i3dist.data.schedule import (
    NEWEST,
    EpochSchedule,
    LaneSchedule,
    Schedule,
    Version,
    fixed_subset,
)
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError

# The validation subset does not depend on the run's seed, so that runs can be compared.
SUBSET_SEED = 0


@dataclass(frozen=True)
class Split:
    """One stream of chunks, cut into shards."""

    folder: Folder
    manifest: Manifest

    def schedule(
        self, lanes: int, window: int, seed: int, version: Version = NEWEST
    ) -> LaneSchedule:
        """The order in which `lanes` lanes read this split, in windows of `window` chunks."""
        sizes = self.manifest.shard_chunks
        return (EpochSchedule if version == 1 else Schedule)(sizes, lanes, window, seed)

    def held_out(self, history_chunks: int, chunks: int | None = None) -> HeldOut:
        """The split for evaluation: all of it, or whole shards with `chunks` chunks or more."""
        sizes = self.manifest.shard_chunks
        shards = range(len(sizes)) if chunks is None else fixed_subset(sizes, chunks, SUBSET_SEED)
        return HeldOut(self.folder, self.manifest, shards, history_chunks)


@dataclass(frozen=True)
class Corpus:
    """Everything a run reads."""

    train: Split
    valid: Split
    tokenizer: Tokenizer

    @classmethod
    def open(
        cls,
        place: Place,
        model: ModelSettings,
        trained_with: Tokenizer | None = None,
        data: DataSettings | None = None,
    ) -> "Corpus":
        """Open a data folder, and check that its parts and the model's settings fit together.

        Args:
            place: path or URL of an output folder of data_prep/shard.py.
            model: settings of the model that is to read it.
            trained_with: the tokenizer of a trained model, which the data must have too.
            data: settings that say where shards from a URL are cached.

        Raises:
            UserError: a part is missing or of other data; the chunk length or the vocabulary is not
                the model's.
        """
        path = open_folder(place, data)
        if isinstance(path, Path) and (path / "train").is_dir() and not (path / "valid").exists():
            raise UserError(f"{path} has no valid split: make data with a --valid-fraction above 0")
        splits = {
            name: Split(path / name, Manifest.load(path / name)) for name in ("train", "valid")
        }
        try:
            tokenizer = Tokenizer.load(path / "tokenizer.json")
        except UserError as error:
            raise UserError(f"{error}; restore it, or make the data again") from None
        corpus = cls(splits["train"], splits["valid"], tokenizer)
        corpus._check(path, model, trained_with)
        return corpus

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of both splits' manifests, which hold the hash of every shard."""
        return fingerprint_of(self.train.manifest, self.valid.manifest)

    def _check(self, path: Folder, model: ModelSettings, trained_with: Tokenizer | None) -> None:
        """Raise `UserError` unless the parts fit together, and a model's settings fit them."""
        tokenizer = self.tokenizer
        if trained_with is not None and not trained_with.encodes_like(tokenizer):
            raise UserError(
                f"{path} was made with another tokenizer than {trained_with.path}; "
                f"make it again with --tokenizer {trained_with.path}"
            )
        for split in (self.train, self.valid):
            if split.manifest.tokenizer_sha256 != tokenizer.sha256:
                raise UserError(
                    f"{tokenizer.path} is not the tokenizer that made {split.folder}; "
                    f"restore it or make the data again (delete {path} first)"
                )
            length = split.manifest.chunk_length
            if length != model.chunk_length:
                # The settings of a trained model stay what they are.
                choice = "" if trained_with else f"set model.chunk_length={length} or "
                raise UserError(
                    f"model.chunk_length={model.chunk_length} but {split.folder} has chunks of "
                    f"{length} tokens; {choice}make other data with --chunk-length "
                    f"{model.chunk_length}"
                )
        if model.vocab_size not in ("auto", tokenizer.vocab_size):
            raise UserError(
                f"model.vocab_size={model.vocab_size} but the data's tokenizer has "
                f"{tokenizer.vocab_size} entries; leave it at auto"
            )


def fingerprint_of(train: Manifest, valid: Manifest) -> str:
    """As `Corpus.fingerprint`, of the manifests alone."""
    return hashlib.sha256((train.fingerprint + valid.fingerprint).encode()).hexdigest()
