"""The manifest of a split: the contract between `data_prep/shard.py` and the trainer.

A split is a folder with `manifest.json`, `index.parquet` and the shards; docs/data-format.md
describes them. A shard is a POSIX ustar archive with one member per chunk. All members have the
same size, so the tokens of chunk k begin at byte `k * member_stride(...) + TAR_BLOCK`.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, GetPydanticSchema, ValidationError, WrapSerializer, model_validator
from pydantic_core import CoreSchema, core_schema

from i3dist.cli.paths import path_text
from i3dist.data.folder import Folder, open_file
from i3dist.data.shard_table import (
    Count,
    Frozen,
    RowStyle,
    Sha256,
    Shape,
    Shard,
    ShardTable,
    canonical_row,
    shard_name,
    written_row,
)
from i3dist.data.token_types import LARGEST_VOCABULARY, TOKEN_TYPES, UINT16, TokenType
from i3dist.errors import UserError
from i3dist.files import written_aside

TAR_BLOCK = 512
"""Bytes of a tar block. A member's header is one block, and its payload is padded to blocks."""

TAR_RECORD = 10_240
"""Bytes of a tar record. An archive's length is a multiple of it."""

MANIFEST_NAME = "manifest.json"
TOKEN_BYTES = UINT16.dtype.itemsize
MAX_SHARDS = 4_000_000
MAX_MANIFEST_BYTES = 1 << 30

Dropped = dict[str, dict[str, Count]]
"""Numbers of documents that were dropped, by the name of the source and the reason."""

TokenId = Annotated[int, Field(ge=0, lt=LARGEST_VOCABULARY)]

# How `Manifest.write` goes on after its first keys, and how it ends. No string in JSON holds a line
# break, so these stand nowhere else. The first keys are shorter than _MOST_BEFORE_SHARDS bytes.
_BEFORE_SHARDS = b',\n "shards": ['
_AFTER_SHARDS = b"\n ]\n}\n"
_MOST_BEFORE_SHARDS = 1 << 16
_CANONICAL: Any = {"sort_keys": True, "separators": (",", ":")}


def member_name(shard: int, chunk: int, token_bytes: int = TOKEN_BYTES) -> str:
    """Name of the member that holds chunk number `chunk` of shard number `shard`."""
    return f"{shard:06d}-{chunk:06d}.u{8 * token_bytes}"


