"""What an evaluation reads follows from the shards alone: every chunk once, whoever reads it; and
what takes the place of a chunk's history are real chunks of one other document.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.data.held_out import NONE, HeldOut, Share
from i3dist.data.manifest import Manifest
from i3dist.data.shards import ShardTokens, read_shard
from tests.data.splits import documents_of, split_of

LENGTH, VOCAB, HISTORY = 6, 40, 3


@dataclass(frozen=True)
class SplitCase:
    """A stream of documents, and which of its shards are read."""

    lengths: tuple[int, ...]
    per_shard: int
    left_out: int  # every such shard is not read; 0 leaves none out

    def shards(self) -> list[int]:
        chunks = -(-sum(length + 2 for length in self.lengths) // LENGTH)
        count = -(-chunks // self.per_shard)
        kept = [s for s in range(count) if not self.left_out or s % self.left_out]
        return kept[::-1] or list(range(count))

    def documents(self) -> list[tuple[int, int]]:
        """(document of the first token, of the last) of each chunk of the stream, padding as -1."""
        owner = [n for n, length in enumerate(self.lengths) for _ in range(length + 2)]
        owner += [-1] * (-len(owner) % LENGTH)
        return [(owner[i], owner[i + LENGTH - 1]) for i in range(0, len(owner), LENGTH)]


@st.composite
def cases(draw: st.DrawFn) -> SplitCase:
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=14))
    return SplitCase(tuple(lengths), draw(st.integers(1, 8)), draw(st.sampled_from([0, 2, 3])))


@contextmanager
def held_out(case: SplitCase) -> Iterator[HeldOut]:
    with TemporaryDirectory() as name:
        documents = documents_of(0, case.lengths, VOCAB)
        split = split_of(Path(name, "valid"), documents, LENGTH, case.per_shard, VOCAB)
        yield HeldOut(split.folder, split.manifest, case.shards(), HISTORY)


def counted(share: Share) -> list[int]:
    """Positions that a rank evaluates."""
    positions = share.table.positions.copy()
    for number, batch in enumerate(positions):
        batch[: share.lead_in(number)] = NONE
    return positions[positions != NONE].tolist()


@given(case=cases())
@settings(deadline=None, max_examples=60)
def test_a_stretch_is_real_chunks_of_one_other_document(case: SplitCase) -> None:
    """Against the list of documents: none of it is the chunk's own, padding or of two."""
    documents = case.documents()
    with held_out(case) as read:
        at = [shard * case.per_shard + chunk for shard, chunk in read.places]
        for position, number in enumerate(read.stretch_of.tolist()):
            depth = int(read.depth[position])
            own, needed = documents[at[position]][0], min(depth, HISTORY)
            if number == NONE:
                lone = depth and _longest_other(case, read, own) >= needed
                assert not lone, "another document would have had enough chunks"
                continue
            stretch = read.stretches[number]
            chunks = range(stretch.first, stretch.first + stretch.chunks)
            assert needed <= len(chunks) <= HISTORY and depth > 0
            ends = {documents[at[chunk]][1] for chunk in chunks}
            assert len(ends) == 1 and ends.isdisjoint({own, -1})
            assert len({read.places[chunk][0] for chunk in chunks}) == 1, "of one shard"
            assert documents[at[stretch.opened]][1] in ends
            assert documents[at[stretch.opened] - 1][1] not in ends, "it begins there"


def _longest_other(case: SplitCase, read: HeldOut, own: int) -> int:
    """The most whole chunks, in one of the shards read, that end in one document but `own`."""
    documents, runs = case.documents(), Counter()
    for shard, chunk in read.places:
        index = shard * case.per_shard + chunk
        document = documents[index][1]
        begun = [i for i, (_, last) in enumerate(documents) if last == document]
        if document not in (own, -1) and begun[0] // case.per_shard == shard:
            runs[document] += 1
    return max(runs.values(), default=0)


@given(
    case=cases(),
    ranks=st.integers(1, 5),
    window=st.integers(1, 4),
    rows=st.integers(1, 6),
    whole_documents=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_ranks_share_every_chunk_out_once(
    case: SplitCase, ranks: int, window: int, rows: int, whole_documents: bool
) -> None:
    with held_out(case) as read:
        shares = [read.share(r, ranks, window, rows, whole_documents) for r in range(ranks)]
        found = sorted(position for share in shares for position in counted(share))
        assert found == list(range(len(read.places)))
        for share in shares:
            assert share.table.positions.shape[1] <= rows


@given(case=cases(), ranks=st.integers(1, 5), window=st.integers(1, 4), rows=st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_consecutive_rows_have_the_chunks_that_they_see(
    case: SplitCase, ranks: int, window: int, rows: int
) -> None:
    """A counted chunk's history is read before it, in the rows that its rank reads."""
    with held_out(case) as read:
        for rank in range(ranks):
            share = read.share(rank, ranks, window, rows, False)
            stream = share.table.positions.reshape(-1)
            stream = stream[stream != NONE].tolist()
            assert stream == [stream[0] + n for n in range(len(stream))]
            for position in counted(share):
                seen = min(int(read.depth[position]), HISTORY)
                assert position - seen >= stream[0]


@given(case=cases(), ranks=st.integers(1, 5), window=st.integers(1, 4), rows=st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_whole_documents_stay_in_one_row_and_in_order(
    case: SplitCase, ranks: int, window: int, rows: int
) -> None:
    with held_out(case) as read:
        for rank in range(ranks):
            positions = read.share(rank, ranks, window, rows, True).table.positions
            for lane in range(positions.shape[1]):
                row = positions[:, lane].reshape(-1)
                chunks = row[row != NONE]
                assert (row[: len(chunks)] == chunks).all(), "nothing before a row's end is idle"
                for before, after in zip([NONE, *chunks], chunks, strict=False):
                    assert after == before + 1 or read.depth[after] == 0


@given(chunks=st.integers(64, 1500), ranks=st.sampled_from([1, 2, 4, 8, 32]))
@settings(deadline=None, max_examples=15)
def test_the_cost_is_near_the_chunks_divided_by_the_ranks(chunks: int, ranks: int) -> None:
    """At 256 lanes in a rank's batch too: beside its share a rank reads two rows at most."""
    case = SplitCase((chunks * LENGTH - 2,), 256, 0)
    with held_out(case) as read:
        for window, rows in ((8, 4), (8, 256), (1, 32)):
            for rank in range(ranks):
                share = read.share(rank, ranks, window, rows, False)
                batches = share.table.positions
                own = -(-chunks // window // ranks) + 1 - (-HISTORY // window)
                assert batches.shape[0] * batches.shape[1] < own + min(rows, own)


@pytest.mark.parametrize("left_out", [0, 2])
def test_shards_are_read_once_or_twice_however_long_a_document_is(
    left_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document over 60 shards: where it begins is looked up once, not for each of them."""
    case, reads = SplitCase((60 * LENGTH - 2,), 1, left_out), []

    def counted_read(folder: Path, manifest: Manifest, shard: int) -> ShardTokens:
        reads.append(shard)
        return read_shard(folder, manifest, shard)

    monkeypatch.setattr("i3dist.data.held_out.read_shard", counted_read)
    with held_out(case) as read:
        assert len(read.places) == len(case.shards())
    assert max(Counter(reads).values()) <= 2
