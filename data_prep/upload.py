"""Moves a complete output from the disk to a URL.

Each shard is removed from the disk as soon as it is at the URL. The manifests follow when all else
is there: they make the output complete. An upload that was stopped continues with the files that
are still on the disk.
"""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.output import EVIDENCE_NAME, SETTINGS_NAME, TOKENIZER_NAME
from data_prep.pack import INDEX_NAME
from data_prep.store import Store
from data_prep.workers import Report
from i3dist.data.manifest import MANIFEST_NAME, Manifest, Shard
from i3dist.errors import UserError
from i3dist.files import regular, remove

UPLOADS = 8
"""Files that are sent at once."""


def upload(folder: Path, store: Store, manifests: Mapping[str, Manifest], report: Report) -> None:
    """Move a complete output to a URL, manifests last.

    Args:
        folder: the output, of which a former upload may have moved a part.
        store: the folder at the URL.
        manifests: those of the splits, in the order in which they are to be written.
        report: called for each shard.
    """
    for split, manifest in manifests.items():
        _upload_shards(folder / split, store, manifest, report)
        _move(folder / split / INDEX_NAME, store)
        _remove_others(store, split, manifest)
    for name in (TOKENIZER_NAME, SETTINGS_NAME, EVIDENCE_NAME):
        if (folder / name).exists():
            store.put(folder / name, name)
    for split in manifests:
        store.put(folder / split / MANIFEST_NAME, f"{split}/{MANIFEST_NAME}")


def clear(folder: Path) -> None:
    """Remove what is left on the disk of an output that is at its URL."""
    for path in folder.iterdir():
        remove(path)


def _upload_shards(folder: Path, store: Store, manifest: Manifest, report: Report) -> None:
    with ThreadPoolExecutor(UPLOADS) as pool:
        for tokens in pool.map(_mover(folder, store, manifest), manifest.shards):
            report(1, tokens)


def _mover(folder: Path, store: Store, manifest: Manifest) -> Callable[[Shard], int]:
    """A function that moves a shard; returns its tokens."""

    def move(shard: Shard) -> int:
        path = folder / shard.name
        if path.exists():
            with regular(path).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise UserError(
                        f"{path} differs from its manifest: delete {folder.parent} and make it "
                        "again"
                    )
            _move(path, store)
        return shard.chunks * manifest.chunk_length

    return move


def _move(path: Path, store: Store) -> None:
    """Move a file of a split, unless a former upload did."""
    if path.exists():
        store.put(path, f"{path.parent.name}/{path.name}")
        path.unlink()


def _remove_others(store: Store, split: str, manifest: Manifest) -> None:
    """Remove what a former attempt with other settings of packing left."""
    needed = {MANIFEST_NAME, INDEX_NAME, *(shard.name for shard in manifest.shards)}
    for name in store.sizes(split).keys() - needed:
        store.remove(f"{split}/{name}")
