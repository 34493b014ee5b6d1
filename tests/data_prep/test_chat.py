"""Conversations, end to end: from jsonl to shards with a mask, and to batches."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import pack, report, shard, show, verify
from data_prep.checks import block_check
from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.lanes import LaneWindows, windows
from i3dist.data.manifest import Manifest
from i3dist.data.shards import read_shard
from i3dist.data.token_types import LEARNED, Stored
from i3dist.errors import UserError
from i3dist.ops.cross_entropy import IGNORE
from tests.data_prep import fuzzing
from tests.data_prep.chats import Turns, expected, write_chats
from tests.data_prep.corpus import build, read_chunks, tree_digest
from tests.data_prep.fuzzing import found, goes_unnoticed

CHANGES = 200
SPLITS = ("train", "valid")
Chats = tuple[Path, Path, dict[str, Turns]]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Chats:
    """A source, what is made of it, and its conversations."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "in").mkdir()
    made = write_chats(folder / "in")
    build(folder / "in", folder / "out", "--format", "chat")
    return folder / "in", folder / "out", made


@pytest.mark.parametrize("split", SPLITS)
def test_shards_hold_each_conversation_and_its_mask(chats: Chats, split: str) -> None:
    _, out, made = chats
    folder, manifest = out / split, Manifest.load(out / split)
    assert (manifest.version, manifest.dtype) == (2, "uint32-le-masked")
    shards = [read_shard(folder, manifest, n) for n in range(len(manifest.shards))]
    tokens = np.concatenate([held.tokens.ravel() for held in shards])
    learned = np.concatenate([held.learned.ravel() for held in shards])  # type: ignore[union-attr]
    assert np.array_equal(np.stack([tokens, learned]), expected(out, split, made))
    pieces = pq.read_table(folder / "index.parquet")["piece"].to_pylist()
    assert max(pieces) >= 2, "some are longer than a shard"
    assert max(held.depth.max() for held in shards) > 0, "and have history"


def test_both_splits_hold_all_conversations(chats: Chats) -> None:
    _, out, made = chats
    tables = [pq.read_table(out / split / "index.parquet") for split in SPLITS]
    assert set().union(*(table["id"].to_pylist() for table in tables)) == set(made)


def test_webdataset_reads_ids_and_mask_as_documented(chats: Chats) -> None:
    _, out, made = chats
    manifest = Manifest.load(out / "train")
    paths = [str(out / "train" / held.name) for held in manifest.shards]
    samples = webdataset.WebDataset(paths, shardshuffle=False)
    stored = np.concatenate([np.frombuffer(sample["u32"], "<u4") for sample in samples])
    wanted = expected(out, "train", made)
    assert np.array_equal(stored & 0x7FFFFFFF, wanted[0])
    assert np.array_equal(stored >> 31, wanted[1])


def test_workers_change_no_byte(chats: Chats, tmp_path: Path) -> None:
    source, out, _ = chats
    build(source, tmp_path / "out", "--format", "chat", "--workers", 2)
    assert tree_digest(tmp_path / "out") == tree_digest(out)


def test_targets_of_a_lane_are_the_learned_tokens(chats: Chats) -> None:
    """Each learned token is a target once, but for the first of a shard."""
    _, out, _ = chats
    train = Corpus.open(out, ModelSettings(chunk_length=64)).train
    reader = LaneWindows(train.folder, train.manifest, train.schedule(2, 3, 0, version=1), range(2))
    count, shown = reader.schedule.windows_in_epoch(0), 0  # type: ignore[attr-defined]
    for index, batch in enumerate(windows(reader, 0, count, 0, torch.device("cpu"))):
        for lane in range(2):
            for k, place in enumerate(reader.schedule.chunks(index, lane)):
                if place is None:
                    continue
                stored = read_chunks(out / "train" / train.manifest.shards[place[0]].name)
                after = stored.reshape(-1)[place[1] * 64 + 1 : place[1] * 64 + 65].tolist()
                wanted = [t - int(LEARNED) if t >= LEARNED else IGNORE for t in after]
                wanted += [IGNORE] * (64 - len(wanted))
                assert batch.targets[lane, k].tolist() == wanted
                assert batch.tokens[lane, k].tolist() == (stored[place[1]] & ~LEARNED).tolist()
                shown += 1
    assert shown == train.manifest.chunks


