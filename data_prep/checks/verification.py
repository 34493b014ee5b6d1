"""Checks a whole output of shard.py, in several processes, and joins their findings in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data_prep.checks.block_check import BlockCheck
from data_prep.checks.chat_check import ChatEnds, join
from data_prep.checks.damage import MAKE_AGAIN, Damage
from data_prep.checks.folder_check import FolderCheck
from data_prep.checks.index_check import IndexCheck, TextReport, check_texts, join_texts
from data_prep.checks.index_rows import NOTHING, Rows, stated
from data_prep.checks.shard_check import Ends, ShardReport, check_shard
from data_prep.checks.stream import Stream
from data_prep.pack import INDEX_NAME
from data_prep.store import Store
from data_prep.workers import belong_to_parent, spawn_context
from i3dist.data.manifest import MANIFEST_NAME, Manifest, Shard
from i3dist.data.shard_table import shard_name
from i3dist.errors import UserError

# Bytes of shards in a task: enough that handing it to a worker costs little.
TASK_BYTES = 1 << 26
# Bytes for which starting another worker pays: a process takes half a second of CPU time to import
# what it needs, and checks half a gigabyte in that time.
WORKER_BYTES = 1 << 32
WAITING_TASKS = 4  # for each worker

Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Called with the number of bytes read since the last call."""


class Totals(NamedTuple):
    """What was counted in the shards of a split."""

    documents: int
    chunks: int
    shards: int
    bytes: int


@lru_cache(maxsize=1)
def _block_check(stream: Stream) -> BlockCheck:
    """One for all tasks of a split in this process: making it takes as long as checking 1 MB."""
    return BlockCheck(stream)


@dataclass(frozen=True)
class ShardTask:
    """Consecutive shards from number `first` on, with their rows in the index."""

    stream: Stream
    first: int
    shards: Sequence[Shard]
    rows: Rows | None
    owners: tuple[int, ...] = ()  # number of rows of each shard

    def __call__(self) -> list[ShardReport]:
        """Check them."""
        stream, blocks = self.stream, _block_check(self.stream)
        each = [NOTHING] * len(self.shards)
        if self.rows is not None:
            each = stated(stream, self.first, self.rows, self.owners)
        return [
            check_shard(stream, self.first + n, shard, of_shard, blocks)
            for n, (shard, of_shard) in enumerate(zip(self.shards, each, strict=True))
        ]


@dataclass(frozen=True)
class TextTask:
    """Ids and URLs of one row group."""

    stream: Stream
    group: int

    def __call__(self) -> TextReport:
        """Check them."""
        return check_texts(self.stream, self.group)


