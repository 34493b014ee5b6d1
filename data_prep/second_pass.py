"""Pass 2, from what pass 1 has read to the splits: duplicates, counts, merging, packing.

Every step leaves files that depend on nothing but the source and the settings. So several tasks may
do it at once: steps that all of them need (duplicates, counts) each task begins at another place,
and leaves out what is there already. Ranges they share out.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.arguments import ALONE, TaskShare
from data_prep.dropped import BySource
from data_prep.duplicates import STEPS, Deduplication
from data_prep.merge import Layout, MergeTask, merged
from data_prep.output import Output
from data_prep.output_settings import TRAIN, VALID, OutputSettings
from data_prep.pack import Framing, chunks_per_shard
from data_prep.packing import PackPlan, SplitPlan, assembled, pack_ranges
from data_prep.progress import pass_bar
from data_prep.ranges import Counts, CountTask, Partition, count_all, counting_workers
from data_prep.records import WorkFolder
from data_prep.shuffle import HALF, HASH_END, PartSummary
from i3dist.data.manifest import MAX_SHARDS, Manifest, SourceCounts
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError


def split_ranges(summaries: Sequence[PartSummary], valid_fraction: float) -> tuple[range, range]:
    """The ranges of split hashes of (train, valid), each of which gets a document.

    The smallest hash is always in valid and the largest in train, whatever the fraction.

    Raises:
        UserError: the corpus has only one text, which cannot be split.
    """
    if not valid_fraction:
        return range(HASH_END), range(0)
    smallest = min(summary.smallest_split for summary in summaries)
    largest = max(summary.largest_split for summary in summaries)
    if smallest == largest:
        raise UserError(
            "a validation split needs two different documents and the source has one: "
            "give it more and another --out, or set --valid-fraction 0"
        )
    bound = min(max(int(valid_fraction * HASH_END), smallest + 1), largest)
    return range(bound, HASH_END), range(bound)


def halves(summaries: Sequence[PartSummary], settings: OutputSettings) -> tuple[range, range]:
    """The ranges of split hashes of (train, valid), where each has a source of its own.

    Raises:
        UserError: nothing is left of one of the sources.
    """
    has_valid = any(summary.smallest_split < HALF for summary in summaries)
    has_train = any(summary.largest_split >= HALF for summary in summaries)
    if not has_valid or not has_train:
        option, name = ("source", settings.source) if has_valid else ("valid", settings.valid)
        raise UserError(
            f"no document of --{option} {name} is left: choose less strictly, or name another, "
            "and another --out"
        )
    return range(HALF, HASH_END), range(HALF)


def framed_tokens(summaries: Sequence[PartSummary]) -> int:
    """Tokens of all documents with <BOS> and <EOS>."""
    return sum(summary.tokens + 2 * summary.documents for summary in summaries)


@dataclass(frozen=True)
class SecondPass:
    """Packs what pass 1 has read: `summaries` of all parts. `share` is what this task packs."""

    settings: OutputSettings
    output: Output
    summaries: Sequence[PartSummary]
    console: Console
    workers: int
    share: TaskShare = ALONE

    def pack(self) -> range:
        """Pack the ranges of this task's share that are not packed yet; returns all of them."""
        ranges = self.plan.layout.share(self.share)
        with self.console.status("looking at what is packed"):
            todo = self.plan.unfinished(ranges)
        partitions = self._merge(todo)
        with pass_bar(self.console, "pack", "ranges", len(ranges)) as report:
            report(len(ranges) - len(todo), 0)
            pack_ranges(self.plan, partitions, todo, self.workers, report)
        return ranges

    def finish(
        self, sources: tuple[SourceCounts, ...] | None, dropped: Mapping[str, BySource]
    ) -> dict[str, Manifest]:
        """Pack what no task has packed, and put the splits together; returns their manifests.

        No other process may be at work. `dropped` tells for each split what was dropped of its
        sources.
        """
        self.output.take_back(self.work)
        self.work.clear()
        self.pack()
        if self._deduplication:
            self._deduplication.clear()
        with self.console.status("writing the index"):
            return {
                split.name: split.manifest(
                    self.plan.framing,
                    assembled(self.plan, split),
                    self._origin(split.name, sources, dropped),
                )
                for split in self.plan.splits
            }

    def _origin(
        self,
        split: str,
        sources: tuple[SourceCounts, ...] | None,
        dropped: Mapping[str, BySource],
    ) -> dict[str, Any]:
        """What the manifest of a split says of its source."""
        has_own = self.settings.valid is not None and split == VALID
        return {
            "vocab_size": self._tokenizer.vocab_size,
            "tokenizer_sha256": self._tokenizer.sha256,
            "seed": self.settings.seed,
            "source": self.settings.source_of(split),
            "sources": None if has_own else sources,
            "dropped": dropped[split] if self.settings.chooses else None,
        }

    @cached_property
    def left(self) -> Sequence[PartSummary]:
        """Summaries of all parts without duplicates, which are marked if that is asked for."""
        if not self._deduplication:
            return self.summaries
        total = STEPS * len(self._deduplication.groups)
        with pass_bar(self.console, "compare", "steps", total) as report:
            return self._deduplication.run(self.workers, report)

    @cached_property
    def _deduplication(self) -> Deduplication | None:
        if not self.settings.deduplicate:
            return None
        folder = self.output.duplicates / digest_of((), self.summaries)[:16]
        return Deduplication(self.summaries, self.output.runs, folder, self.share)

    @cached_property
    def plan(self) -> PackPlan:
        """What is to be packed. All runs are counted for it."""
        splits = self._hashes
        counts = self._count(splits)
        return PackPlan(
            self._layout,
            [SplitPlan(*item, found) for item, found in zip(splits.items(), counts, strict=True)],
            self._framing,
            self.work,
            self._digest,
        )

    @cached_property
    def work(self) -> WorkFolder:
        """The folder to pack in: that of other settings is another one."""
        return self.output.work(self._digest)

    @cached_property
    def _digest(self) -> str:
        """SHA-256 of all that decides the bytes of the splits."""
        parts = (self._framing, self._hashes, self._layout, self._tokenizer.sha256)
        return digest_of(parts, self.left)

    @cached_property
    def _tokens(self) -> int:
        return framed_tokens(self.left)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.output.tokenizer)

    @cached_property
    def _framing(self) -> Framing:
        """How streams are cut. A number of chunks per shard is chosen here, and written down."""
        settings, tokenizer = self.settings, self._tokenizer
        chunks = settings.chunks_per_shard
        if chunks is None:
            chunks = chunks_per_shard(self._tokens, settings.chunk_length)
            self.output.write_settings(settings.model_copy(update={"chunks_per_shard": chunks}))
        if self._tokens > MAX_SHARDS * chunks * settings.chunk_length:
            raise UserError(
                f"{self._tokens:,} tokens make more than {MAX_SHARDS:,} shards: raise "
                "--chunks-per-shard"
            )
        return Framing(
            chunk_length=settings.chunk_length,
            chunks_per_shard=chunks,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            dtype=settings.token_type(tokenizer.vocab_size).name,
        )

    @cached_property
    def _runs(self) -> list[Path]:
        return [self.output.runs / name for summary in self.summaries for name in summary.runs]

    @cached_property
    def _layout(self) -> Layout:
        return Layout.of(self._tokens, len(self._runs))

    @cached_property
    def _hashes(self) -> dict[str, range]:
        """The range of split hashes of each split."""
        if self.settings.valid:
            train, valid = halves(self.left, self.settings)
        else:
            train, valid = split_ranges(self.left, self.settings.valid_fraction)
        hashes = {TRAIN: train, VALID: valid}
        return {name: hashes[name] for name in self.settings.splits}

    def _count(self, splits: Mapping[str, range]) -> list[Counts]:
        """Count what each range of keys holds of each split."""
        task = CountTask(self._layout.ranges, tuple(splits.values()), self.work.counts)
        workers = counting_workers(self._tokens, self.workers)
        with pass_bar(self.console, "count", "runs", len(self._runs)) as report:
            return count_all(task, self._runs, self.share, workers, report)

    def _merge(self, todo: Sequence[int]) -> list[Partition]:
        """The partitions that hold the ranges `todo`, merged if there are too many runs."""
        if not todo:
            return []
        layout = self._layout
        task = MergeTask(layout, self.work.merged(self.share), self.plan.needed(todo))
        if not layout.groups:
            return merged(task, self._runs, self.workers, lambda *_: None)
        with pass_bar(self.console, "merge", "groups of runs", layout.groups) as report:
            return merged(task, self._runs, self.workers, report)


def digest_of(parts: Iterable[object], summaries: Sequence[PartSummary]) -> str:
    """SHA-256 of some parts and of what pass 1 has read: all that decides the bytes of a step."""
    digest = hashlib.sha256()
    for part in (*parts, *(summary.model_dump_json() for summary in summaries)):
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()
