"""What a manifest says about the stream of a split, in a form that is cheap to send to workers."""

import tempfile
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.store import Store
from i3dist.data.chat import ChatIds
from i3dist.data.manifest import TAR_BLOCK, Manifest, member_stride
from i3dist.data.token_types import UINT16, TokenType
from i3dist.data.tokenizer import Tokenizer
from i3dist.files import regular

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """The stream of a split: its cuts and its ids."""

    folder: Path  # of the split
    chunk_length: int
    chunks_per_shard: int
    shards: int
    tokens: int
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unused: tuple[int, ...] = ()  # special ids that no document has
    token_type: TokenType = UINT16
    chat: ChatIds | None = None  # of conversations, the ids of their template
    store: Store | None = None  # where the shards are, if not in the folder

    @classmethod
    def of(
        cls,
        folder: Path,
        manifest: Manifest,
        tokenizer: Tokenizer | None,
        store: Store | None = None,
    ) -> Self:
        """The stream of a manifest. Without a tokenizer the other special ids are unknown."""
        framing = {manifest.bos_id, manifest.eos_id, manifest.pad_id}
        special = set(tokenizer.special_ids.values()) if tokenizer else set()
        kind = manifest.token_type
        chat = ChatIds.of(tokenizer) if tokenizer and kind.has_mask else None
        return cls(
            folder,
            manifest.chunk_length,
            manifest.chunks_per_shard,
            len(manifest.shards),
            manifest.tokens,
            manifest.vocab_size,
            manifest.bos_id,
            manifest.eos_id,
            manifest.pad_id,
            tuple(sorted(special - framing - set(chat.all if chat else ()))),
            kind,
            chat,
            store,
        )

    def open_shard(self, name: str) -> FileIO:
        """Open a shard without a buffer; of one at a URL a copy, which vanishes when closed."""
        if self.store is None:
            # A string, as joining paths takes as long as opening one.
            return open(regular(f"{self.folder}/{name}"), "rb", buffering=0)
        with tempfile.NamedTemporaryFile() as copy:
            self.store.fetch(self.file(name), Path(copy.name))
            return open(copy.name, "rb", buffering=0)

    @property
    def shard_tokens(self) -> int:
        """Tokens of a full shard."""
        return self.chunk_length * self.chunks_per_shard

    def places(self, positions: Ints) -> Ints:
        """Where tokens of a shard stand among all words of its file, headers included."""
        word = self.token_type.dtype.itemsize
        gap = member_stride(self.chunk_length, word) // word - self.chunk_length
        return positions + (positions // self.chunk_length * gap + TAR_BLOCK // word)

    def file(self, name: str) -> str:
        """A file of the split as damages name it."""
        return f"{self.folder.name}/{name}"

    def special_ranges(self) -> list[tuple[int, int]]:
        """The first and last id of each run of consecutive special ids."""
        ranges: list[tuple[int, int]] = []
        chat = self.chat.all if self.chat else ()
        for number in sorted({self.bos_id, self.eos_id, self.pad_id, *self.unused, *chat}):
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1] = (ranges[-1][0], number)
            else:
                ranges.append((number, number))
        return ranges
