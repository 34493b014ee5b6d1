"""A small corpus of every format, and readers of what the tool makes of it."""

import gzip
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from data_prep.shard import main
from i3dist.data.manifest import Manifest
from i3dist.data.tokenizer import Tokenizer

WORDS = [
    "the",
    "history",
    "of",
    "tokens",
    "é",
    "naïve",
    "<BOS>",
    "\n\n",
    "42",
    "don't",
    "世界",
    "  ",
]


def text_of(number: int) -> str:
    """A text of 1 to 300 words; every tenth is a duplicate of another."""
    rng = random.Random(number // 10 if number % 10 == 0 else number)
    return f"{rng.random()} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 300)))


def write_corpus(folder: Path) -> dict[str, str]:
    """Write documents in all formats below `folder`; returns the usable texts by id."""
    texts = {f"doc-{number}": text_of(number) for number in range(160)}
    rows = [{"id": k, "url": f"https://example.org/{k}", "text": v} for k, v in texts.items()]
    (folder / "deep" / "er").mkdir(parents=True)
    _write_parquet(rows[:60], folder / "a.parquet")
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "deep" / "b.jsonl").write_text("".join(lines[60:100]) + "\n")
    (folder / "deep" / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[100:130]).encode()))
    packed = zstandard.compress("".join(lines[130:]).encode())
    (folder / "deep" / "er" / "d.jsonl.zst").write_bytes(packed)
    (folder / "deep" / "e.txt").write_text(text_of(500))
    (folder / "ignored.md").write_text("not read")
    return texts | {"deep/e.txt": text_of(500)} | _write_odd_documents(folder)


SKIPPED = {"null": 2, "empty": 3, "not text": 1, "undecodable": 3}


def _write_odd_documents(folder: Path) -> dict[str, str]:
    """Documents that are skipped as `SKIPPED` counts, and two without an id."""
    lines = [b'{"text": null}', b'{"text": " \\n"}', b'{"text": 5}', b'{"text": "\\ud800"}']
    lines += [b'{"text": "\xff"}', b'{"text": "no id"}', b'{"text": ""}']
    (folder / "odd.jsonl").write_bytes(b"\n".join(lines))
    (folder / "odd.txt").write_bytes(b"\xff\xfe")
    (folder / "odd-empty.txt").write_bytes(b"")
    table = pa.table({"text": pa.array([None, "no id either"]), "other": [1, 2]})
    pq.write_table(table, folder / "odd.parquet")
    return {"odd.jsonl#5": "no id", "odd.parquet#1": "no id either"}


def _write_parquet(rows: list[dict[str, str]], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


def build(source: Path | str, out: Path, *options: object) -> None:
    """Run the tool in this process, with settings that suit a small corpus."""
    main(arguments(source, out, *options))


def arguments(source: Path | str, out: Path, *options: object) -> list[str]:
    """The command line that `build` runs; `options` come last, so they win."""
    small = ["--vocab-size", 400, "--chunks-per-shard", 4, "--chunk-length", 64, "--workers", 1]
    wanted = [*options] if "--valid" in options else ["--valid-fraction", 0.2, *options]
    if "--tokenizer" in wanted:
        del small[:2]
    return [str(part) for part in ("--source", source, "--out", out, *small, *wanted)]


def tree_digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def read_chunks(path: Path) -> NDArray[np.unsignedinteger]:
    """Chunks of a shard as stored, read by `tarfile`: shape [chunks, chunk_length]."""
    types = {".u16": "<u2", ".u32": "<u4"}
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        payloads = [(archive.extractfile(m).read(), m.name) for m in archive]  # type: ignore[union-attr]
    return np.stack([np.frombuffer(data, types[Path(name).suffix]) for data, name in payloads])


def read_documents(folder: Path, tokenizer: Tokenizer) -> list[tuple[str, str, str]]:
    """(id, url, text) of every document of a split, put together from index and shards alone."""
    manifest = Manifest.load(folder)
    streams = [read_chunks(folder / shard.name).reshape(-1) for shard in manifest.shards]
    documents: list[tuple[str, str, list[int]]] = []
    for row in pq.read_table(folder / "index.parquet").to_pylist():
        start = row["chunk"] * manifest.chunk_length + row["offset"]
        piece = streams[row["shard"]][start : start + row["length"]].tolist()
        assert len(piece) == row["length"]
        if row["piece"] == 0:
            assert row["document"] == len(documents)
            documents.append((row["id"], row["url"], []))
        documents[-1][2].extend(piece)
    for _, _, ids in documents:
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids[1:-1])
    return [(name, url, tokenizer.decode(ids)) for name, url, ids in documents]
