"""What a packed range has left on disk, so that a later run can tell whether it is still there."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from data_prep.evidence import Saved, State, state_of
from i3dist.data.manifest import Shard
from i3dist.files import write_whole


class PackedFile(Saved):
    """A finished file: its name in its folder, its SHA-256, and its state when it was finished."""

    name: str
    sha256: str
    state: State

    @classmethod
    def of(cls, path: Path, sha256: str) -> Self:
        """The file as it is now."""
        return cls(name=path.name, sha256=sha256, state=state_of(path))

    def shard(self, chunks: int) -> Shard:
        """The manifest's entry of a shard of so many chunks."""
        return Shard(name=self.name, chunks=chunks, size=self.state[0], sha256=self.sha256)

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is unchanged. It is read only if its times differ and its size not."""
        path = folder / self.name
        try:
            state = state_of(path)
            if state == self.state:
                return True
            with path.open("rb") as file:
                return state[0] == self.state[0] and _sha256(file) == self.sha256
        except FileNotFoundError:
            return False


def _sha256(file: object) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class RangeRecord(Saved):
    """The result of packing one range: written once its files are synced.

    `plan` is a digest of all that decides their bytes. A split's shards are those whose first token
    lies in the range. `index` holds the index rows of the range's documents, for each split that
    has any.
    """

    plan: str
    shards: Mapping[str, tuple[PackedFile, ...]]
    index: Mapping[str, PackedFile]

    def write(self, path: Path) -> None:
        """Write the record; a reader sees either the whole file or none."""
        write_whole(path, self.model_dump_json().encode())


class WorkFolder:
    """The folder of pass 2: shards by split in `splits`, records and index rows in `ranges`."""

    def __init__(self, splits: Path, ranges: Path) -> None:
        self._splits = splits
        self.ranges = ranges

    def split(self, name: str) -> Path:
        """Folder of a split's shards."""
        return self._splits / name

    def record(self, number: int) -> Path:
        """Path of the record of a range."""
        return self.ranges / f"range-{number:06d}.json"

    def index(self, number: int, split: str) -> Path:
        """Path of the index rows of a range and split."""
        return self.ranges / f"range-{number:06d}-{split}.arrow"

    def finished(self, number: int, plan: str) -> RangeRecord | None:
        """The record of a range that is packed by this plan, and whose files are whole."""
        record = RangeRecord.load(self.record(number))
        if record is None or record.plan != plan:
            return None
        files = [(self.split(split), f) for split, shards in record.shards.items() for f in shards]
        files += [(self.ranges, file) for file in record.index.values()]
        return record if all(file.is_whole(folder) for folder, file in files) else None

    def prepare(self, splits: Mapping[str, set[str]]) -> None:
        """Make the folders, and remove all shards but these names, given by split."""
        self.ranges.mkdir(parents=True, exist_ok=True)
        for name in splits:
            self.split(name).mkdir(parents=True, exist_ok=True)
        for path in self._splits.glob("*/*"):
            if path.name not in splits.get(path.parent.name, ()):
                path.unlink()
