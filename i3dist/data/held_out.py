"""What an evaluation reads: some shards, chunk by chunk, shared out among ranks.

A chunk's latents do not depend on history, so a document may be read in pieces: the chunks of all
shards stand in one row, are cut into windows of K, and each rank takes consecutive windows. Where
RWKV state is carried a document must be read by one lane from its start: then whole documents are
dealt out. Either way ranks read about the same number of chunks, and none reads one that another
reads, but for the few whose latents its first chunk sees.

Every chunk with history also gets a *stretch*: real chunks of one other document, which take the
place of its history to tell what history says from merely having one. All of this follows from the
shards alone, so the figures are the same for any number of ranks.

Letters: M chunks of the evaluation, C history chunks, K chunks of a window, T tokens of a chunk.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from i3dist.data.manifest import Manifest
from i3dist.data.schedule import Place
from i3dist.data.shards import ShardTokens, read_shard

# So many consecutive chunks share their stretches, whose latents are computed besides.
BLOCK = 128
NONE = -1

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """(batch, row) -> K chunks of the evaluation. A `data.schedule.Windows`."""

    places: Sequence[Place]
    positions: Ints  # [batches, rows, K], each a place's index, or NONE

    @property
    def window(self) -> int:
        """Chunks K of a window."""
        return self.positions.shape[2]

    def chunks(self, index: int, lane: int) -> list[Place | None]:
        """The K chunks that a row reads in batch `index`; None where there is none."""
        return [None if p == NONE else self.places[p] for p in self.positions[index, lane]]

    def padded(self, rows: int) -> "Table":
        """The same with so many rows at least, the new ones empty."""
        more = max(0, rows - self.positions.shape[1])
        positions = np.pad(self.positions, ((0, 0), (0, more), (0, 0)), constant_values=NONE)
        return Table(self.places, positions)


class Share(NamedTuple):
    """What one rank reads."""

    table: Table
    lead: int  # first rows that are read for their latents only; they count nowhere

    def lead_in(self, batch: int) -> int:
        """How many of a batch's rows are among them."""
        return max(0, self.lead - batch * self.table.positions.shape[1])


class Stretch(NamedTuple):
    """Some consecutive chunks of one document; positions are among the evaluation's M chunks."""

    opened: int  # the chunk in which the document begins
    first: int
    chunks: int