def test_conversations_are_shown_and_described(
    chats: Chats, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, out, made = chats
    verify.main([str(out)])
    assert "sound; train" in capsys.readouterr().out
    rows = pq.read_table(out / "train" / "index.parquet").to_pylist()
    name = rows[0]["id"]
    show.main([str(out), "--document", name, "--characters", "0"])
    parts = (f"<|im_start|><|{t['role']}|>{t['content']}<|im_end|>" for t in made[name])
    assert "".join(parts) in capsys.readouterr().out
    show.main([str(out), "--shard", "1", "--chunk", "2"])
    learned = int((read_chunks(out / "train" / "shard-000001.tar")[2] >= LEARNED).sum())
    assert f"chunk 2: 64 tokens, {learned} of them learned, " in capsys.readouterr().out
    report.main([str(out), "--html", str(tmp_path / "page.html")])
    manifest = Manifest.load(out / "train")
    if len(manifest.shards) <= 32:
        share = expected(out, "train", made)[1].sum() / manifest.tokens
        assert f"{share:.1%}" in capsys.readouterr().out
    assert "of the tokens, " in (tmp_path / "page.html").read_text()


def test_what_is_skipped_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chats(tmp_path, 8)
    bad = [[], [{"role": "user", "content": "a"}], [{"role": "tool", "content": "a"}], [{}], None]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in bad))
    build(tmp_path, tmp_path / "out", "--format", "chat")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 empty, 1 no answer, 1 not messages, 1 null, 1 unknown role" in said
    assert sum(Manifest.load(tmp_path / "out" / split).documents for split in SPLITS) == 8


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"messages": []}\n\n{"text": "a"}', r"a\.jsonl, line 3: no key 'messages'"),
        ("a.jsonl", '{"messages": [}', r"a\.jsonl, line 1: broken JSON"),
        ("a.jsonl", '{"messages": "a"}', r"no usable document \(it holds 1 not messages\)"),
        ("a.txt", "a", r"a\.txt is not \.jsonl or \.ndjson, .* --source 'FOLDER/\*\.jsonl'"),
    ],
)
def test_what_holds_no_conversations_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str, problem: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem) as error:
        build(tmp_path / name, tmp_path / "out", "--format", "chat")
    assert "\n" not in str(error.value)


def test_a_source_of_text_is_no_source_of_conversations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--source stdlib has documents of format text"):
        shard.main(["--source", "stdlib", "--format", "chat", "--out", str(tmp_path / "out")])


def test_an_output_of_another_format_is_refused(chats: Chats) -> None:
    source, out, _ = chats
    before = tree_digest(out)
    with pytest.raises(UserError, match="was made with format chat, not text: choose another"):
        build(source, out)
    assert tree_digest(out) == before


