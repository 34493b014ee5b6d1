"""Text files: whatever packs or encodes them, they read as the plain UTF-8 file does."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.reading.files import file_source
from data_prep.reading.streams import decompressed
from data_prep.sources import Record, Skip, usable_text
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError
from tests.data_prep.corpus import build, tree_digest

SKIPPABLE = b"\x5e\x2a\x4d\x18\x03\x00\x00\x00any"


def _zstd(data: bytes) -> bytes:
    """A frame that tells its size or not, or that needs a window of 1 GiB, or between others."""
    kind = len(data) % 4
    if kind == 0:
        return zstandard.compress(data)
    wide = zstandard.ZstdCompressionParameters(window_log=30 if kind == 1 else 20)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    frame = stream.compress(data) + stream.flush()
    return SKIPPABLE + frame + SKIPPABLE if kind == 2 else frame


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": _zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
PADDING = {".gz": b"\0" * 512, ".xz": b"\0" * 20_000}
# Of JSON strings: these end no line, though `str.splitlines` says so.
TEXTS = ["one two", "é世界😀", "a\u2028b\x85c\x0bd", "\ufeffx", "x" * 300_000, "\ufffd"]
LINES = [
    json.dumps({"text": text}, ensure_ascii=number % 2 == 0) for number, text in enumerate(TEXTS)
]


def texts(path: Path) -> list[object]:
    records = [record for part in file_source(path).parts() for record in part.records()]
    return [text_of(record) for record in records]


def text_of(record: Record) -> str | Skip:
    """The text of a record, or the reason to skip it."""
    text = usable_text(record.text)
    return text if isinstance(text, Skip) else text.decode()


@pytest.mark.parametrize("ending", PACKERS)
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_all_members_of_a_packed_file_are_read(ending: str, data: st.DataObject) -> None:
    plain = "\n".join(LINES).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(plain)), max_size=4)))
    pieces = [plain[a:b] for a, b in zip([0, *cuts], [*cuts, len(plain)], strict=True)]
    padding = PADDING.get(ending, b"")
    packed = b"".join(PACKERS[ending](piece) + padding for piece in pieces)
    with TemporaryDirectory() as folder:
        path = Path(folder, f"a.jsonl{ending}")
        path.write_bytes(packed)
        assert texts(path) == TEXTS
        path = path.rename(Path(folder, f"A.TXT{ending.upper()}"))
        assert texts(path) == [plain.decode()]


@pytest.mark.parametrize("ending", [ending for ending in PACKERS if ending])
def test_a_packed_file_that_was_cut_is_named(tmp_path: Path, ending: str) -> None:
    rng = random.Random(0)
    whole = PACKERS[ending](json.dumps({"text": rng.randbytes(20_000).hex()}).encode())
    for name in (f"a.jsonl{ending}", f"a.txt{ending}"):
        cuts = [whole + whole[:stop] for stop in (1, 5, len(whole) // 2, len(whole) - 1)]
        for data in (b"", *cuts):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(UserError, match=rf"cannot read .*{name}"):
                texts(tmp_path / name)


CHECKED = {ending: pack for ending, pack in PACKERS.items() if ending} | {
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress
}


@pytest.mark.parametrize("ending", CHECKED)
def test_a_flipped_bit_in_any_member_is_told_or_changes_nothing(
    tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    whole = b"".join(CHECKED[ending](f'{{"text": "{name}"}}\n'.encode()) for name in "abc")
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            assert texts(path) == ["a", "b", "c"], at
        except UserError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("ending", CHECKED)
@pytest.mark.parametrize("garbage", [b"text", bytes(522)], ids=["text", "zeros"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_what_is_no_member_is_told(tmp_path: Path, ending: str, garbage: bytes, after: int) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    member = CHECKED[ending](b'{"text": "a"}\n')
    path.write_bytes(member * after + garbage + member * (2 - after))
    if ending == ".gz" and after and not any(garbage):  # gzip allows any number of zeros
        assert texts(path) == ["a", "a"]
    else:
        with pytest.raises(UserError, match=rf"cannot read .*{path.name}"):
            texts(path)


class Slow(io.BytesIO):
    """A file that gives a few bytes at a time."""

    def __init__(self, data: bytes, most: int) -> None:
        super().__init__(data)
        self.most = most

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self.most)


@pytest.mark.parametrize("ending", [".zst", ".bz2", ".xz"])
@settings(deadline=None, max_examples=15)
@given(most=st.integers(1, 9), sizes=st.lists(st.integers(1, 1 << 18), min_size=1))
def test_reads_of_any_size_give_the_same_bytes(ending: str, most: int, sizes: list[int]) -> None:
    pieces = [b"", bytes(300_000), b"a"]
    packed = PADDING.get(ending, b"").join(map(PACKERS[ending], pieces))
    stream = decompressed(Slow(packed, most), f"a{ending}")
    found = [data for size in [*sizes, -1] if (data := stream.read(size))]
    assert b"".join(found) == b"".join(pieces)
    assert [len(data) for data in found[:-1]] == sizes[: len(found) - 1]


@pytest.mark.parametrize("ending", [".bz2", ".xz"])
def test_a_small_file_of_much_text_is_read_in_little_memory(ending: str) -> None:
    packed = PACKERS[ending](bytes(40_000_000))
    assert len(packed) < 8_000
    tracemalloc.start()
    stream = decompressed(io.BytesIO(packed), f"a{ending}")
    assert sum(len(part) for part in iter(lambda: stream.read(1 << 16), b"")) == 40_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12_000_000  # of xz, 8 MiB are its dictionary


ENCODED: dict[str, Callable[[str], bytes]] = {
    "UTF-8": str.encode,
    "UTF-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16 LE": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "UTF-16 BE": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "UTF-32 LE": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
    "UTF-32 BE": lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"),
}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_is_obeyed_and_is_no_text(
    tmp_path: Path, encoding: str, ending: str, newline: str
) -> None:
    lines = newline.join(["", *LINES[:3], " ", "", *LINES[3:], ""])
    kinds = {"a.jsonl": TEXTS, "a.ndjson": TEXTS, "a.txt": ["ਊ text 1" + newline]}
    for name, expected in kinds.items():
        text = lines if expected is TEXTS else str(expected[0])
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(PACKERS[ending](ENCODED[encoding](text)))
        assert texts(path) == expected


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_mark_alone_is_no_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(ENCODED[encoding]("\n \n"))
    (tmp_path / "b.txt").write_bytes(ENCODED[encoding](""))
    found = texts(tmp_path)
    assert len(found) == 1 and not isinstance(found[0], str)


def test_joined_files_keep_their_marks_out_of_the_text(tmp_path: Path) -> None:
    file = codecs.BOM_UTF8 + b'{"text": "a"}\n'
    (tmp_path / "a.jsonl").write_bytes(file * 3 + codecs.BOM_UTF8)
    assert texts(tmp_path) == ["a"] * 3


def test_half_a_character_of_utf16_is_told(tmp_path: Path) -> None:
    data = "\n".join(['{"text": "a"}', '{"text": "\ud800"}', '{"text": "b"}'])
    encoded = codecs.BOM_UTF16_LE + data.encode("utf-16-le", "surrogatepass")
    (tmp_path / "a.jsonl").write_bytes(encoded)
    assert [isinstance(text, str) for text in texts(tmp_path / "a.jsonl")] == [True, False, True]
    (tmp_path / "a.jsonl").write_bytes(encoded[:-1])
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl"):
        texts(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(encoded[:-1])
    assert not isinstance(texts(tmp_path / "a.txt")[0], str)


def test_any_number_of_workers_makes_the_same_of_every_form(tmp_path: Path, built: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, (encode, ending) in enumerate(product(ENCODED.values(), PACKERS)):
        line = json.dumps({"text": f"{number} é " * 99}, ensure_ascii=False)
        (folder / f"{number}.jsonl{ending}").write_bytes(PACKERS[ending](encode(line)))
        (folder / f"{number}.txt{ending}").write_bytes(PACKERS[ending](encode(line)))
    for workers in (1, 3):
        options = ["--workers", workers, "--tokenizer", built / "tokenizer.json"]
        build(folder, tmp_path / f"out-{workers}", *options)
    assert tree_digest(tmp_path / "out-1") == tree_digest(tmp_path / "out-3")
    counts = [Manifest.load(tmp_path / "out-1" / name).documents for name in ("train", "valid")]
    assert sum(counts) == 2 * len(ENCODED) * len(PACKERS)
