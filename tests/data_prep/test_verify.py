"""verify.py: a sound folder passes, and every damage is found and named."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import verify
from data_prep.checks import block_check, index_check, verification
from data_prep.checks.page_header import has_checksum
from data_prep.checks.verification import Verification
from i3dist.data.manifest import TAR_BLOCK, TOKEN_BYTES, Manifest, member_stride
from i3dist.errors import UserError
from tests.conftest import ROOT
from tests.data_prep import fuzzing
from tests.data_prep.fuzzing import found

CHANGES = 500


@pytest.fixture(scope="module")
def sound(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzzing.copied(built, tmp_path_factory.mktemp("sound") / "out")


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


def change_manifest(folder: Path, **values: object) -> None:
    raw = json.loads((folder / "manifest.json").read_bytes()) | values
    (folder / "manifest.json").write_text(json.dumps(raw))


def shard_of_several(split: Path) -> int:
    """A shard in which two documents or more begin and end, and one goes on."""
    rows = pq.read_table(split / "index.parquet").to_pylist()
    shards = [row["shard"] for row in rows if row["piece"] == 0]
    return next(n for n in shards if shards.count(n) > 3)


def test_a_sound_folder_gives_one_line_with_its_totals(
    sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify.main([str(sound)])
    (line,) = capsys.readouterr().out.splitlines()
    manifest = Manifest.load(sound / "train")
    assert line.startswith(f"{sound}: sound; train {manifest.documents:,} documents, ")
    assert f" {manifest.tokens:,} tokens, {manifest.chunks:,} chunks, " in line


def test_what_the_tool_makes_is_sound(built: Path) -> None:
    assert found(built) == []


def test_several_processes_find_the_same_in_the_same_order(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (0, 2, 3):
        path = out / "train" / f"shard-{number:06d}.tar"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    monkeypatch.setattr(verification, "TASK_BYTES", 1)
    alone = found(out)
    monkeypatch.setattr(verification, "WORKER_BYTES", 1)
    check = Verification(out, 2)
    assert check.workers == 2
    assert [str(damage) for damage in check.damages()] == alone
    assert sum("SHA-256" in line for line in alone) == 3


def test_each_of_many_random_changes_is_found(sound: Path, out: Path) -> None:
    missed = [
        (seed, how)
        for seed in range(CHANGES)
        if (how := fuzzing.goes_unnoticed(sound, Random(seed), out)) is not None
    ]
    assert missed == []
    assert found(out) == []


def test_changes_of_the_indexs_footer_are_found(sound: Path, out: Path) -> None:
    """One of them shortens a column, and pyarrow then reads fewer rows without an error."""
    path = out / "valid" / "index.parquet"
    former = path.read_bytes()
    footer = int.from_bytes(former[-8:-4], "little") + 8
    content = fuzzing.content(path)
    for seed in range(150):
        random, data = Random(seed), bytearray(former)
        data[len(data) - random.randrange(1, footer + 1)] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        assert fuzzing.content(path) == content or found(out), seed


@pytest.mark.parametrize(
    ("stated", "wrong"),
    [  # as Thrift writes fields and lists
        pytest.param(rb"\x15\x0c\x19", b"\x15\x08\x19", id="type"),
        # Two counts go from the list of definition levels into that of repetition levels.
        pytest.param(
            rb"\x29\x06\x19\x26\x00([\x80-\xff]*[\x00-\x7f])",
            b"\x29\x26\x00\\1\x19\x06",
            id="levels",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_footer_at_which_pyarrow_ends_the_process_is_one_line(
    out: Path, split: str, stated: bytes, wrong: bytes
) -> None:
    path = out / split / "index.parquet"
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    changed, count = re.subn(stated, wrong, data[footer:], count=1)
    assert count == 1
    path.write_bytes(data[:footer] + changed)
    words = [sys.executable, "-m", "data_prep.verify", out]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert re.fullmatch(rf"{split}/index.parquet.*: cannot be read .*\n", ended.stdout)


@pytest.mark.parametrize("end", ["min", "max"])
def test_bounds_that_hide_rows_from_readers_are_found(out: Path, end: str) -> None:
    path = out / "train" / "index.parquet"
    stated = getattr(pq.read_metadata(path).row_group(0).column(2).statistics, end).encode()
    before, _, after = path.read_bytes().rpartition(stated)  # where the footer has it
    wrong = {"min": b"~", "max": b"!"}[end] + stated[1:]
    path.write_bytes(before + wrong + after)
    assert any("states a least and a largest" in line for line in found(out))


@pytest.mark.parametrize("column", [0, 7])  # document and length, which have eight bytes
def test_bounds_of_numbers_are_compared_too(out: Path, column: int) -> None:
    path = out / "train" / "index.parquet"
    meta = pq.read_metadata(path).row_group(0).column(column)
    most = meta.statistics.max
    stated, wrong = (number.to_bytes(8, "little") for number in (most, most - 1))
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:footer] + data[footer:].replace(stated, wrong))
    says = f"states a least and a largest {meta.path_in_schema} "
    assert any(says in line for line in found(out))


@pytest.mark.parametrize(
    ("piece", "change", "says"),
    [
        (0, {"document": -1}, "document {0}, piece 0 does not follow document {0}, piece "),
        (1, {"piece": 1}, "document {1}, piece 2 does not follow document {1}, piece 0"),
        (2, {"piece": -1}, "document {1}, piece 1 does not follow document {1}, piece 1"),
    ],
)
def test_documents_and_pieces_count_up(
    out: Path, piece: int, change: dict[str, int], says: str
) -> None:
    path = out / "train" / "index.parquet"
    rows = pq.read_table(path).to_pylist()
    at = next(n for n, row in enumerate(rows) if n and row["piece"] == piece)
    rows[at] |= {name: rows[at][name] + more for name, more in change.items()}
    fuzzing.write_rows(path, rows)
    expected = f"row {at}: {says.format(rows[at - 1]['document'], rows[at]['document'])}"
    assert any(expected in line for line in found(out))


def test_a_row_behind_a_short_shard_is_found(out: Path) -> None:
    path = out / "train" / "index.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[-1]["chunk"] = Manifest.load(out / "train").chunks_per_shard - 1
    fuzzing.write_rows(path, rows)
    says = f"train/index.parquet, row {len(rows) - 1}: says a piece begins at"
    assert any(line.startswith(says) for line in found(out))


def test_an_index_begins_with_the_first_piece_of_a_document(out: Path) -> None:
    path = out / "train" / "index.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0] |= {"document": -1, "piece": 1}
    fuzzing.write_rows(path, rows)
    expected = "row 0: document -1, piece 1 does not follow document -1, piece 0"
    assert any(expected in line for line in found(out))


@pytest.mark.parametrize("name", ["id", "url"])
@pytest.mark.parametrize("rows_at_a_time", [1 << 16, 1])
def test_pieces_of_a_document_that_differ_in_a_text_are_found(
    out: Path, name: str, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_check, "ROWS_AT_A_TIME", rows_at_a_time)
    path = out / "train" / "index.parquet"
    rows = pq.read_table(path).to_pylist()
    at = next(n for n, row in enumerate(rows) if row["piece"])
    rows[at][name] += "x"
    fuzzing.write_rows(path, rows)
    says = f"train/index.parquet, row {at}: has another id or URL than the piece before it"
    assert any(line.startswith(says) for line in found(out))


@pytest.mark.parametrize("place", ["name", "end of header", "first of padding", "last of padding"])
@pytest.mark.parametrize("block", [block_check.BLOCK, 1])
def test_header_and_padding_are_compared_though_the_hash_fits(
    out: Path, place: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_check, "BLOCK", block)
    split, chunk = out / "train", 3
    manifest = Manifest.load(split)
    stride, payload = member_stride(manifest.chunk_length), TOKEN_BYTES * manifest.chunk_length
    places = {
        "name": 8,
        "end of header": TAR_BLOCK - 1,
        "first of padding": TAR_BLOCK + payload,
        "last of padding": stride - 1,
    }
    data = bytearray((split / manifest.shards[1].name).read_bytes())
    data[chunk * stride + places[place]] ^= 1
    fuzzing.replace(split, 1, bytes(data))
    says = f"train/shard-000001.tar, chunk {chunk}: the header or padding is not that of the format"
    (line,) = found(out)
    assert line.startswith(says)


def test_bytes_behind_the_members_are_zeros(out: Path) -> None:
    path = out / "train" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    says = "shard-000001.tar, end of the archive: it has other bytes than zeros"
    assert any(says in line for line in found(out))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random=st.randoms(use_true_random=False))
def test_any_change_is_found(sound: Path, out: Path, random: Random) -> None:
    assert fuzzing.goes_unnoticed(sound, random, out) is None


# Of a tokenizer that shard.py trains: the last special id stands before the first ordinary one.
BOS, EOS, PAD, CHAT, LAST_SPECIAL = 2, 3, 1, 4, 12
Tokens = np.ndarray


def first(ids: Tokens, token: int, after: int = 0) -> int:
    return after + int(np.flatnonzero(ids[after:] == token)[0])


def without_eos(ids: Tokens) -> None:
    ids[first(ids, EOS, first(ids, BOS))] = 99


def without_bos(ids: Tokens) -> None:
    ids[first(ids, BOS, 1)] = 99


def empty_document(ids: Tokens) -> None:
    ids[first(ids, BOS, 1) + 1] = EOS


def text_outside(ids: Tokens) -> None:
    end = first(ids, EOS)
    ids[end - 1], ids[end] = EOS, 99


def padding_inside(ids: Tokens) -> None:
    ids[first(ids, BOS, 1) + 1] = PAD


def chat_token(ids: Tokens) -> None:
    ids[first(ids, BOS, 1) + 1] = CHAT


def last_special(ids: Tokens) -> None:
    ids[first(ids, BOS, 1) + 1] = LAST_SPECIAL


def beyond(ids: Tokens) -> None:
    ids[first(ids, BOS, 1) + 1] = 400


WRONG_TOKENS = {
    without_eos: "<BOS> follows <BOS>: the document before has no <EOS>",
    without_bos: "<EOS> follows <EOS>: this document has no <BOS>",
    empty_document: "a document is empty: <EOS> follows <BOS>",
    text_outside: "tokens stand between <EOS> and this <BOS>",
    padding_inside: "<PAD> stands before the end of the split",
    chat_token: "a special id stands in the text",
    last_special: "a special id stands in the text",
    beyond: "its id is not below vocab_size 400",
}


@pytest.mark.parametrize("change", WRONG_TOKENS, ids=lambda change: change.__name__)
def test_wrong_tokens_are_found_though_archive_and_manifest_fit(out: Path, change: object) -> None:
    number = shard_of_several(out / "train")
    fuzzing.rewrite(out / "train", number, change)
    lines = found(out)
    start, expected = f"train/shard-{number:06d}.tar, chunk ", WRONG_TOKENS[change]  # type: ignore[index]
    assert any(line.startswith(start) and expected in line for line in lines), lines


def test_tokens_after_the_last_document_are_found(out: Path) -> None:
    """In a shard that goes on with a document, whose <BOS> becomes an ordinary token."""
    split = out / "train"
    rows = pq.read_table(split / "index.parquet").to_pylist()
    number = next(a["shard"] for a, b in itertools.pairwise(rows) if b["piece"] == 1)

    def last_without_bos(ids: Tokens) -> None:
        ids[np.flatnonzero(ids == BOS)[-1]] = 99

    fuzzing.rewrite(split, number, last_without_bos)
    assert any("tokens follow this <EOS> without a <BOS>" in line for line in found(out))


def test_documents_join_across_shards(out: Path) -> None:
    """The first token of a shard that continues a document becomes <BOS>, and the reverse."""
    rows = pq.read_table(out / "train" / "index.parquet").to_pylist()
    continued = next(row["shard"] for row in rows if row["piece"])

    def begin(ids: Tokens) -> None:
        ids[0] = BOS

    fuzzing.rewrite(out / "train", continued, begin)
    lines = found(out)
    name = f"train/shard-{continued:06d}.tar, chunk 0, token 0"
    assert any(line.startswith(name) and "has no <EOS>" in line for line in lines), lines


def test_a_last_document_without_eos_and_a_wrong_total_are_found(out: Path) -> None:
    split = out / "train"
    manifest = Manifest.load(split)

    def unended(ids: Tokens) -> None:
        ids[np.flatnonzero(ids == EOS)[-1]] = 99

    fuzzing.rewrite(split, len(manifest.shards) - 1, unended)
    assert any("the last document has no <EOS>" in line for line in found(out))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"documents": 3}, "key documents: says 3, the shards hold"),
        ({"seed": 7}, "key seed: says 7, shard.json 0"),
        ({"source": "other"}, "key source: says 'other', shard.json"),
        ({"split": "test"}, "key split: says 'test', its folder 'train'"),
        ({"vocab_size": 401}, "key vocab_size: says 401, tokenizer.json 400"),
        ({"eos_id": 5}, "key eos_id: says 5, tokenizer.json 3"),
        ({"tokenizer_sha256": "0" * 64}, "key tokenizer_sha256: says"),
        ({"version": 9}, "is not a valid manifest: version"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_manifest_is_found(out: Path, values: dict[str, object], expected: str) -> None:
    change_manifest(out / "train", **values)
    assert any(line.startswith("train/manifest.json") and expected in line for line in found(out))


@pytest.mark.parametrize("wrong", ["traines", "sha257 " + "0" * 64, "sha256 " + "0" * 63])
def test_a_wrong_tokenizer_in_the_settings_is_found(out: Path, wrong: str) -> None:
    path = out / "shard.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"tokenizer": wrong}))
    assert found(out) == ["shard.json: is damaged; restore it, or make the data again"]


def test_wrong_tokens_total_is_found_in_the_last_chunk(out: Path) -> None:
    manifest = Manifest.load(out / "train")
    more = -1 if manifest.tokens % manifest.chunk_length != 1 else 1
    change_manifest(out / "train", tokens=manifest.tokens + more)
    (line,) = [line for line in found(out) if "<PAD> should fill" in line]
    assert line.startswith(f"train/{manifest.shards[-1].name}, chunk ")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train/shard-000001.tar", None, "is missing"),
        ("train/index.parquet", None, "is missing"),
        ("valid", None, "is missing"),
        ("tokenizer.json", None, "is missing"),
        ("shard.json", None, "is missing"),
        ("shard.json", b"{", "is damaged"),
        ("source.json", b"{", "is damaged"),
        ("tokenizer.json", b"{}", "is not a tokenizer.json"),
        ("train/notes.txt", b"", "does not belong to the output; remove it"),
        (".work", b"", "does not belong to the output; run shard.py again, or remove it"),
    ],
)
def test_missing_and_foreign_files_are_found(
    out: Path, name: str, content: bytes | None, expected: str
) -> None:
    path = out / name
    if content is not None:
        path.write_bytes(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    lines = found(out)
    assert any(line.startswith(f"{name}: ") and expected in line for line in lines), lines


def test_every_damage_is_listed_up_to_a_limit(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = sorted((out / "train").glob("*.tar"))
    for path in shards:
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"{len(shards)} damages in {len(shards)} files"):
        verify.main([str(out), "--most", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1] == f"... and {len(shards) - 3} more"
    size = len(shards[0].read_bytes())
    assert f"the file has {size:,} bytes, not {size + 5:,}; restore it" in lines[0]


def test_a_swapped_shard_is_named(out: Path) -> None:
    split = out / "train"
    shutil.copy(split / "shard-000002.tar", split / "shard-000001.tar")
    expected = "train/shard-000001.tar: its SHA-256 is not the manifest's: it is a copy of "
    lines = found(out)
    assert lines[0].startswith(f"{expected}shard-000002.tar")
    last = Manifest.load(split).shards[1].chunks - 1
    headers = [line for line in lines if "header" in line]
    assert [line.partition(":")[0] for line in headers] == [
        f"train/shard-000001.tar, chunks 0 to {last}"
    ], "one line for all of them"


def test_an_index_without_checksums_is_noted(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = out / "train" / "index.parquet"
    pq.write_table(pq.read_table(path), path, compression="zstd")
    verify.main([str(out)])
    note = capsys.readouterr().out.splitlines()[1]
    assert note.startswith("note: train/index.parquet without page checksums")


@pytest.mark.parametrize("name", index_check.INDEX_SCHEMA.names)
def test_a_damaged_header_of_a_page_is_found(sound: Path, out: Path, name: str) -> None:
    """Whatever pyarrow makes of it; where a column has no pages it gives no rows, and no error."""
    path, before = out / "train" / "index.parquet", sound / "train" / "index.parquet"
    columns = pq.ParquetFile(before).metadata.row_group(0)
    begin = columns.column(index_check.INDEX_SCHEMA.names.index(name)).data_page_offset
    whole, missed = before.read_bytes(), []
    for place in range(begin, begin + 32):
        for bit in (1, 2, 4, 16, 64):
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(changed)
            if not found(out) and fuzzing.content(path) != fuzzing.content(before):
                missed.append((place - begin, bit))
    assert not missed


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("dictionary", [True, False])
def test_checksums_of_pages_are_seen(out: Path, checksums: bool, dictionary: bool) -> None:
    path = out / "train" / "index.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, write_page_checksum=checksums, use_dictionary=dictionary)
    columns = pq.ParquetFile(path).metadata.row_group(0)
    with path.open("rb") as file:
        seen = {has_checksum(file, columns.column(n)) for n in range(columns.num_columns)}
    assert seen == {checksums}


def test_no_output_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder: name an output"):
        verify.main([str(tmp_path / "none")])
    with pytest.raises(UserError, match="holds neither train/ nor valid/"):
        verify.main([str(tmp_path)])
