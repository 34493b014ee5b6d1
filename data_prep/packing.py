"""Pass 2: packs blocks of ranges into shards, each block by itself, and puts their index together.

A job opens every run once and walks through its ranges in the order of the keys. It writes the
shards whose first token lies in its block. So it skips the tokens of the shard before, and reads
the first documents behind its block to complete its last shards. The bytes do not depend on how
ranges are shared out. Each range is recorded once its shards are synced, and a run that continues
packs the others only.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.pack import INDEX_SCHEMA, Framing, IndexWriter, ShardWriter, index_rows
from data_prep.ranges import Counts, Partition, blocks, edge
from data_prep.records import PackedFile, RangeRecord, WorkFolder
from data_prep.runs import Keys, RunReader
from data_prep.workers import Report, run_jobs
from i3dist.data.manifest import Manifest, Shard, lowest_version
from i3dist.errors import UserError
from i3dist.files import sync, write_whole


@dataclass(frozen=True)
class SplitPlan:
    """A split: the range of its documents' split hashes, and where the ranges of keys lie in it."""

    name: str
    hashes: range
    counts: Counts

    @property
    def tokens(self) -> int:
        """Tokens of the stream, without <PAD>."""
        return int(self.counts.tokens[-1])

    @property
    def documents(self) -> int:
        """Documents of the split."""
        return int(self.counts.documents[-1])

    def shards(self, ranges: range, framing: Framing) -> range:
        """Numbers of the shards whose first token lies in consecutive ranges."""
        ends = self.counts.tokens[[ranges.start, ranges.stop]].tolist()
        return range(*map(framing.shards_before, ends))

    def stretch(self, ranges: range, framing: Framing) -> tuple[int, int]:
        """Where those shards begin and end in the stream."""
        shards, size = self.shards(ranges, framing), framing.shard_tokens
        return shards.start * size, min(shards.stop * size, self.tokens)

    def manifest(
        self, framing: Framing, shards: tuple[Shard, ...], origin: Mapping[str, Any]
    ) -> Manifest:
        """The manifest of the split; `origin` holds the fields that say what it is of."""
        return Manifest(
            version=lowest_version(
                framing.token_type, origin.get("sources"), origin.get("dropped")
            ),
            split=self.name,
            documents=self.documents,
            tokens=self.tokens,
            chunks=sum(shard.chunks for shard in shards),
            shards=shards,
            **vars(framing),
            **origin,
        )


@dataclass(frozen=True)
class PackTask:
    """Packs blocks of ranges. `digest` is of all that decides the bytes."""

    partitions: Sequence[Partition]
    splits: Sequence[SplitPlan]
    framing: Framing
    work: WorkFolder
    digest: str

    @property
    def ranges(self) -> int:
        """Number of ranges."""
        return self.partitions[-1].ranges.stop

    def start(self, report: Report) -> Callable[[range], None]:
        """A function that packs a block."""
        return lambda block: _Block(self, block).pack(report)