class Verification:
    """The check of one output folder.

    Attributes:
        totals: by split, what was counted; filled while `damages` runs.
        unprotected: indexes whose pages have no checksums, so that a changed id or URL that is
            still text goes unnoticed.
    """

    def __init__(self, folder: Path, workers: int, store: Store | None = None) -> None:
        """Read the small files of a folder, which are copies of those in a `store`, if given.

        Raises:
            UserError: it is not an output of shard.py.
        """
        self.check = FolderCheck(folder, store)
        # One that fetches shards waits most of the time, so it pays at any size.
        self.workers = workers if store else max(1, min(workers, self.bytes // WORKER_BYTES + 1))
        self.totals: dict[str, Totals] = {}
        self.unprotected: list[str] = []

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(int(m.shard_sizes.sum()) for m in self.check.manifests.values())

    def damages(self, advance: Advance = lambda _: None) -> Iterator[Damage]:
        """Every damage, file by file.

        Raises:
            UserError: a worker process died.
        """
        yield from self.check.damages
        with _Pool(self.workers) as pool:
            for split, manifest in self.check.manifests.items():
                yield from self._check_split(pool, split, manifest, advance)

    def _check_split(
        self, pool: "_Pool", split: str, manifest: Manifest, advance: Advance
    ) -> Iterator[Damage]:
        check = self.check
        stream = Stream.of(check.folder / split, manifest, check.tokenizer, check.store)
        index = IndexCheck(stream, manifest.documents)
        joiner = _Joiner(stream, manifest)
        for reports in pool.in_order(_shard_tasks(stream, manifest, index)):
            for report in reports:
                advance(report.size)
                yield from joiner.add(report)
            yield from index.damages
            index.damages.clear()
        index.finish()
        yield from index.damages
        yield from joiner.finish()
        if index.is_readable and not (yield from _check_texts(pool, stream, index)):
            self.unprotected.append(stream.file(INDEX_NAME))
        size = int(manifest.shard_sizes.sum())
        self.totals[split] = Totals(joiner.documents, manifest.chunks, len(manifest.shards), size)


class _Joiner:
    """Joins the reports of a split's shards, in order."""

    def __init__(self, stream: Stream, manifest: Manifest) -> None:
        self.documents = 0
        self._stream, self._manifest = stream, manifest
        chat = ChatEnds.before_all(stream) if stream.chat else None
        self._before: Ends | None = Ends(False, False, False, False, chat)
        self._all_read = True
        self._numbers: dict[str, int] | None = None

    def add(self, report: ShardReport) -> Iterator[Damage]:
        """The damages of the next shard, and of its border to the one before."""
        file = self._stream.file(shard_name(report.number))
        damages = list(report.damages)
        if report.wrong_sha256:
            damages[0] = self._explained(damages[0], report.wrong_sha256)
        yield from damages
        self.documents += report.documents
        before, after = self._before, report.ends
        self._before, self._all_read = after, self._all_read and after is not None
        if before is None or after is None:
            return
        place = "chunk 0, token 0"
        if after.begins_inside and not before.ends_inside:
            yield Damage(file, place, "tokens stand before the first <BOS>")
        elif before.ends_inside and not after.begins_inside:
            yield Damage(file, place, "the document before this <BOS> has no <EOS>")
        elif before.ends_with_bos and after.begins_with_eos:
            yield Damage(file, place, "a document is empty: <EOS> follows <BOS>")
        if before.chat and after.chat:
            problems, chat = join(self._stream, before.chat, after.chat)
            self._before = after._replace(chat=chat)
            for problem in problems:
                yield Damage(file, place, problem, MAKE_AGAIN)

    def finish(self) -> Iterator[Damage]:
        """The damages of the stream's end and of the total of documents."""
        if self._before and self._before.ends_inside:
            last = self._manifest.shards[-1].name
            yield Damage(self._stream.file(last), "", "the last document has no <EOS>")
        wanted = self._manifest.documents
        if self._all_read and self.documents != wanted:
            problem = f"says {wanted:,}, the shards hold {self.documents:,}"
            yield Damage(self._stream.file(MANIFEST_NAME), "key documents", problem)

    def _explained(self, damage: Damage, sha256: str) -> Damage:
        """The damage of a wrong hash; names the shard whose content it is."""
        if self._numbers is None:
            self._numbers = {s.sha256: n for n, s in enumerate(self._manifest.shards)}
        if (number := self._numbers.get(sha256)) is None:
            return damage
        name = self._manifest.shards[number].name
        return damage._replace(problem=f"{damage.problem}: it is a copy of {name}")


def _shard_tasks(stream: Stream, manifest: Manifest, index: IndexCheck) -> Iterator[ShardTask]:
    """Tasks of about `TASK_BYTES`, with the rows of their shards."""
    full = manifest.shards[0].size
    at_once = max(1, TASK_BYTES // full)
    for first in range(0, len(manifest.shards), at_once):
        shards = manifest.shards[first : first + at_once]
        taken = index.take(first + len(shards))
        rows, owners = taken if taken is not None else (None, None)
        counts = () if owners is None else _counts(owners, first, len(shards))
        yield ShardTask(stream, first, shards, rows, counts)


def _counts(owners: Any, first: int, shards: int) -> tuple[int, ...]:
    ends = owners.searchsorted(range(first + 1, first + shards + 1))
    return tuple(b - a for a, b in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _check_texts(pool: "_Pool", stream: Stream, index: IndexCheck) -> Generator[Damage, None, bool]:
    """Check ids and URLs; returns whether all pages of the index have checksums."""
    last, has_checksums = None, index.has_checksums
    for report in pool.in_order(TextTask(stream, group) for group in range(index.row_groups)):
        yield from report.damages
        has_checksums &= report.has_checksums
        if last is not None and report.first is not None:
            yield from join_texts(stream, report.row, last, report.first)
        last = report.last or last
    return has_checksums


class _Pool:
    """Runs tasks here or in worker processes, and gives their results in the order of the tasks."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Pool":
        if self._workers > 1:
            # Spawned, not forked: the parent has threads (progress bar, Arrow).
            self._pool = ProcessPoolExecutor(self._workers, spawn_context(), belong_to_parent)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=failure[0] is None, cancel_futures=True)

    def in_order(self, tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
        """The results. A few tasks are made ahead of the results, so memory stays bounded."""
        if self._pool is None:
            yield from (task() for task in tasks)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(task))
                if len(waiting) >= WAITING_TASKS * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (out of memory?): try again with fewer --workers"
            ) from None
