"""What a packed range has left on disk, so that a later run can tell whether it is still there."""

import hashlib
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from data_prep.arguments import TaskShare
from data_prep.evidence import Saved, State, state_of
from i3dist.data.manifest import Shard
from i3dist.files import regular, write_whole


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
            with regular(path).open("rb") as file:
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
    """The folder of pass 2, where ranges are packed by one plan.

    A shard is made in `making`. It comes to its split's folder when it is synced, so that several
    tasks may work here at once, even on the same range: whoever comes later replaces a shard by
    one of the same bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits = folder / "splits"
        self.counts = folder / "counts"
        self.ranges = folder / "ranges"
        self._making = folder / "making"

    def split(self, name: str) -> Path:
        """Folder of a split's finished shards."""
        return self.splits / name

    def merged(self, share: TaskShare) -> Path:
        """Folder of the runs that a task has merged for itself."""
        return self.folder / "merged" / f"{share.index}-of-{share.of}"

    def record(self, number: int) -> Path:
        """Path of the record of a range."""
        return self.ranges / f"range-{number:06d}.json"

    def index(self, number: int, split: str) -> Path:
        """Path of the index rows of a range and split."""
        return self.ranges / f"range-{number:06d}-{split}.arrow"

    def recorded(self, number: int, plan: str) -> RangeRecord | None:
        """The record of a range that was packed by this plan."""
        record = RangeRecord.load(self.record(number))
        return record if record and record.plan == plan else None

    def is_finished(self, number: int, plan: str) -> bool:
        """Whether a range is packed by this plan, and its files are whole."""
        record = self.recorded(number, plan)
        if record is None:
            return False
        files = [(self.split(split), f) for split, shards in record.shards.items() for f in shards]
        files += [(self.ranges, file) for file in record.index.values()]
        return all(file.is_whole(folder) for folder, file in files)

    def prepare(self, splits: Iterable[str]) -> None:
        """Make the folders."""
        for folder in (self.ranges, *map(self.split, splits)):
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def making(self, splits: Iterable[str]) -> Iterator[Path]:
        """A folder to make shards in, with one for each split; afterwards it is gone."""
        folder = self._making / secrets.token_hex(8)
        try:
            for split in splits:
                (folder / split).mkdir(parents=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove what killed processes have left unfinished, when no other is at work."""
        shutil.rmtree(self._making, ignore_errors=True)
        for other in self.folder.parent.glob("*"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