class _Block:
    """Packs one block."""

    def __init__(self, task: PackTask, block: range) -> None:
        self._task = task
        self._block = block
        self._held = range(0)
        """The ranges of the partition whose runs are mapped."""
        self._writers = [
            ShardWriter(
                task.work.split(split.name), task.framing, *split.stretch(block, task.framing)
            )
            for split in task.splits
        ]
        self._index: dict[int, dict[str, PackedFile]] = {}
        """The files of index rows of each range that is not recorded yet."""

    def pack(self, report: Report) -> None:
        """Pack all ranges; `report` is called for each."""
        for number in range(self._block.start, self._task.ranges):
            is_ours = number in self._block
            if not is_ours and all(writer.is_done for writer in self._writers):
                break
            tokens = self._pack_range(number, is_ours)
            self._record_finished()
            if is_ours:
                report(1, tokens)

    def _pack_range(self, number: int, is_ours: bool) -> int:
        """Pack the documents of a range into the shards of this block; returns their tokens."""
        if number not in self._held:
            partition = next(p for p in self._task.partitions if number in p.ranges)
            self._held, self._reader = partition.ranges, RunReader(partition.runs)
        keys = self._reader.seek(*(edge(n, self._task.ranges) for n in (number, number + 1)))
        if is_ours:
            self._index[number] = {}
        for split, writer in zip(self._task.splits, self._writers, strict=True):
            self._pack_split(number, split, writer, keys)
        return int(keys.lengths.sum())

    def _pack_split(self, number: int, split: SplitPlan, writer: ShardWriter, keys: Keys) -> None:
        inside = (keys.split >= split.hashes.start) & (keys.split < split.hashes.stop)
        rows = keys.order[inside]
        begin, end = split.counts.tokens[number : number + 2]
        bounds = begin + np.concatenate(([0], np.cumsum(keys.lengths[inside])))
        if bounds[-1] != end:
            raise _changed()
        if number in self._index and len(rows):
            self._write_index(number, split, rows, bounds)
        if writer.position < min(end, writer.stop):
            first = int(np.searchsorted(bounds, writer.position, "right")) - 1
            last = int(np.searchsorted(bounds, writer.stop))
            tokens = self._reader.tokens(rows[first:last])
            before = bounds[first]
            writer.add(tokens[writer.position - before : writer.stop - before])

    def _write_index(
        self, number: int, split: SplitPlan, rows: NDArray[np.int64], bounds: NDArray[np.int64]
    ) -> None:
        first = int(split.counts.documents[number])
        table = index_rows(first, bounds, *self._reader.labels(rows), self._task.framing)
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, INDEX_SCHEMA, options=options) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        path = self._task.work.index(number, split.name)
        write_whole(path, data)
        self._index[number][split.name] = PackedFile.of(path, hashlib.sha256(data).hexdigest())

    def _record_finished(self) -> None:
        """Record the ranges whose shards are all written.

        A shard of a small split may take many ranges to fill. Only the range in which it begins
        waits for it.
        """
        for number in list(self._index):
            only = range(number, number + 1)
            held = [
                (split.name, writer, split.shards(only, self._task.framing))
                for split, writer in zip(self._task.splits, self._writers, strict=True)
            ]
            if any(shard not in writer.shards for _, writer, shards in held for shard in shards):
                continue
            shards = {
                name: tuple(self._finished(writer, shard) for shard in shards)
                for name, writer, shards in held
            }
            for writer in self._writers:
                sync(writer.folder)
            index = self._index.pop(number)
            record = RangeRecord(plan=self._task.digest, shards=shards, index=index)
            record.write(self._task.work.record(number))

    def _finished(self, writer: ShardWriter, number: int) -> PackedFile:
        shard = writer.shards.pop(number)
        path = writer.folder / shard.name
        sync(path)
        return PackedFile.of(path, shard.sha256)


def pack_all(task: PackTask, workers: int, report: Report) -> dict[str, tuple[Shard, ...]]:
    """Pack the ranges that are not packed yet, and write each index; returns all shards by split.

    `report` counts ranges.
    """
    todo: list[int] = []
    kept: dict[str, set[str]] = {split.name: set() for split in task.splits}
    for number in range(task.ranges):
        if record := task.work.finished(number, task.digest):
            for name, files in record.shards.items():
                kept[name].update(file.name for file in files)
        else:
            todo.append(number)
    task.work.prepare(kept)
    report(task.ranges - len(todo), 0)
    tokens = sum(split.tokens for split in task.splits)
    run_jobs(task, blocks(task.partitions, todo, tokens, workers), workers, report)
    return {split.name: _assemble(task, split) for split in task.splits}


def _assemble(task: PackTask, split: SplitPlan) -> tuple[Shard, ...]:
    """Write the index of a split from those of the ranges; returns its shards."""
    index = IndexWriter(task.work.split(split.name))
    shards: list[Shard] = []
    full = task.framing.chunks_per_shard
    chunks = -(-split.tokens // task.framing.chunk_length)
    for number in range(task.ranges):
        record = task.work.finished(number, task.digest)
        if record is None:
            raise _changed()
        if split.name in record.index:
            path = task.work.ranges / record.index[split.name].name
            with pa.memory_map(os.fsencode(path)) as file:
                index.add(pa.ipc.open_file(file).read_all())
        for file in record.shards[split.name]:
            count = min(full, chunks - len(shards) * full)
            shards.append(file.shard(count))
    index.close()
    sync(index.path)
    return tuple(shards)


def _changed() -> UserError:
    return UserError("the files in .work have changed: run the same command again")
