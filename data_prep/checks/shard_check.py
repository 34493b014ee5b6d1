"""Checks one shard against manifest, format and index, in one read.

The file is read in blocks of whole members. Each block is hashed, compared with the archive that
docs/data-format.md describes, and searched for special ids while it is in the processor's cache.
"""

import hashlib
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.checks.block_check import BlockCheck, Ints
from data_prep.checks.chat_check import (
    WRONG_MASK,
    WRONG_ORDER,
    ChatEnds,
    Marks,
    disorder,
    wrong_mask,
)
from data_prep.checks.damage import MAKE_AGAIN, RESTORE, Damage, by_chunk, stretches, token_place
from data_prep.checks.index_rows import Stated, compare_rows
from data_prep.checks.stream import Stream
from i3dist.data.manifest import Shard


class Ends(NamedTuple):
    """How a shard begins and ends, to join it with its neighbors."""

    begins_inside: bool  # a document that began in an earlier shard
    ends_inside: bool  # a document that goes on in the next shard
    begins_with_eos: bool
    ends_with_bos: bool
    chat: ChatEnds | None = None  # of conversations


class ShardReport(NamedTuple):
    """What a check of a shard has found; `ends` is None if its tokens could not be read."""

    number: int
    size: int  # bytes, as the manifest says
    damages: list[Damage]
    wrong_sha256: str = ""  # of a file that has another than the manifest says
    ends: Ends | None = None
    documents: int = 0  # that begin in the shard


def check_shard(
    stream: Stream, number: int, shard: Shard, stated: Stated, blocks: BlockCheck
) -> ShardReport:
    """Check shard `number` against its line in the manifest and its rows in the index.

    Args:
        stream: the split.
        number: the shard's.
        shard: its line in the manifest.
        stated: what its rows in the index state.
        blocks: reads and checks blocks of this split.
    """
    check = _Check(stream, number, shard, stated, blocks)
    try:
        is_read = check.read()
    except OSError as error:
        check.add("", f"cannot be read ({error.strerror})")
        is_read = False
    if not is_read:
        return ShardReport(number, shard.size, check.damages)
    ends, documents = check.as_stated() or check.boundaries()
    return ShardReport(number, shard.size, check.damages, check.wrong_sha256, ends, documents)


