"""The chunks that an evaluation reads, shared out among ranks.

A chunk's latents do not depend on history, so a document can be read in pieces: the chunks of all
shards form one sequence, which is cut into windows of K, and each rank reads consecutive windows.
With carried RWKV state, one lane must read a document from its start, so whole documents are dealt
out instead. Either way ranks read about the same number of chunks, and each chunk is read by one
rank, except the few before a rank's first window whose latents that window sees.

Every chunk with history is also given a *stretch*: consecutive chunks of another document, which
replace its history. The loss with them tells what the history's content is worth, as opposed to
having any history. All choices depend only on the shards, so the figures are the same for any
number of ranks.

Notation: M chunks of the evaluation, C history chunks, K chunks of a window, T tokens of a chunk.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from i3dist.data.folder import Ahead, Folder
from i3dist.data.manifest import Manifest
from i3dist.data.schedule import Place
from i3dist.data.shards import ShardTokens, read_shard

# Number of consecutive chunks that share their stretches, whose latents are computed in addition.
BLOCK = 128
NONE = -1
# Number of shards that are fetched ahead where the data lie at a URL.
AHEAD = 8

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """(batch, row) -> K chunks of the evaluation, read as windows of a `LaneSchedule` are."""

    places: Sequence[Place]
    positions: Ints  # [batches, rows, K] indices of `places`, or NONE

    @property
    def window(self) -> int:
        """Chunks K of a window."""
        return self.positions.shape[2]

    def chunks(self, index: int, lane: int) -> list[Place | None]:
        """The K chunks that a row reads in batch `index`; None where it reads none."""
        return [None if p == NONE else self.places[p] for p in self.positions[index, lane]]

    def padded(self, rows: int) -> "Table":
        """The same table with at least `rows` rows; new rows are empty."""
        more = max(0, rows - self.positions.shape[1])
        positions = np.pad(self.positions, ((0, 0), (0, more), (0, 0)), constant_values=NONE)
        return Table(self.places, positions)


class Share(NamedTuple):
    """What one rank reads."""

    table: Table
    lead: int  # number of first rows that are read only for their latents, and not scored

    def lead_in(self, batch: int) -> int:
        """The number of a batch's rows that belong to the lead."""
        return max(0, self.lead - batch * self.table.positions.shape[1])


class Stretch(NamedTuple):
    """Some consecutive chunks of one document; positions are among the evaluation's M chunks."""

    opened: int  # the chunk in which the document begins
    first: int
    chunks: int


