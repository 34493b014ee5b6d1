"""The output folder: who may write into it, with what settings, and when it is complete.

`shard.json` says what the folder is made from. All work goes on in `.work`; at the end the splits
are moved into place and their manifests are written. With them the folder counts as complete.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from i3dist.data.manifest import MANIFEST_NAME, Manifest
from i3dist.errors import UserError

TRAIN, VALID = "train", "valid"
_SETTINGS_NAME = "shard.json"
_TOKENIZER_NAME = "tokenizer.json"
_WORK_NAME = ".work"


class Settings(BaseModel):
    """Everything that decides the bytes of the output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: int = 1
    source: str
    revision: str
    tokenizer: str
    tokenizer_sample_mb: int
    vocab_size: int
    chunk_length: int
    chunks_per_shard: int
    valid_fraction: float
    seed: int

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order in which their manifests are written."""
        return (VALID, TRAIN) if self.valid_fraction else (TRAIN,)

    def difference(self, other: "Settings") -> str | None:
        """The first setting that differs from `other`, in words."""
        for name, value in self.model_dump().items():
            theirs = getattr(other, name)
            if name == "revision" and theirs != value:
                return "from other content of the same source"
            if theirs != value:
                return f"with {name.replace('_', '-')} {value}, not {theirs}"
        return None


class Output:
    """The folder DIR."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / _WORK_NAME / "runs"
        self.staging = folder / _WORK_NAME / "splits"
        self.tokenizer = folder / _TOKENIZER_NAME

    def settings(self) -> Settings | None:
        """What the folder is being made from, or None where it is new."""
        path = self.folder / _SETTINGS_NAME
        try:
            return Settings.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValidationError:
            raise UserError(f"{path} is damaged: choose another --out, or delete it") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep other runs out; a folder left empty is removed again."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"cannot write to --out {self.folder}: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(f"another run is writing {self.folder}: wait for it") from None
        finally:
            os.close(handle)
            with suppress(OSError):
                self.folder.rmdir()

    def is_complete(self, settings: Settings) -> bool:
        """Whether all is done. Other settings than `settings`, or damage, are a `UserError`."""
        former = self.settings()
        if former is None:
            if any(entry.name != _WORK_NAME for entry in self.folder.iterdir()):
                raise UserError(f"{self.folder} holds other files: choose another --out")
            return False
        if difference := former.difference(settings):
            raise UserError(
                f"{self.folder} was made {difference}: choose another --out, or delete it"
            )
        folders = [self.folder / split for split in settings.splits]
        if not all((folder / MANIFEST_NAME).exists() for folder in folders):
            return False
        for folder in folders:
            _check_shards(folder)
        self._discard_work()
        return True

    def begin(self, settings: Settings, tokenizer: bytes) -> None:
        """Write down what the folder is made from; does nothing where a run is continued."""
        self.runs.mkdir(parents=True, exist_ok=True)
        _write(self.folder / _SETTINGS_NAME, settings.model_dump_json(indent=1).encode(), self.runs)
        _write(self.tokenizer, tokenizer, self.runs)

    def stage(self, split: str) -> Path:
        """An empty folder to write `split` into."""
        folder = self.staging / split
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def publish(self, manifests: Mapping[str, Manifest]) -> None:
        """Move the staged splits into place, and write their manifests last."""
        for split in manifests:
            final = self.folder / split
            (final / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(final, ignore_errors=True)
            (self.staging / split).rename(final)
        for split, manifest in manifests.items():
            manifest.write(self.folder / split)
        self._discard_work()

    def _discard_work(self) -> None:
        shutil.rmtree(self.folder / _WORK_NAME, ignore_errors=True)


def _write(path: Path, data: bytes, work: Path) -> None:
    temporary = work / f".{path.name}.{os.getpid()}"
    temporary.write_bytes(data)
    temporary.replace(path)


def _check_shards(folder: Path) -> None:
    for shard in Manifest.load(folder).shards:
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            found = "missing" if size is None else f"{size} bytes long, not {shard.size}"
            raise UserError(f"{path} is {found}: delete {folder.parent} and make it again")