def test_a_run_that_was_stopped_continues_to_the_same_bytes(
    chats: Chats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped where the fourth shard is to be written."""
    source, out, _ = chats
    calls = iter(range(4))
    writes = pack.ShardWriter._write
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.pack.ShardWriter._write", lambda self: (next(calls), writes(self)))
        with pytest.raises(StopIteration):
            build(source, tmp_path / "out", "--format", "chat")
    build(source, tmp_path / "out", "--format", "chat")
    assert tree_digest(tmp_path / "out") == tree_digest(out)


@pytest.fixture
def copy(chats: Chats, tmp_path: Path) -> Path:
    return fuzzing.copied(chats[1], tmp_path / "copy")


def test_each_of_many_random_changes_is_found(chats: Chats, copy: Path) -> None:
    sound = chats[1]
    missed = [
        (seed, how)
        for seed in range(CHANGES)
        if (how := goes_unnoticed(sound, Random(seed), copy)) is not None
    ]
    assert missed == []
    assert found(copy) == []


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_wrong_bit_of_the_mask_is_found_though_hashes_fit(
    chats: Chats, copy: Path, data: st.DataObject
) -> None:
    """One that also changes no id."""
    manifest = Manifest.load(copy / "train")
    number = data.draw(st.integers(0, len(manifest.shards) - 1))
    place = data.draw(st.integers(0, manifest.tokens_in(number) - 1))

    def flip(stored: Stored) -> None:
        stored[place] ^= LEARNED

    fuzzing.rewrite(copy / "train", number, flip)
    lines = found(copy)
    chunk = place // 64
    near = {f"train/shard-{number:06d}.tar, chunk {c}, " for c in (chunk, chunk + 1)}
    near.add(f"train/shard-{number + 1:06d}.tar, chunk 0, token 0")
    assert lines and all(line.startswith(tuple(near)) and "the mask" in line for line in lines)
    fuzzing.rewrite(copy / "train", number, flip)
    assert found(copy) == []


def test_blocks_of_one_chunk_join(chats: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may begin in one block of a shard, and end in the next."""
    monkeypatch.setattr(block_check, "BLOCK", 1)
    assert found(chats[1]) == []


IM_START, IM_END, USER, ASSISTANT, INST = 4, 5, 7, 8, 11


def _first(stored: Stored, token: int) -> int:
    return int(np.flatnonzero((stored & ~LEARNED) == token)[0])


def no_role(stored: Stored) -> None:
    stored[_first(stored, USER)] = 99


def no_begin(stored: Stored) -> None:
    stored[_first(stored, IM_START)] = 99


def no_end(stored: Stored) -> None:
    stored[_first(stored, IM_END)] = 99


def role_in_text(stored: Stored) -> None:
    stored[_first(stored, USER) + 2] = ASSISTANT


def other_special(stored: Stored) -> None:
    stored[_first(stored, USER) + 2] = INST


@pytest.mark.parametrize("change", [no_role, no_begin, no_end, role_in_text, other_special])
def test_a_broken_template_is_found_though_hashes_fit(
    copy: Path, change: Callable[[Stored], None]
) -> None:
    fuzzing.rewrite(copy / "train", 1, change)
    problem = "a token of the chat template stands in the wrong place"
    if change is other_special:
        problem = "a special id stands in the text"
    lines = found(copy)
    assert any(line.startswith("train/shard-000001") and problem in line for line in lines), lines


@pytest.fixture(scope="module")
def shards_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few conversations in shards of three tokens: most pairs of special tokens are apart."""
    folder = tmp_path_factory.mktemp("three")
    write_chats(folder, 4)
    small = ("--chunk-length", 3, "--chunks-per-shard", 1, "--valid-fraction", 0)
    build(folder, folder / "out", "--format", "chat", *small)
    assert found(folder / "out") == []
    return folder / "out"


@settings(max_examples=40)
@given(data=st.data())
def test_conversations_join_across_shards(shards_of_three: Path, data: st.DataObject) -> None:
    """A token of the template becomes text, or the mask of any token is flipped."""
    train = shards_of_three / "train"
    manifest = Manifest.load(train)
    number = data.draw(st.integers(0, len(manifest.shards) - 1))
    place = data.draw(st.integers(0, manifest.tokens_in(number) - 1))
    before = read_chunks(train / manifest.shards[number].name)[0, place]
    in_template = before & ~LEARNED in (IM_START, IM_END, USER, ASSISTANT)
    wrong = 99 if in_template else before ^ LEARNED
    fuzzing.rewrite(train, number, lambda stored: np.put(stored, place, wrong))
    assert found(shards_of_three)
    fuzzing.rewrite(train, number, lambda stored: np.put(stored, place, before))
    assert found(shards_of_three) == []


def test_a_mask_that_the_settings_do_not_know_is_found(copy: Path) -> None:
    raw = json.loads((copy / "shard.json").read_bytes())
    del raw["format"]
    (copy / "shard.json").write_text(json.dumps(raw))
    problem = "key dtype: says 'uint32-le-masked', shard.json and tokenizer.json 'uint16-le'"
    assert any(problem in line for line in found(copy))