def member_stride(chunk_length: int, token_bytes: int = TOKEN_BYTES) -> int:
    """Bytes from one member to the next."""
    payload = chunk_length * token_bytes
    return TAR_BLOCK + -(-payload // TAR_BLOCK) * TAR_BLOCK


def archive_size(chunks: int, chunk_length: int, token_bytes: int = TOKEN_BYTES) -> int:
    """Bytes of a shard of `chunks` chunks: members, two zero blocks, filled up to a record."""
    used = chunks * member_stride(chunk_length, token_bytes) + 2 * TAR_BLOCK
    return -(-used // TAR_RECORD) * TAR_RECORD


def _tuple_or_table(_source: Any, handler: Any) -> CoreSchema:
    """The schema of a manifest's shards: a tuple of them, or a `ShardTable` as it is."""
    shards = Annotated[tuple[Shard, ...], Field(min_length=1, max_length=MAX_SHARDS)]
    in_json = handler(shards)
    in_python = core_schema.no_info_wrap_validator_function(
        lambda value, check: value if isinstance(value, ShardTable) else check(value), in_json
    )
    return core_schema.json_or_python_schema(in_json, in_python)


Shards = Annotated[
    Sequence[Shard],
    WrapSerializer(lambda shards, dump: dump(tuple(shards))),
    GetPydanticSchema(_tuple_or_table),
]


CountFromZero = Annotated[int, Field(ge=0)]


class SourceCounts(Frozen):
    """What all splits hold of one of several sources. `tokens` counts <BOS> and <EOS>."""

    name: Annotated[str, Field(max_length=4096)]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """How many times its documents were to be taken."""
    usable: CountFromZero
    """Its documents that were not skipped, with duplicates; a document taken twice is one."""
    documents: CountFromZero
    """Documents of the output that are its, copies included."""
    tokens: CountFromZero

    @property
    def epochs(self) -> float:
        """How many times its documents were taken, on average."""
        return self.documents / self.usable if self.usable else 0.0


def lowest_version(kind: TokenType, *of_version_2: object) -> Literal[1, 2]:
    """The lowest version of the format that has a token type and keys, None where there is none."""
    return 2 if any(value is not None for value in of_version_2) else kind.version


class _Header(Frozen):
    """All of a manifest but its shards."""

    format: Literal["i3dist-chunks"] = "i3dist-chunks"
    version: Literal[1, 2] = 1
    split: Annotated[str, Field(pattern=r"\A[a-z][a-z0-9_-]{0,31}\z")]
    chunk_length: Annotated[int, Field(ge=2, le=1 << 16)]
    chunks_per_shard: Annotated[int, Field(ge=1, le=1_000_000)]
    dtype: Literal["uint16-le", "uint32-le", "uint32-le-masked"] = "uint16-le"
    vocab_size: Annotated[int, Field(ge=1, le=LARGEST_VOCABULARY)]
    tokenizer_sha256: Sha256
    bos_id: TokenId
    eos_id: TokenId
    pad_id: TokenId
    source: Annotated[str, Field(max_length=4096)]
    sources: Annotated[tuple[SourceCounts, ...], Field(min_length=1)] | None = Field(
        default=None, exclude_if=lambda sources: sources is None
    )
    """Of version 2, where there are several sources or weights."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    documents: Count
    tokens: Count
    chunks: Count
    dropped: Annotated[Dropped | None, Field(exclude_if=lambda value: value is None)] = None

    @property
    def token_type(self) -> TokenType:
        """How shards store tokens."""
        return TOKEN_TYPES[self.dtype]

    def archive_size(self, chunks: int) -> int:
        """Bytes of a shard of so many chunks."""
        return archive_size(chunks, self.chunk_length, self.token_type.dtype.itemsize)

    @model_validator(mode="after")
    def _vocabulary_fits_the_dtype(self) -> Self:
        kind = self.token_type
        if self.vocab_size > kind.vocabulary:
            raise ValueError(f"vocab_size {self.vocab_size} is too large for dtype {self.dtype}")
        return self

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> Self:
        ids = (self.bos_id, self.eos_id, self.pad_id)
        if max(ids) >= self.vocab_size:
            raise ValueError(f"special ids {ids} do not all lie below vocab_size {self.vocab_size}")
        if len(set(ids)) != len(ids):
            raise ValueError(f"special ids {ids} are not all different")
        return self

    @model_validator(mode="after")
    def _version_is_the_lowest(self) -> Self:
        lowest = lowest_version(self.token_type, self.sources, self.dropped)
        if self.version != lowest:
            raise ValueError(f"version {self.version} where dtype and keys are of {lowest}")
        return self

    def head(self) -> bytes:
        """How the manifest's file begins, up to `_BEFORE_SHARDS`."""
        return self.model_dump_json(indent=1, exclude={"shards"}).encode().removesuffix(b"\n}")


class Manifest(_Header):
    """What one split holds. `tokens` counts <BOS> and <EOS>, and not <PAD>."""

    shards: Shards

    @model_validator(mode="after")
    def _shards_are_consecutive(self) -> Self:
        last = len(self.shards) - 1
        # The shards of a table are alike, and numbered by themselves.
        numbers = {0, last} if isinstance(self.shards, ShardTable) else range(last + 1)
        for number in numbers:
            shard = self.shards[number]
            if shard.name != shard_name(number):
                raise ValueError(
                    f"shard {number} is named {shard.name!r}, not {shard_name(number)!r}"
                )
            if shard.chunks > self.chunks_per_shard:
                raise ValueError(f"{shard.name} has more than {self.chunks_per_shard} chunks")
            if number < last and shard.chunks != self.chunks_per_shard:
                raise ValueError(f"{shard.name} is not the last and has {shard.chunks} chunks only")
            expected = self.archive_size(shard.chunks)
            if shard.size != expected:
                raise ValueError(f"{shard.name} has size {shard.size}, its chunks make {expected}")
        return self

    @model_validator(mode="after")
    def _totals_agree(self) -> Self:
        counted = sum(self.shard_chunks)
        if counted != self.chunks:
            raise ValueError(f"the shards hold {counted} chunks, chunks says {self.chunks}")
        if -(-self.tokens // self.chunk_length) != self.chunks:
            raise ValueError(f"{self.tokens} tokens do not fill {self.chunks} chunks")
        if self.tokens < 2 * self.documents:
            raise ValueError(f"{self.documents} documents need more than {self.tokens} tokens")
        return self

    @classmethod
    def load(cls, folder: Folder) -> Self:
        """Read and check `folder/manifest.json`.

        Raises:
            UserError: it is missing, unreadable or wrong; the message says in what. One at a URL
                cannot be fetched.
        """
        path = folder / MANIFEST_NAME
        try:
            with open_file(path, MAX_MANIFEST_BYTES) as file:
                if file.seek(0, os.SEEK_END) > MAX_MANIFEST_BYTES:
                    raise UserError(f"{path} is larger than any manifest; {_remedy(path)}")
                file.seek(0)
                return cls._read(file)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_missing(path)) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except ValidationError as error:
            problem = f"{_first_problem(error)}; {_remedy(path)}"
            raise UserError(f"{path} is not a valid manifest: {problem}") from None

    @classmethod
    def _read(cls, file: BinaryIO) -> Self:
        """Read a manifest; raises `ValidationError`."""
        if written := cls._read_as_written(file):
            return written
        file.seek(0)
        return cls.model_validate_json(file.read())

    @classmethod
    def _read_as_written(cls, file: BinaryIO) -> Self | None:
        """Read a manifest that is, byte for byte, what `write` makes of it; None otherwise.

        The shards are not parsed. They are compared with those that the header calls for.
        """
        head, found, _ = file.read(_MOST_BEFORE_SHARDS).partition(_BEFORE_SHARDS)
        if not found:
            return None
        try:
            header = _Header.model_validate_json(head + b"}")
            count = -(-header.chunks // header.chunks_per_shard)
            file.seek(len(head) + len(found))
            if count > MAX_SHARDS:
                return None
            table = ShardTable.read(file, count, *_shapes(header))
            if table is None:
                return None
            manifest = cls(**header.model_dump(), shards=table)
        except ValidationError:
            return None
        end = file.read(len(_AFTER_SHARDS) + 1)
        return manifest if (manifest.head(), end) == (head, _AFTER_SHARDS) else None

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`; a reader sees either the whole file or none."""
        with written_aside(folder / MANIFEST_NAME) as partial, partial.open("wb") as file:
            file.write(self.head() + _BEFORE_SHARDS)
            file.writelines(self._rows(written_row))
            file.write(_AFTER_SHARDS)

    def tokens_in(self, shard: int) -> int:
        """Tokens of one shard, without <PAD>."""
        before = shard * self.chunks_per_shard * self.chunk_length
        return min(self.shards[shard].chunks * self.chunk_length, self.tokens - before)

    @property
    def shard_chunks(self) -> tuple[int, ...]:
        """Chunks of each shard."""
        if isinstance(self.shards, ShardTable):
            full, last = self.shards.full, self.shards.last
            return (*repeat(full.chunks, len(self.shards) - 1), last.chunks)
        return tuple(shard.chunks for shard in self.shards)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Bytes of each shard, [N]."""
        chunks = np.array(self.shard_chunks)
        shapes = {count: self.archive_size(count) for count in set(chunks[[0, -1]].tolist())}
        return np.where(chunks == chunks[0], shapes[chunks[0]], shapes[chunks[-1]])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal if and only if the contents are equal."""
        header = self.model_dump(exclude={"shards"})
        before, after = (
            json.dumps({k: v for k, v in header.items() if (k < "shards") == first}, **_CANONICAL)
            for first in (True, False)
        )
        digest = hashlib.sha256(f'{before[:-1]},"shards":['.encode())
        for rows in self._rows(canonical_row):
            digest.update(rows)
        digest.update(f"],{after[1:]}".encode())
        return digest.hexdigest()

    def _rows(self, style: RowStyle) -> Iterator[bytes]:
        """The shards as text, in pieces, with commas between them."""
        if isinstance(self.shards, ShardTable):
            return self.shards.text(style)
        rows = (style(shard).encode() for shard in self.shards)
        return (row if number else row[1:] for number, row in enumerate(rows))


def _shapes(header: _Header) -> Iterator[Shape]:
    """The shapes of all shards but the last, and of the last."""
    before = (header.chunks - 1) // header.chunks_per_shard * header.chunks_per_shard
    for chunks in (header.chunks_per_shard, header.chunks - before):
        yield Shape(chunks, header.archive_size(chunks))


def _missing(path: Folder) -> str:
    assert isinstance(path, Path)
    out = shlex.quote(path_text(path.parent.parent))
    return (
        f"no manifest at {path}: make the shards with `python data_prep/shard.py --out {out}`, "
        "or wait until that command ends (it writes the manifests last)"
    )


def _remedy(path: Folder) -> str:
    # Delete it, because shard.py takes the folder for complete.
    return f"restore it, or delete {path.parent.parent} and make it again"


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return (f"{key}: {message}" if key else message)[:300]
