"""Random changes to an output folder, and whether a change leaves its content equal."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from data_prep.checks.index_check import UNREADABLE, open_index
from data_prep.checks.verification import Verification
from data_prep.pack import INDEX_SCHEMA
from i3dist.data.archive import chunks_of, shard_bytes
from i3dist.data.manifest import Manifest
from i3dist.data.token_types import Stored


def copied(folder: Path, target: Path) -> Path:
    """A copy of an output."""
    return Path(shutil.copytree(folder, target))


def found(folder: Path, workers: int = 1) -> list[str]:
    """The lines of a check."""
    return [str(damage) for damage in Verification(folder, workers).damages()]


def rewrite(split: Path, number: int, change: Callable[[Stored], object]) -> None:
    """Change the stored tokens of a shard, and make archive and manifest fit them."""
    manifest = Manifest.load(split)
    shard, dtype = manifest.shards[number], manifest.token_type.dtype
    data = (split / shard.name).read_bytes()
    tokens = chunks_of(data, shard.chunks, manifest.chunk_length, dtype).copy()
    change(tokens.reshape(-1))
    replace(split, number, shard_bytes(number, tokens))


def replace(split: Path, number: int, data: bytes) -> None:
    """Write other bytes in the place of a shard, and make the manifest fit them."""
    raw = json.loads((split / "manifest.json").read_bytes())
    (split / raw["shards"][number]["name"]).write_bytes(data)
    raw["shards"][number]["sha256"] = hashlib.sha256(data).hexdigest()
    (split / "manifest.json").write_text(json.dumps(raw))


def flip(data: bytearray, random: Random) -> None:
    """Flip one bit."""
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def swap_bytes(data: bytearray, random: Random) -> None:
    """Swap two bytes."""
    a, b = random.sample(range(len(data)), 2)
    data[a], data[b] = data[b], data[a]


def swap_blocks(data: bytearray, random: Random) -> None:
    """Swap two blocks of 512 bytes, such as a header or half a chunk."""
    if len(data) < 1024:
        return swap_bytes(data, random)
    a, b = random.sample(range(len(data) // 512), 2)
    one, other = (slice(512 * n, 512 * n + 512) for n in (a, b))
    data[one], data[other] = data[other], data[one]


def cut(data: bytearray, random: Random) -> None:
    """Cut the end off."""
    del data[random.randrange(len(data)) :]


def grow(data: bytearray, random: Random) -> None:
    """Append a few bytes."""
    data += random.randbytes(random.randrange(1, 600))


BYTE_CHANGES: tuple[Callable[[bytearray, Random], None], ...] = (
    flip,
    flip,
    flip,
    swap_bytes,
    swap_blocks,
    cut,
    grow,
)


def change_file(path: Path, random: Random) -> str:
    """Change the bytes of a file; returns how."""
    data = bytearray(path.read_bytes())
    change = random.choice(BYTE_CHANGES)
    change(data, random)
    path.write_bytes(data)
    return change.__name__


def swap_files(one: Path, other: Path) -> None:
    """Swap the contents of two files."""
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def swap_rows(path: Path, random: Random) -> None:
    """Swap two rows of an index, in a file that is sound otherwise."""
    table = pq.read_table(path)
    order = list(range(len(table)))
    a, b = random.sample(order, 2)
    order[a], order[b] = order[b], order[a]
    pq.write_table(table.take(order), path, compression="zstd", write_page_checksum=True)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write an index of other rows in the place of one, in a file that is sound otherwise."""
    former = pq.read_table(path)
    changed = type(former).from_pylist(rows, schema=former.schema)
    pq.write_table(changed, path, compression="zstd", write_page_checksum=True)


def change_value(path: Path, random: Random) -> None:
    """Change a number of an index, or drop or repeat a row, in a file that is sound otherwise."""
    rows = pq.read_table(path).to_pylist()
    row = random.randrange(len(rows))
    kind = random.choice(("drop", "repeat", "number", "number", "number"))
    if kind == "drop":
        del rows[row]
    elif kind == "repeat":
        rows.insert(row, rows[row])
    else:
        name = random.choice(("document", "piece", "shard", "chunk", "offset", "length"))
        rows[row][name] += random.choice((-1, 1, 64, -64, 1000))
    write_rows(path, rows)


def content(path: Path) -> Any:
    """What a file says, however it is written; None if it cannot be read."""
    if path.suffix == ".json" and path.name != "tokenizer.json":
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            return None
    if path.suffix == ".parquet":
        try:
            file = open_index(path.parent)
            if not file.schema_arrow.equals(INDEX_SCHEMA):
                return None  # pyarrow (25.0) ends the process where columns do not fit their types
            codecs = {file.metadata.row_group(0).column(n).compression for n in range(8)}
            return file.read(), codecs
        except (*UNREADABLE, IndexError, KeyError):
            return None
    return path.read_bytes()


def random_change(folder: Path, random: Random) -> tuple[str, list[Path]]:
    """Damage a folder; returns how, and the files that were changed."""
    split = folder / random.choice(("train", "train", "valid"))
    shards = sorted(split.glob("*.tar"))
    index, manifest = split / "index.parquet", split / "manifest.json"
    kind = random.choice(("shard", "index", "index", "manifest", "rows", "value", "swap"))
    if kind == "rows":
        swap_rows(index, random)
    elif kind == "value":
        change_value(index, random)
    elif kind == "swap":
        pair = random.sample(shards, 2)
        swap_files(*pair)
        return kind, pair
    elif kind in ("shard", "index", "manifest"):
        path = {"shard": random.choice(shards), "index": index, "manifest": manifest}[kind]
        return f"{change_file(path, random)} in {path.name}", [path]
    return kind, [index]


def goes_unnoticed(sound: Path, random: Random, target: Path) -> str | None:
    """How a random change was made that a check did not find, or None."""
    how, changed = random_change(target, random)
    pairs = [(path, sound / path.relative_to(target)) for path in changed]
    missed = not found(target) and any(content(path) != content(former) for path, former in pairs)
    for path, former in pairs:
        shutil.copy(former, path)
    return how if missed else None
