"""Documents with keys of one's own, as runs, and what packing makes of them."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.arguments import ALONE, TaskShare
from data_prep.merge import Layout, MergeTask, merged
from data_prep.pack import Framing
from data_prep.packing import PackPlan, SplitPlan, assembled, pack_ranges
from data_prep.ranges import CountTask, count_all
from data_prep.records import WorkFolder
from data_prep.shuffle import HASH_END, Document, run_table
from i3dist.data.manifest import Shard
from i3dist.data.token_types import UINT16, Stored, TokenType
from tests.data_prep.oracle import Packer

BOS, EOS, PAD = 2, 3, 1


class Made(NamedTuple):
    """A document of a test. Its tokens are made of its number."""

    high: int
    low: int
    split: int
    number: int
    length: int

    def tokens(self, kind: TokenType = UINT16) -> Stored:
        """As `kind` stores them; with a mask some are learned."""
        end = 1 << 8 * kind.dtype.itemsize
        return np.random.default_rng(self.number).integers(10, end, self.length, kind.dtype.type)

    def document(self, kind: TokenType = UINT16) -> Document:
        hashes = b"".join(n.to_bytes(8) for n in (self.high, self.low, self.split))
        return Document(hashes, f"id {self.number}", f"url {self.number}", self.tokens(kind))


def write_run(path: Path, documents: Sequence[Made], kind: TokenType = UINT16) -> Path:
    table = run_table([made.document(kind) for made in documents], BOS, EOS, path.parent)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def write_runs(
    folder: Path, documents: Sequence[Made], runs: int, kind: TokenType = UINT16
) -> list[Path]:
    """Share the documents out among so many runs, at random."""
    rng = random.Random(len(documents))
    shared: list[list[Made]] = [[] for _ in range(runs)]
    for made in documents:
        rng.choice(shared).append(made)
    return [
        write_run(folder / f"{number}.arrow", held, kind)
        for number, held in enumerate(shared)
        if held
    ]


def naive(
    folder: Path, documents: Sequence[Made], splits: dict[str, range], framing: Framing
) -> dict[str, list[Shard]]:
    """Pack all in the order of keys."""
    shards = {}
    for name, hashes in splits.items():
        (folder / name).mkdir(parents=True)
        packer = Packer(folder / name, framing)
        for made in sorted(documents):
            if made.split in hashes:
                packer.add(
                    f"id {made.number}", f"url {made.number}", made.tokens(framing.token_type)
                )
        packer.close()
        shards[name] = packer.shards
    return shards


def plan_of(
    folder: Path,
    runs: Sequence[Path],
    documents: Sequence[Made],
    splits: dict[str, range],
    framing: Framing,
) -> PackPlan:
    """The plan by which they are packed in `folder`."""
    work = WorkFolder(folder)
    layout = Layout.of(sum(made.length + 2 for made in documents), len(runs))
    task = CountTask(layout.ranges, tuple(splits.values()), work.counts)
    counts = count_all(task, runs, ALONE, 1, lambda *_: None)
    plans = [SplitPlan(*item, found) for item, found in zip(splits.items(), counts, strict=True)]
    return PackPlan(layout, plans, framing, work, f"{framing} {splits}")


def pack(plan: PackPlan, runs: Sequence[Path], workers: int = 1, share: TaskShare = ALONE) -> None:
    """Pack what is not packed yet of a task's share."""
    todo = plan.unfinished(plan.layout.share(share))
    if todo:
        task = MergeTask(plan.layout, plan.work.merged(share), plan.needed(todo))
        partitions = merged(task, runs, workers, lambda *_: None)
        pack_ranges(plan, partitions, todo, workers, lambda *_: None)


def pack_all(
    plan: PackPlan, runs: Sequence[Path], workers: int = 1
) -> dict[str, tuple[Shard, ...]]:
    """Pack what is not packed yet, and put all together."""
    pack(plan, runs, workers)
    return {split.name: assembled(plan, split) for split in plan.splits}


def halves() -> dict[str, range]:
    return {"valid": range(HASH_END // 4), "train": range(HASH_END // 4, HASH_END)}


def some(count: int, longest: int, seed: int = 0, highs: int = HASH_END) -> list[Made]:
    """Random documents; `highs` bounds the first number of keys."""
    rng = random.Random(seed)
    splits = itertools.chain((0, HASH_END - 1), iter(lambda: rng.randrange(HASH_END), None))
    return [
        Made(
            rng.randrange(highs),
            rng.randrange(HASH_END),
            next(splits),
            number,
            rng.randint(1, longest),
        )
        for number in range(count)
    ]
