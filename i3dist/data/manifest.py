"""The manifest of a split: the contract between `data_prep/shard.py` and the trainer.

A split is a folder with `manifest.json`, `index.parquet` and the shards; docs/data-format.md
describes them. A shard is a POSIX ustar archive with one member per chunk. All members have the
same size, so the tokens of chunk k begin at byte `k * member_stride(chunk_length) + TAR_BLOCK`.
"""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from i3dist.cli.paths import path_text
from i3dist.errors import UserError
from i3dist.files import write_whole

TAR_BLOCK = 512
"""Bytes of a tar block. A member's header is one block, and its payload is padded to blocks."""

TAR_RECORD = 10_240
"""Bytes of a tar record. An archive's length is a multiple of it."""

MANIFEST_NAME = "manifest.json"
TOKEN_BYTES = 2
MAX_SHARDS = 4_000_000
MAX_MANIFEST_BYTES = 1 << 30

Count = Annotated[int, Field(ge=1, le=1 << 53)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 16)]
Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


def member_name(shard: int, chunk: int) -> str:
    """Name of the member that holds chunk number `chunk` of shard number `shard`."""
    return f"{shard:06d}-{chunk:06d}.u16"


def shard_name(shard: int) -> str:
    """File name of shard `shard`."""
    return f"shard-{shard:06d}.tar"


def member_stride(chunk_length: int) -> int:
    """Bytes from one member to the next."""
    payload = chunk_length * TOKEN_BYTES
    return TAR_BLOCK + -(-payload // TAR_BLOCK) * TAR_BLOCK


def archive_size(chunks: int, chunk_length: int) -> int:
    """Bytes of a shard of `chunks` chunks: members, two zero blocks, filled up to a record."""
    used = chunks * member_stride(chunk_length) + 2 * TAR_BLOCK
    return -(-used // TAR_RECORD) * TAR_RECORD


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Frozen):
    """One shard file: its name, its number of chunks, its size in bytes and its SHA-256."""

    name: Annotated[str, Field(max_length=64)]
    chunks: Annotated[int, Field(ge=1, le=1_000_000)]
    size: Count
    sha256: Sha256


class Manifest(_Frozen):
    """What one split holds. `tokens` counts <BOS> and <EOS>, and not <PAD>."""

    format: Literal["i3dist-chunks"] = "i3dist-chunks"
    version: Literal[1] = 1
    split: Annotated[str, Field(pattern=r"\A[a-z][a-z0-9_-]{0,31}\z")]
    chunk_length: Annotated[int, Field(ge=2, le=1 << 16)]
    chunks_per_shard: Annotated[int, Field(ge=1, le=1_000_000)]
    dtype: Literal["uint16-le"] = "uint16-le"
    vocab_size: Annotated[int, Field(ge=1, le=1 << 16)]
    tokenizer_sha256: Sha256
    bos_id: TokenId
    eos_id: TokenId
    pad_id: TokenId
    source: Annotated[str, Field(max_length=4096)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    documents: Count
    tokens: Count
    chunks: Count
    shards: Annotated[tuple[Shard, ...], Field(min_length=1, max_length=MAX_SHARDS)]

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> Self:
        ids = (self.bos_id, self.eos_id, self.pad_id)
        if max(ids) >= self.vocab_size:
            raise ValueError(f"special ids {ids} do not all lie below vocab_size {self.vocab_size}")
        if len(set(ids)) != len(ids):
            raise ValueError(f"special ids {ids} are not all different")
        return self

    @model_validator(mode="after")
    def _shards_are_consecutive(self) -> Self:
        last = len(self.shards) - 1
        for number, shard in enumerate(self.shards):
            if shard.name != shard_name(number):
                raise ValueError(
                    f"shard {number} is named {shard.name!r}, not {shard_name(number)!r}"
                )
            if shard.chunks > self.chunks_per_shard:
                raise ValueError(f"{shard.name} has more than {self.chunks_per_shard} chunks")
            if number < last and shard.chunks != self.chunks_per_shard:
                raise ValueError(f"{shard.name} is not the last and has {shard.chunks} chunks only")
            expected = archive_size(shard.chunks, self.chunk_length)
            if shard.size != expected:
                raise ValueError(f"{shard.name} has size {shard.size}, its chunks make {expected}")
        return self

    @model_validator(mode="after")
    def _totals_agree(self) -> Self:
        counted = sum(shard.chunks for shard in self.shards)
        if counted != self.chunks:
            raise ValueError(f"the shards hold {counted} chunks, chunks says {self.chunks}")
        if -(-self.tokens // self.chunk_length) != self.chunks:
            raise ValueError(f"{self.tokens} tokens do not fill {self.chunks} chunks")
        if self.tokens < 2 * self.documents:
            raise ValueError(f"{self.documents} documents need more than {self.tokens} tokens")
        return self

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read and check `folder/manifest.json`.

        Raises:
            UserError: it is missing, unreadable or wrong; the message says in what.
        """
        path = folder / MANIFEST_NAME
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise UserError(f"{path} is larger than any manifest; {_remedy(path)}")
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_missing(path)) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except ValidationError as error:
            problem = f"{_first_problem(error)}; {_remedy(path)}"
            raise UserError(f"{path} is not a valid manifest: {problem}") from None

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`; a reader sees either the whole file or none."""
        write_whole(folder / MANIFEST_NAME, self.model_dump_json(indent=1).encode() + b"\n")

    def tokens_in(self, shard: int) -> int:
        """Tokens of one shard, without <PAD>."""
        before = shard * self.chunks_per_shard * self.chunk_length
        return min(self.shards[shard].chunks * self.chunk_length, self.tokens - before)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal if and only if the contents are equal."""
        canonical = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _missing(path: Path) -> str:
    out = shlex.quote(path_text(path.parent.parent))
    return (
        f"no manifest at {path}: make the shards with `python data_prep/shard.py --out {out}`, "
        "or wait until that command ends (it writes the manifests last)"
    )


def _remedy(path: Path) -> str:
    # Delete it, because shard.py takes the folder for complete.
    return f"restore it, or delete {path.parent.parent} and make it again"


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return (f"{key}: {message}" if key else message)[:300]