@dataclass
class _Check:
    stream: Stream
    number: int
    shard: Shard
    stated: Stated
    blocks: BlockCheck
    damages: list[Damage] = field(default_factory=list)
    wrong_sha256: str = ""

    def add(self, place: str, problem: str, remedy: str = RESTORE) -> None:
        """Note a damage of the shard."""
        self.damages.append(Damage(self.stream.file(self.shard.name), place, problem, remedy))

    def add_by_chunk(self, positions: NDArray[Any], problem: str, remedy: str = RESTORE) -> None:
        """Note one damage for each chunk that holds some of the positions."""
        for first, count in by_chunk(positions, self.stream.chunk_length):
            more = f" (and {count - 1} more in this chunk)" if count > 1 else ""
            self.add(token_place(first, self.stream.chunk_length), f"{problem}{more}", remedy)

    def read(self) -> bool:
        """Read the file and check all but the boundaries of documents; False if it is cut.

        Special ids are looked for where the shard's rows of the index say that they stand, and
        searched for if any stands elsewhere.
        """
        stream, chunks, blocks = self.stream, self.shard.chunks, self.blocks
        blocks.begin(self.number, chunks, self.stated.ends, self.stated.places)
        digest = hashlib.sha256()
        with stream.open_shard(self.shard.name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self.shard.size:
                self.add(
                    f"chunk {min(size // blocks.stride, chunks - 1)}",
                    f"the file has {size:,} bytes, not {self.shard.size:,}",
                )
                return False
            left = size
            for first in range(0, chunks, blocks.members):
                count = min(blocks.members, chunks - first)
                wanted = left if first + count == chunks else count * blocks.stride
                data = blocks.read(file, wanted)
                if len(data) < wanted:
                    raise OSError(0, "it became shorter")
                left -= wanted
                digest.update(data)
                tail = bytes(data[count * blocks.stride :])  # empty but at the end
                blocks.check(first, count)
        for first, last in stretches(sorted(set(blocks.malformed))):
            place = f"chunk {first}" if first == last else f"chunks {first} to {last}"
            self.add(place, "the header or padding is not that of the format")
        if tail != bytes(len(tail)):
            self.add("end of the archive", "it has other bytes than zeros")
        if (sha256 := digest.hexdigest()) != self.shard.sha256:
            self.wrong_sha256 = sha256
            # First, as it is the whole of the damage where an ordinary id became another.
            problem = "its SHA-256 is not the manifest's"
            self.damages.insert(0, Damage(stream.file(self.shard.name), "", problem, RESTORE))
        return True

    def as_stated(self) -> tuple[Ends, int] | None:
        """The ends and the number of documents, if <BOS> and <EOS> are where the index has them.

        Then nothing is wrong with them. None if it takes a closer look to say so.
        """
        stream, stated = self.stream, self.stated
        is_last = self.number == stream.shards - 1  # which may hold <PAD>
        if is_last or stated.rows is None or not stated.fills:
            return None
        if (ids := self.blocks.ids_where_expected()) is None:  # as of all conversations
            return None
        first, last, is_ordinary = int(ids[0]), int(ids[-1]), self.blocks.is_ordinary
        begins_inside, ends_inside = bool(stated.rows.piece[0] > 0), last != stream.eos_id
        if not (is_ordinary(first) if begins_inside else first == stream.bos_id):
            return None
        if ends_inside and not is_ordinary(last):
            return None
        # Between the two, a piece ends with <EOS> and the next begins with <BOS>.
        border = np.array((stream.eos_id, stream.bos_id), ids.dtype).tobytes()
        if ids[1:-1].tobytes() != border * (len(ids) // 2 - 1):
            return None
        return Ends(begins_inside, ends_inside, False, False), len(ids) // 2 - begins_inside

    def boundaries(self) -> tuple[Ends, int]:
        """Check ids, <BOS>, <EOS> and <PAD>, and the shard's rows in the index."""
        found, rows = self.blocks.findings(), self.stated.rows
        if len(found.beyond):
            problem = f"its id is not below vocab_size {self.stream.vocab_size:,}"
            self.add_by_chunk(found.beyond, problem)
        stream = self.stream
        positions, ids = found.positions, found.ids
        is_bos, is_eos = ids == stream.bos_id, ids == stream.eos_id
        bos, eos = positions[is_bos], positions[is_eos]
        end = self.shard.chunks * stream.chunk_length
        if self.number == stream.shards - 1 or len(bos) + len(eos) < len(ids):
            if (unused := np.isin(ids, stream.unused)).any():
                self.add_by_chunk(positions[unused], "a special id stands in the text", MAKE_AGAIN)
            end = self._end_of_text(positions[ids == stream.pad_id])
            bos, eos = bos[bos < end], eos[eos < end]
        ends, starts, stops = _pieces(bos, eos, end)
        if not _alternate(ends, starts, stops, end):
            framing = (is_bos | is_eos) & (positions < end)
            self._add_disorder(positions[framing], is_bos[framing], end)
            stops = np.append(starts[1:], end)[: len(starts)]
        if stream.chat:
            ends = self._check_chat(ends, Marks(positions, ids, found.changes, end))
        if rows is not None:
            self.damages.extend(
                compare_rows(stream, self.number, rows, starts, stops, ends.begins_inside)
            )
        return ends, len(bos)

    def _check_chat(self, ends: Ends, marks: Marks) -> Ends:
        """Check the shard's conversations; returns its ends with theirs."""
        text = marks.positions < marks.end
        marks = marks._replace(positions=marks.positions[text], ids=marks.ids[text])
        self.add_by_chunk(disorder(self.stream, marks), WRONG_ORDER, MAKE_AGAIN)
        self.add_by_chunk(wrong_mask(self.stream, marks), WRONG_MASK, MAKE_AGAIN)
        return ends._replace(chat=ChatEnds.of(self.stream, marks))

    def _end_of_text(self, padding: Ints) -> int:
        """Number of the shard's tokens before the <PAD> at its end, as far as there is any."""
        stream, total = self.stream, self.shard.chunks * self.stream.chunk_length
        # The run of <PAD> that ends with the shard.
        trailing = padding - np.arange(len(padding)) == total - len(padding)
        end = total - int(trailing.sum())
        if len(padding) > trailing.sum():
            self.add_by_chunk(padding[~trailing], "<PAD> stands before the end of the split")
        wanted = min(total, stream.tokens - self.number * stream.shard_tokens)
        if end != wanted:
            problem = (
                f"<PAD> should fill the last {total - wanted:,} tokens of the shard by the "
                f"manifest's `tokens`, and fills {total - end:,}"
            )
            self.add(token_place(min(end, wanted), stream.chunk_length), problem)
        return end

    def _add_disorder(self, positions: Ints, begins: NDArray[np.bool_], end: int) -> None:
        """Note where <BOS> and <EOS> do not alternate; `begins` tells which are <BOS>."""
        before, after = begins[:-1], begins[1:]
        close = np.diff(positions) == 1
        faults = (
            (before & after, "<BOS> follows <BOS>: the document before has no <EOS>"),
            (~before & ~after, "<EOS> follows <EOS>: this document has no <BOS>"),
            (~before & after & ~close, "tokens stand between <EOS> and this <BOS>"),
            (before & ~after & close, "a document is empty: <EOS> follows <BOS>"),
        )
        for where, problem in faults:
            self.add_by_chunk(positions[1:][where], problem)
        if begins[:1].any() and positions[0] > 0:
            self.add_by_chunk(positions[:1], "the document before this <BOS> has no <EOS>")
        if len(begins) and not begins[-1] and positions[-1] != end - 1:
            self.add_by_chunk(positions[-1:], "tokens follow this <EOS> without a <BOS>")


def _pieces(bos: Ints, eos: Ints, end: int) -> tuple[Ends, Ints, Ints]:
    """How a shard begins and ends, and where its pieces start and stop.

    Args:
        bos: positions of <BOS>, ascending.
        eos: positions of <EOS>, ascending.
        end: number of tokens before the padding.
    """
    first_bos, first_eos = (int(some[0]) if len(some) else end for some in (bos, eos))
    last_bos, last_eos = (int(some[-1]) if len(some) else -1 for some in (bos, eos))
    ends = Ends(
        begins_inside=first_bos > 0,
        ends_inside=last_bos > last_eos or not len(bos) + len(eos),
        begins_with_eos=first_eos == 0,
        ends_with_bos=last_bos == end - 1,
    )
    stops = eos + 1
    if ends.begins_inside:
        bos = np.concatenate(([0], bos))
    if ends.ends_inside:
        stops = np.concatenate((stops, [end]))
    return ends, bos, stops


def _alternate(ends: Ends, starts: Ints, stops: Ints, end: int) -> bool:
    """Whether the pieces fill the shard one after the other, and no document is empty."""
    if len(starts) != len(stops) or starts[0] != 0 or stops[-1] != end:
        return False
    if (starts[1:] != stops[:-1]).any():
        return False
    # A document that lies in the shard as a whole has <BOS>, one token or more, and <EOS>.
    whole = (stops - starts)[ends.begins_inside : len(starts) - ends.ends_inside]
    return not len(whole) or int(whole.min()) > 2