class HeldOut:
    """The chunks of some shards of a split in order, and which stretch takes whose place.

    Attributes:
        places: [M] (shard, chunk).
        depth: [M] chunks before each that belong to the document it continues.
        stretch_of: [M] index into `stretches`; NONE where a chunk has no history, or no other
            document has as many chunks.
        stretches: see `Stretch`.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, shards: Sequence[int], history_chunks: int
    ):
        """Read the shards of a split.

        Args:
            folder: the split's.
            manifest: the split's.
            shards: which, in order.
            history_chunks: C.

        Raises:
            UserError: a shard is missing or damaged.
        """
        self.folder = folder
        self.manifest = manifest
        self.history_chunks = history_chunks
        self.places: list[Place] = []
        self._ends: dict[int, Place] = {}  # of shards: the document that each ends in
        depth: list[Ints] = []
        continued: list[Place | None] = []  # the document that each chunk continues
        stretches: dict[Place, Stretch] = {}  # by the document
        for shard in shards:
            read = read_shard(folder, manifest, shard)
            last = self._last_documents(shard, read)
            self._ends[shard] = last[-1]
            continued += [last[n - 1] if read.depth[n] else None for n in range(len(last))]
            full = ~(read.tokens == manifest.pad_id).any(axis=1)
            for begin, count in _runs(shard, last, full):
                opened = len(self.places) + begin
                stretches[last[begin]] = self._stretch(opened, count)
            self.places += [(shard, n) for n in range(len(last))]
            depth.append(read.depth)
        self.depth = np.concatenate(depth)
        self._choose(continued, stretches)

    def _last_documents(self, shard: int, read: ShardTokens) -> list[Place]:
        """The document that each chunk ends in, named by the place of the chunk it begins in."""
        begins = (read.tokens == self.manifest.bos_id).any(axis=1)
        documents: list[Place] = []
        for n, opens in enumerate(begins):
            if opens:
                documents.append((shard, n))
            elif n:
                documents.append(documents[-1])
            else:
                documents.append(self._document_before(shard))
        return documents

    def _document_before(self, shard: int) -> Place:
        """The document that runs on into a shard from the one before it."""
        passed = []
        for before in range(shard - 1, -1, -1):
            if before not in self._ends:
                tokens = read_shard(self.folder, self.manifest, before).tokens
                opened = np.flatnonzero((tokens == self.manifest.bos_id).any(axis=1))
                if not len(opened):
                    passed.append(before)
                    continue
                self._ends[before] = before, int(opened[-1])
            self._ends |= dict.fromkeys(passed, self._ends[before])
            return self._ends[before]
        return shard, 0

    def _stretch(self, opened: int, count: int) -> Stretch:
        """Up to C chunks of a document, a little behind its beginning where it is long enough."""
        size = self.history_chunks
        return Stretch(opened, opened + min(size, max(0, count - size)), min(count, size))

    def _choose(self, continued: Sequence[Place | None], stretches: dict[Place, Stretch]) -> None:
        """Give every chunk with history a stretch: of the longest, the nearest before its block.

        Two to choose from are enough, as at most one is of the chunk's own document; but where one
        document alone has the longest, it may be the only one that will do.
        """
        self.stretches: list[Stretch] = []
        self.stretch_of = np.full(len(self.places), NONE)
        numbers: dict[Place, int] = {}
        longest = _longest(stretches)
        pool = sorted(longest, key=lambda document: stretches[document].opened)
        opened = [stretches[document].opened for document in pool]
        for position, own in enumerate(continued):
            if own is None:
                continue
            nearest = bisect_left(opened, position // BLOCK * BLOCK) - 1  # -1 is the last
            needed = min(self.depth[position], self.history_chunks)
            near = [pool[nearest - back] for back in range(min(2, len(pool)))]
            for document in (*near, *longest[:1]):
                if document != own and stretches[document].chunks >= needed:
                    if document not in numbers:
                        numbers[document] = len(self.stretches)
                        self.stretches.append(stretches[document])
                    self.stretch_of[position] = numbers[document]
                    break

    def share(self, rank: int, ranks: int, window: int, rows: int, whole_documents: bool) -> Share:
        """What `rank` of `ranks` reads, in batches of at most `rows` windows of K chunks.

        Args:
            rank: from 0.
            ranks: of the job.
            window: K.
            rows: at most in a batch.
            whole_documents: each row reads documents from start to end, batch after batch; else
                rows follow each other, in a batch and from batch to batch.
        """
        if whole_documents:
            return Share(self._table(self._dealt(rank, ranks, window, rows)), 0)
        count = -(-len(self.places) // window)
        begin, end = (count * r // ranks for r in (rank, rank + 1))
        seen = min(self.depth[begin * window], self.history_chunks) if begin < end else 0
        lead = -(-int(seen) // window)
        positions = np.full((count, window), NONE)
        positions.reshape(-1)[: len(self.places)] = np.arange(len(self.places))
        mine = positions[begin - lead : end]
        rows = max(1, min(rows, len(mine)))
        batches = -(-len(mine) // rows)
        table = np.full((batches * rows, window), NONE)
        table[: len(mine)] = mine
        return Share(self._table(table.reshape(batches, rows, window)), lead)

    def _dealt(self, rank: int, ranks: int, window: int, rows: int) -> Ints:
        """Whole documents dealt to rows of about the same length: [batches, rows, K]."""
        starts = np.flatnonzero(self.depth == 0)
        lengths = np.diff(np.append(starts, len(self.places)))
        count = max(1, min(ranks * rows, len(self.places) // int(lengths.max())))
        loads = [(0, row) for row in range(count)]
        lanes: list[list[int]] = [[] for _ in range(count)]
        for unit in np.lexsort((starts, -lengths)):  # the longest first
            load, row = heapq.heappop(loads)
            lanes[row] += range(starts[unit], starts[unit] + lengths[unit])
            heapq.heappush(loads, (load + int(lengths[unit]), row))
        return _batches(lanes[rank::ranks], window)

    def stretches_at(self, positions: Ints) -> Ints:
        """`stretch_of` the chunks at these positions; NONE where there is no chunk."""
        return np.where(positions == NONE, NONE, self.stretch_of[positions])

    def stretch_table(self, numbers: Sequence[int], window: int, whole_documents: bool) -> Table:
        """The chunks of stretches, a row each; from their documents' beginning where asked."""
        chosen = [self.stretches[number] for number in numbers]
        begins = [s.opened if whole_documents else s.first for s in chosen]
        lanes = [list(range(b, s.first + s.chunks)) for b, s in zip(begins, chosen, strict=True)]
        return self._table(_batches(lanes, window))

    def _table(self, positions: Ints) -> Table:
        return Table(self.places, positions)


def _runs(
    shard: int, documents: Sequence[Place], full: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, int]]:
    """(first chunk, chunks) of every document that begins in a shard, up to one with padding.

    Args:
        shard: its number.
        documents: the document that each chunk ends in.
        full: whether each chunk has no padding.
    """
    for document, chunks in groupby(range(len(documents)), key=documents.__getitem__):
        run = list(chunks)
        count = int(full[run].sum())  # padding stands at the end of a split only
        if document == (shard, run[0]) and count:
            yield run[0], count


def _longest(stretches: dict[Place, Stretch]) -> list[Place]:
    """The documents with the longest stretches, these first: two or more, if there are so many."""
    counts = sorted({stretch.chunks for stretch in stretches.values()}, reverse=True)
    pool: list[Place] = []
    for count in counts:
        pool += [document for document, stretch in stretches.items() if stretch.chunks == count]
        if len(pool) > 1:
            break
    return pool


def _batches(lanes: Sequence[Sequence[int]], window: int) -> Ints:
    """Positions of rows, each cut into windows: [batches, rows, K]."""
    batches = -(-max(map(len, lanes), default=0) // window)
    positions = np.full((len(lanes), batches * window), NONE)
    for row, lane in zip(positions, lanes, strict=True):
        row[: len(lane)] = lane
    return positions.reshape(len(lanes), batches, window).swapaxes(0, 1)
