"""Checks an output folder apart from the content of shards and indexes.

Which files there are, manifests, the tokenizer, and whether they and shard.json agree.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from data_prep.checks.damage import Damage
from data_prep.output import (
    EVIDENCE_NAME,
    SETTINGS_NAME,
    TOKENIZER_NAME,
    TRAIN,
    VALID,
    Output,
    OutputSettings,
)
from data_prep.pack import INDEX_NAME
from data_prep.store import Store
from i3dist.data.manifest import MANIFEST_NAME, Manifest
from i3dist.data.shard_table import shard_name
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError

SPLITS = (TRAIN, VALID)


class FolderCheck:
    """An output folder: its settings, tokenizer and manifests, as far as they can be read."""

    def __init__(self, folder: Path, store: Store | None = None) -> None:
        """Read the small files of a folder; those of a `store` have been copied to it (`mirror`).

        Raises:
            UserError: the folder is not there, or holds no split.
        """
        self.folder, self.store = folder, store
        self.damages: list[Damage] = []
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: name an output of data_prep/shard.py")
        self.splits = [split for split in SPLITS if (folder / split).is_dir()]
        if not self.splits:
            raise UserError(
                f"{store or folder} holds neither train/ nor valid/: name a finished output"
            )
        self.settings = self._settings()
        self.tokenizer = self._tokenizer()
        self.manifests = {split: m for split in self.splits if (m := self._manifest(split))}
        self.damages += self._listing()
        for split, manifest in self.manifests.items():
            self.damages += self._files_of_split(split, manifest)
            self.damages += self._agreement(split, manifest)
        self.damages += _between_splits(self.manifests, self.settings)
        if self.settings and set(self.manifests) == set(self.settings.splits):
            own = (TRAIN,) if self.settings.valid else self.settings.splits
            counted = [m for split, m in self.manifests.items() if split in own]
            self.damages += _totals_of_sources(counted)

    def _settings(self) -> OutputSettings | None:
        output = Output(self.folder)
        try:
            output.evidence()
        except (UserError, OSError):
            self.damages.append(Damage(EVIDENCE_NAME, "", "is damaged"))
        try:
            return output.settings()
        except (UserError, OSError):
            self.damages.append(Damage(SETTINGS_NAME, "", "is damaged"))
        return None

    def _tokenizer(self) -> Tokenizer | None:
        path = self.folder / TOKENIZER_NAME
        if not path.exists():
            return None  # `_listing` says so
        try:
            return Tokenizer.load(path)
        except UserError as error:
            problem = str(error).removeprefix(str(path)).lstrip(": ")
            self.damages.append(Damage(TOKENIZER_NAME, "", problem))
        return None

    def _manifest(self, split: str) -> Manifest | None:
        path = self.folder / split / MANIFEST_NAME
        try:
            return Manifest.load(path.parent)
        except UserError as error:
            problem = str(error).removeprefix(f"{path} ")
            if self.store:
                problem = problem.replace(str(self.folder), str(self.store))
            self.damages.append(Damage(f"{split}/{MANIFEST_NAME}", "", problem, ""))
        return None

    def _listing(self) -> Iterator[Damage]:
        """Files and folders of DIR that are missing, or do not belong there."""
        needed = {TOKENIZER_NAME, SETTINGS_NAME, TRAIN}
        if self.settings is None or VALID in self.settings.splits:
            needed.add(VALID)
        yield from self._compare("", needed, {EVIDENCE_NAME, *self.splits})

    def _files_of_split(self, split: str, manifest: Manifest) -> Iterator[Damage]:
        """Files of a split that are missing, or do not belong there."""
        shards = set(map(shard_name, range(len(manifest.shards))))
        yield from self._compare(f"{split}/", {MANIFEST_NAME, INDEX_NAME, *shards}, set())

    def _compare(self, below: str, needed: set[str], allowed: set[str]) -> Iterator[Damage]:
        found = set(
            self.store.sizes(below.rstrip("/")) if self.store else os.listdir(self.folder / below)
        )
        for name in sorted(needed - found):
            yield Damage(below + name, "", "is missing")
        for name in sorted(found - needed - allowed):
            remedy = "run shard.py again, or remove it" if name == ".work" else "remove it"
            yield Damage(below + name, "", "does not belong to the output", remedy)

    def _agreement(self, split: str, manifest: Manifest) -> Iterator[Damage]:
        """Whether a manifest agrees with its folder, the tokenizer and shard.json."""
        wanted: list[tuple[str, object, str]] = [("split", split, "its folder")]
        if self.tokenizer:
            names = ("vocab_size", "bos_id", "eos_id", "pad_id")
            wanted += [(name, getattr(self.tokenizer, name), TOKENIZER_NAME) for name in names]
            wanted.append(("tokenizer_sha256", self.tokenizer.sha256, TOKENIZER_NAME))
        if self.settings:
            wanted.append(("source", self.settings.source_of(split), SETTINGS_NAME))
            for name in ("seed", "chunk_length", "chunks_per_shard"):
                wanted.append((name, getattr(self.settings, name), SETTINGS_NAME))
        if self.settings and self.settings.tokenizer.startswith("sha256 "):
            given = self.settings.tokenizer.removeprefix("sha256 ")
            wanted.append(("tokenizer_sha256", given, SETTINGS_NAME))
        if self.tokenizer and self.settings:
            kind = self.settings.token_type(self.tokenizer.vocab_size)
            wanted.append(("dtype", kind.name, f"{SETTINGS_NAME} and {TOKENIZER_NAME}"))
        for name, value, where in wanted:
            stated = getattr(manifest, name)
            if stated != value:
                problem = f"says {stated!r}, {where} {value!r}"
                yield Damage(f"{split}/{MANIFEST_NAME}", f"key {name}", problem)
        if self.settings and self.settings.chooses and manifest.dropped is None:
            problem = f"is missing, and {SETTINGS_NAME} says that documents were chosen"
            yield Damage(f"{split}/{MANIFEST_NAME}", "key dropped", problem)


def mirror(store: Store, folder: Path) -> None:
    """Copy all files of an output at a URL but its shards, as far as they are there."""
    names = [SETTINGS_NAME, EVIDENCE_NAME, TOKENIZER_NAME]
    for split in SPLITS:
        if store.sizes(split):
            (folder / split).mkdir()
            names += [f"{split}/{MANIFEST_NAME}", f"{split}/{INDEX_NAME}"]
    for name in names:
        with suppress(FileNotFoundError):
            store.fetch(name, folder / name)


def _between_splits(
    manifests: Mapping[str, Manifest], settings: OutputSettings | None
) -> Iterator[Damage]:
    """Whether both splits were made in one go."""
    if len(manifests) < 2:
        return
    train, valid = (manifests[split] for split in SPLITS)
    names = ["chunk_length", "chunks_per_shard", "source", "dropped", "seed"]
    if settings and settings.valid:  # each split has a source of its own
        names = [name for name in names if name not in ("source", "dropped")]
    for name in names:
        if getattr(train, name) != getattr(valid, name):
            problem = f"says {getattr(valid, name)!r}, that of {TRAIN} {getattr(train, name)!r}"
            yield Damage(f"{VALID}/{MANIFEST_NAME}", f"key {name}", problem)
    if not (settings and settings.valid) and train.sources != valid.sources:
        problem = f"says something else than that of {TRAIN}"
        yield Damage(f"{VALID}/{MANIFEST_NAME}", "key sources", problem)


def _totals_of_sources(manifests: Sequence[Manifest]) -> Iterator[Damage]:
    """Whether all sources together have what all splits together have."""
    sources = manifests[0].sources
    for name in ("documents", "tokens") if sources else ():
        stated = sum(getattr(source, name) for source in sources or ())
        found = sum(getattr(manifest, name) for manifest in manifests)
        if stated != found:
            problem = f"the sources have {stated:,} {name}, the splits {found:,}"
            yield Damage(f"{manifests[0].split}/{MANIFEST_NAME}", "key sources", problem)
