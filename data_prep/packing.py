"""Pass 2: packs blocks of ranges into shards, each block by itself, and puts their index together.

A job opens every run once and walks through its ranges in the order of the keys. It writes the
shards whose first token lies in its block. So it skips the tokens of the shard before, and reads
the first documents behind its block to complete its last shards. The bytes do not depend on how
ranges are shared out, among processes or tasks. Each range is recorded once its shards are synced,
and a run that continues packs the others only.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.merge import Layout
from data_prep.pack import INDEX_SCHEMA, Framing, IndexWriter, ShardWriter, index_rows
from data_prep.ranges import Counts, Partition, blocks, edge
from data_prep.records import PackedFile, RangeRecord, WorkFolder
from data_prep.runs import Keys, RunReader
from data_prep.workers import Report, run_jobs
from i3dist.data.manifest import Manifest, Shard, lowest_version
from i3dist.errors import UserError
from i3dist.files import sync, write_whole

_CHECKS = 32
"""Ranges whose files are looked at at once: a file system over the network takes its time."""


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

    def reach(self, ranges: range, framing: Framing) -> int:
        """The end of the ranges that hold all tokens of those shards."""
        if not self.shards(ranges, framing):
            return ranges.stop
        _, stop = self.stretch(ranges, framing)
        return max(ranges.stop, int(np.searchsorted(self.counts.tokens, stop)))

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
class PackPlan:
    """What is to be packed, where. `digest` is of all that decides the bytes."""

    layout: Layout
    splits: Sequence[SplitPlan]
    framing: Framing
    work: WorkFolder
    digest: str

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(split.tokens for split in self.splits)

    def unfinished(self, ranges: range) -> list[int]:
        """Which of these ranges are not packed yet, or no longer whole."""

        def is_finished(number: int) -> bool:
            return self.work.is_finished(number, self.digest)

        with ThreadPoolExecutor(_CHECKS) as pool:
            done = pool.map(is_finished, ranges)
            return [number for number, is_done in zip(ranges, done, strict=True) if not is_done]

    def needed(self, todo: Sequence[int]) -> dict[int, range]:
        """The partitions that have any of the ranges `todo`, and all ranges that these read."""
        parts = {place: self.layout.partition(place) for place in self.layout.with_any(todo)}
        return {
            place: range(part.start, max(split.reach(part, self.framing) for split in self.splits))
            for place, part in parts.items()
        }


@dataclass(frozen=True)
class PackTask:
    """Packs blocks of ranges of these partitions."""

    plan: PackPlan
    partitions: Sequence[Partition]

    def start(self, report: Report) -> Callable[[range], None]:
        """A function that packs a block."""

        def pack(block: range) -> None:
            partition = next(p for p in self.partitions if block.start in p.ranges)
            with self.plan.work.making(split.name for split in self.plan.splits) as folder:
                _Block(self.plan, block, partition, folder).pack(report)
            if partition.is_merged:
                self._release(partition)

        return pack

    def _release(self, partition: Partition) -> None:
        """Remove the runs of a partition that is packed."""
        plan = self.plan
        if all(plan.work.recorded(number, plan.digest) for number in partition.ranges):
            for path in partition.runs:
                path.unlink(missing_ok=True)


class _Block:
    """Packs one block of a partition's ranges. Shards are made in `folder`."""

    def __init__(self, plan: PackPlan, block: range, partition: Partition, folder: Path) -> None:
        self._plan = plan
        self._block = block
        self._reader = RunReader(partition.runs)
        self._writers = [
            ShardWriter(folder / split.name, plan.framing, *split.stretch(block, plan.framing))
            for split in plan.splits
        ]
        self._index: dict[int, dict[str, PackedFile]] = {}
        """The files of index rows of each range that is not recorded yet."""

    def pack(self, report: Report) -> None:
        """Pack all ranges; `report` is called for each."""
        for number in range(self._block.start, self._plan.layout.ranges):
            is_ours = number in self._block
            if not is_ours and all(writer.is_done for writer in self._writers):
                break
            tokens = self._pack_range(number, is_ours)
            self._record_finished()
            if is_ours:
                report(1, tokens)

    def _pack_range(self, number: int, is_ours: bool) -> int:
        """Pack the documents of a range into the shards of this block; returns their tokens."""
        keys = self._reader.seek(*(edge(n, self._plan.layout.ranges) for n in (number, number + 1)))
        if is_ours:
            self._index[number] = {}
        for split, writer in zip(self._plan.splits, self._writers, strict=True):
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
        table = index_rows(first, bounds, *self._reader.labels(rows), self._plan.framing)
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, INDEX_SCHEMA, options=options) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        path = self._plan.work.index(number, split.name)
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
                (split.name, writer, split.shards(only, self._plan.framing))
                for split, writer in zip(self._plan.splits, self._writers, strict=True)
            ]
            if any(shard not in writer.shards for _, writer, shards in held for shard in shards):
                continue
            shards = {
                name: tuple(self._finished(name, writer, shard) for shard in shards)
                for name, writer, shards in held
            }
            for name in shards:
                sync(self._plan.work.split(name))
            index = self._index.pop(number)
            record = RangeRecord(plan=self._plan.digest, shards=shards, index=index)
            record.write(self._plan.work.record(number))

    def _finished(self, split: str, writer: ShardWriter, number: int) -> PackedFile:
        shard = writer.shards.pop(number)
        made = writer.folder / shard.name
        sync(made)
        path = made.replace(self._plan.work.split(split) / shard.name)
        return PackedFile.of(path, shard.sha256)


def pack_ranges(
    plan: PackPlan,
    partitions: Sequence[Partition],
    todo: Sequence[int],
    workers: int,
    report: Report,
) -> None:
    """Pack ranges of these partitions; `report` counts ranges."""
    plan.work.prepare(split.name for split in plan.splits)
    tokens = plan.tokens * len(todo) // plan.layout.ranges
    run_jobs(PackTask(plan, partitions), blocks(partitions, todo, tokens, workers), workers, report)


def assembled(plan: PackPlan, split: SplitPlan) -> tuple[Shard, ...]:
    """Write the index of a split from those of all ranges, which are packed; returns its shards."""
    index = IndexWriter(plan.work.split(split.name))
    shards: list[Shard] = []
    full = plan.framing.chunks_per_shard
    chunks = -(-split.tokens // plan.framing.chunk_length)
    for number in range(plan.layout.ranges):
        record = plan.work.recorded(number, plan.digest)
        if record is None:
            raise _changed()
        if split.name in record.index:
            path = plan.work.ranges / record.index[split.name].name
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
