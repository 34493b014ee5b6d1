"""The output folder: its lock, what it was begun with, and when it is complete.

`shard.json` holds its settings (`output_settings`). The work is done in `.work`. At the end
`source.json` is written, which says what was read, the splits are moved into place, and their
manifests are written last: they make the folder complete. An output at a URL is made in a folder of
the disk first, and moved from there (`upload`). Settings that only packing uses (chunk length,
chunks per shard, share of validation) may change until the first split is in place, because no
other work depends on them.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from data_prep.arguments import TaskShare
from data_prep.evidence import Evidence, Saved
from data_prep.locks import lock, locked_file
from data_prep.output_settings import TRAIN, VALID, OutputSettings, layout
from data_prep.records import WorkFolder
from data_prep.store import Store
from i3dist.data.manifest import MANIFEST_NAME, Manifest
from i3dist.errors import UserError
from i3dist.files import clear_partials, make_folder, regular, sync, write_first, write_whole

Model = TypeVar("Model", bound=Saved)

SETTINGS_NAME = "shard.json"
EVIDENCE_NAME = "source.json"
TOKENIZER_NAME = "tokenizer.json"
_WORK_NAME = ".work"
_BEGUN_NAME = f"{_WORK_NAME}/{EVIDENCE_NAME}"
_OF_PACKING = frozenset(("chunk_length", "chunks_per_shard", "valid_fraction"))


class Output:
    """The folder DIR, or the one on the disk in which the output at a URL is made.

    `place` is what the user calls it.
    """

    def __init__(self, folder: Path, store: Store | None = None) -> None:
        self.folder = folder
        self.store = store
        self.place = str(store or folder)
        self.runs = folder / _WORK_NAME / "runs"
        self.facts = folder / _WORK_NAME / "source"
        self.plan = folder / _WORK_NAME / "plan.json"
        self.duplicates = folder / _WORK_NAME / "duplicates"
        self.tokenizer = folder / TOKENIZER_NAME

    def work(self, digest: str) -> WorkFolder:
        """Where splits are packed by the plan of this digest."""
        return WorkFolder(self.folder / _WORK_NAME / "packed" / digest[:16])

    def settings(self) -> OutputSettings | None:
        """The settings that the folder was begun with; None where it is new."""
        return self._read(OutputSettings, SETTINGS_NAME)

    def evidence(self) -> Evidence | None:
        """What was read of the source; before the work is done, the state of its files."""
        return self._read(Evidence, EVIDENCE_NAME) or self._read(Evidence, _BEGUN_NAME)

    def _read(self, model: type[Model], name: str) -> Model | None:
        path, data = self.folder / name, None
        try:
            data = regular(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if self.store:
                data = self.store.get(name)
        try:
            return None if data is None else model.model_validate_json(data)
        except ValidationError:
            advice = f"choose another --out, or delete {self.place}"
            raise UserError(f"{path} is damaged: {advice}") from None

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[None]:
        """Create the folder and lock out other runs; a folder left empty is removed again.

        With `shared` others that share it may come in.
        """
        folder = Path(os.path.realpath(self.folder))  # the target of a link
        try:
            make_folder(folder)
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"cannot write to --out {self.folder}: {error.strerror}") from None
        busy = f"another run is writing {self.folder}: wait for it"
        try:
            lock(handle, self.folder, busy, shared)
            yield
        finally:
            os.close(handle)
            with suppress(OSError):
                folder.rmdir()

    @contextmanager
    def locked_work(self, shared: bool = False) -> Iterator[None]:
        """Lock runs on other hosts out, too; if nothing is begun, nothing is left."""
        work = self.folder / _WORK_NAME
        busy = f"another run, or a task, is writing {self.folder}: wait for it"
        try:
            with locked_file(work / "lock", busy, shared):
                yield
        finally:
            with suppress(OSError):
                work.rmdir()

    def locked_task(self, task: TaskShare, step: str) -> AbstractContextManager[None]:
        """Lock out another process that does the same task of a step, "tokenizing" or "packing"."""
        name = f"{step}-{task.index}-of-{task.of}.lock"
        busy = f"task {task} is {step} in {self.folder} already: wait for it"
        return locked_file(self.folder / _WORK_NAME / name, busy)

    def is_complete(self, settings: OutputSettings, free: Set[str] = frozenset()) -> bool:
        """Whether all work is done.

        Until the first split is in place, the settings `free` may differ from those of the folder.

        Raises:
            UserError: the folder was made with other settings, is damaged, or is not ours.
        """
        found = self.store.sizes() if self.store else os.listdir(self.folder)
        former = self.settings()  # read after that: another task may begin the folder just now
        if former is None:
            ours = (_WORK_NAME, f".{SETTINGS_NAME}.")  # a killed run may have left the second
            if not all(name.startswith(ours) for name in found):
                raise UserError(f"{self.place} holds other files: choose another --out")
            return False
        manifests = self.manifests(settings.splits) or self._uploaded_manifests(settings.splits)
        free = frozenset() if self.is_moving or manifests else _OF_PACKING | free
        if difference := former.difference(settings, free):
            raise self.refusal(difference)
        if not manifests:
            return False
        for split, manifest in manifests.items():
            self._check_shards(split, manifest)
        self._discard_work()
        return True

    def manifests(self, splits: Sequence[str]) -> dict[str, Manifest]:
        """The manifests of an output that is complete on the disk; else none."""
        folders = {split: self.folder / split for split in splits}
        if not all((folder / MANIFEST_NAME).exists() for folder in folders.values()):
            return {}
        return {split: Manifest.load(folder) for split, folder in folders.items()}

    def _uploaded_manifests(self, splits: Sequence[str]) -> dict[str, Manifest]:
        """The manifests of an output that is complete at its URL; else none."""
        found: dict[str, Manifest] = {}
        if self.store is None:
            return found
        with tempfile.TemporaryDirectory() as name:
            for split in splits:
                try:
                    self.store.fetch(f"{split}/{MANIFEST_NAME}", Path(name) / MANIFEST_NAME)
                except FileNotFoundError:
                    return {}
                found[split] = Manifest.load(Path(name))
        return found

    def _check_shards(self, split: str, manifest: Manifest) -> None:
        """Refuse a split whose shards are neither here nor at the URL, in their full size."""
        moved = self.store.sizes(split) if self.store else {}
        for shard in manifest.shards:
            path = self.folder / split / shard.name
            size = path.stat().st_size if path.is_file() else moved.get(shard.name)
            if size != shard.size:
                found = "missing" if size is None else f"{size} bytes long, not {shard.size}"
                remedy = f"delete {self._all(self.place)} and make it again"
                raise UserError(f"{self.place}/{split}/{shard.name} is {found}: {remedy}")

    def refusal(self, difference: str) -> UserError:
        """The error for a folder that was made in another way: `difference` says in which."""
        it = self._all("it")
        return UserError(
            f"{self.place} was made {difference}: choose another --out, or delete {it}"
        )

    def _all(self, place: str) -> str:
        """In words: all that there is of the output, which is called `place`."""
        return f"{place} and {self.folder}" if self.store else place

    def free_bytes(self) -> int:
        """Bytes free where the folder is, or will be."""
        folder = Path(os.path.realpath(self.folder))
        return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free

    def has_old_runs(self) -> bool:
        """Whether an earlier version began the folder, whose runs this one cannot read."""
        former = self.settings()
        if former is None or former.layout == layout(former.deduplicate):
            return False
        return self.runs.exists()

    def begin(
        self,
        settings: OutputSettings,
        tokenizer: bytes,
        evidence: Evidence | None,
        free: Set[str] = frozenset(),
    ) -> None:
        """Write down what the folder is made from; a run that continues does it again.

        Raises:
            UserError: another task has just begun it with other settings than the `free` ones, or
                with another tokenizer.
        """
        self.runs.mkdir(parents=True, exist_ok=True)
        write_first(self.folder / SETTINGS_NAME, settings.model_dump_json(indent=1).encode())
        former = self.settings()
        if former and (difference := former.difference(settings, _OF_PACKING | free)):
            raise self.refusal(difference)
        self.write_settings(settings)
        if evidence:
            write_whole(self.folder / _BEGUN_NAME, evidence.model_dump_json().encode())
        write_first(self.tokenizer, tokenizer)
        if regular(self.tokenizer).read_bytes() != tokenizer:
            raise self.refusal("with another tokenizer just now")
        if self.store:  # early, so that a URL that cannot be written to is refused early
            self.store.put(self.folder / SETTINGS_NAME, SETTINGS_NAME)

    def write_settings(self, settings: OutputSettings) -> None:
        """Write down the settings."""
        write_whole(self.folder / SETTINGS_NAME, settings.model_dump_json(indent=1).encode())

    @property
    def is_moving(self) -> bool:
        """Whether a run has begun to move splits into place: all of them are packed."""
        return any((self.folder / split).exists() for split in (TRAIN, VALID))

    def take_back(self, work: WorkFolder) -> None:
        """Take splits that a killed run has moved into place back, so as not to pack them again."""
        for split in (TRAIN, VALID):
            final, staged = self.folder / split, work.split(split)
            if final.exists() and work.splits.exists() and not staged.exists():
                (final / MANIFEST_NAME).unlink(missing_ok=True)
                final.rename(staged)
            shutil.rmtree(final, ignore_errors=True)

    def publish(
        self, work: WorkFolder, manifests: Mapping[str, Manifest], evidence: Evidence | None
    ) -> None:
        """Move the packed splits into place, and write their manifests last."""
        if evidence:
            write_whole(self.folder / EVIDENCE_NAME, evidence.model_dump_json().encode())
        for split in manifests:
            final = self.folder / split
            (final / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(final, ignore_errors=True)
            work.split(split).rename(final)
        sync(self.folder)
        for split, manifest in manifests.items():
            manifest.write(self.folder / split)
        self._discard_work()

    def abandon(self) -> None:
        """Remove everything that was begun."""
        self.tokenizer.unlink(missing_ok=True)
        self._discard_work()
        if self.store:
            self.store.remove(SETTINGS_NAME)
        (self.folder / SETTINGS_NAME).unlink(missing_ok=True)  # last: it marks the folder as ours

    def _discard_work(self) -> None:
        shutil.rmtree(self.folder / _WORK_NAME, ignore_errors=True)
        clear_partials(self.folder)


def is_output(folder: Path) -> bool:
    """Whether this tool has made a folder."""
    path = folder / SETTINGS_NAME
    try:
        OutputSettings.model_validate_json(path.read_bytes() if path.is_file() else b"")
    except (ValidationError, OSError):
        return False
    return True