class HeldOut:
    """The chunks of some shards of a split in order, and the stretch of each chunk.

    Attributes:
        places: [M] (shard, chunk).
        depth: [M] number of chunks before each in the document that it continues.
        stretch_of: [M] index into `stretches`; NONE if a chunk has no history, or if no other
            document has as many chunks.
        stretches: see `Stretch`.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, shards: Sequence[int], history_chunks: int
    ):
        """Read the shards of a split.

        Args:
            folder: the split's.
            manifest: the split's.
            shards: their numbers, in order.
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
        ahead = Ahead(folder)
        for number, shard in enumerate(shards):
            new = shards[:AHEAD] if number == 0 else shards[number + AHEAD - 1 : number + AHEAD]
            ahead.want(manifest.shards[following] for following in new)
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
        """The document that each chunk ends in, given as the place of the chunk it begins in."""
        begins = (read.tokens == self.manifest.bos_id).any(axis=1)
        opened = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), NONE))
        before = (shard, 0) if begins[0] else self._document_before(shard)
        return [before if n == NONE else (shard, n) for n in opened.tolist()]

    def _document_before(self, shard: int) -> Place:
        """The document that continues into a shard from the shards before it."""
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
        """Up to C chunks of a document, up to C chunks after its beginning if it is long enough."""
        size = self.history_chunks
        return Stretch(opened, opened + min(size, max(0, count - size)), min(count, size))

    def _choose(self, continued: Sequence[Place | None], stretches: dict[Place, Stretch]) -> None:
        """Give every chunk with history a stretch: the nearest of the longest before its block.

        Two candidates are enough, because at most one is of the chunk's own document. But if only
        one document has the longest stretch, it may be the only one that is long enough.
        """
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
                    self.stretch_of[position] = numbers.setdefault(document, len(numbers))
                    break
        self.stretches = [stretches[document] for document in numbers]

    def share(self, rank: int, ranks: int, window: int, rows: int, whole_documents: bool) -> Share:
        """The share of `rank` of `ranks`, in batches of at most `rows` windows of K chunks.

        Args:
            rank: from 0.
            ranks: the number of ranks of the job.
            window: K.
            rows: most windows in a batch.
            whole_documents: whether each row reads documents from start to end, batch after batch.
                Otherwise the rows of a batch, and successive batches, are consecutive.
        """
        if whole_documents:
            return Share(Table(self.places, self._dealt(rank, ranks, window, rows)), 0)
        count = -(-len(self.places) // window)
        begin, end = (count * r // ranks for r in (rank, rank + 1))
        seen = min(self.depth[begin * window], self.history_chunks) if begin < end else 0
        lead = -(-int(seen) // window)
        rows = max(1, min(rows, end - begin + lead))
        read = np.arange((begin - lead) * window, min(end * window, len(self.places)))
        padding = -len(read) % (rows * window)
        table = np.pad(read, (0, padding), constant_values=NONE).reshape(-1, rows, window)
        return Share(Table(self.places, table), lead)

    def _dealt(self, rank: int, ranks: int, window: int, rows: int) -> Ints:
        """Whole documents dealt out to rows of about equal length: [batches, rows, K]."""
        starts = np.flatnonzero(self.depth == 0)
        lengths = np.diff(np.append(starts, len(self.places)))
        count = max(1, min(ranks * rows, len(self.places) // int(lengths.max())))
        loads = [(0, row) for row in range(count)]
        lanes: list[list[int]] = [[] for _ in range(count)]
        for unit in np.lexsort((starts, -lengths)):  # longest first
            load, row = heapq.heappop(loads)
            lanes[row] += range(starts[unit], starts[unit] + lengths[unit])
            heapq.heappush(loads, (load + int(lengths[unit]), row))
        return _batches(lanes[rank::ranks], window)

    def stretches_at(self, positions: Ints) -> Ints:
        """`stretch_of` the chunks at these positions; NONE where there is no chunk."""
        return np.where(positions == NONE, NONE, self.stretch_of[positions])

    def stretch_table(self, numbers: Sequence[int], window: int, whole_documents: bool) -> Table:
        """A row for each stretch; with `whole_documents` from its document's beginning."""
        chosen = [self.stretches[number] for number in numbers]
        begins = [s.opened if whole_documents else s.first for s in chosen]
        lanes = [list(range(b, s.first + s.chunks)) for b, s in zip(begins, chosen, strict=True)]
        return Table(self.places, _batches(lanes, window))


def _runs(
    shard: int, documents: Sequence[Place], full: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, int]]:
    """(first chunk, number of chunks) of every document that begins in a shard.

    Args:
        shard: its number.
        documents: the document that each chunk ends in.
        full: whether each chunk has no padding; a chunk with padding does not count.
    """
    for document, chunks in groupby(range(len(documents)), key=documents.__getitem__):
        run = list(chunks)
        count = int(full[run].sum())  # padding stands at the end of a split only
        if document == (shard, run[0]) and count:
            yield run[0], count


def _longest(stretches: dict[Place, Stretch]) -> list[Place]:
    """The documents with the longest stretches, longest first; two or more, if there are two."""
    order = sorted(stretches, key=lambda document: -stretches[document].chunks)
    least = min((stretches[document].chunks for document in order[:2]), default=0)
    return [document for document in order if stretches[document].chunks >= least]


def _batches(lanes: Sequence[Sequence[int]], window: int) -> Ints:
    """The positions of each row, cut into windows: [batches, rows, K]."""
    batches = -(-max(map(len, lanes), default=0) // window)
    positions = np.full((len(lanes), batches * window), NONE)
    for row, lane in zip(positions, lanes, strict=True):
        row[: len(lane)] = lane
    return positions.reshape(len(lanes), batches, window).swapaxes(0, 1)
