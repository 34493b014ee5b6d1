"""Choosing documents, end to end: what is left, what is recorded, and what is refused."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import forecast, report
from data_prep.choice import Choice
from data_prep.dropped import dropped_by_split
from data_prep.forecast import Forecast, measure
from data_prep.output_settings import OutputSettings
from data_prep.reading import hub
from data_prep.reading.files import file_source
from data_prep.shard import main, parse
from data_prep.shuffle import PartSummary
from data_prep.sources import Part, Record, Skip
from data_prep.text_hash import text_hash
from i3dist.data.manifest import Manifest
from i3dist.data.shard_table import ShardTable
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from tests.data_prep.corpus import arguments, build, read_documents, tree_digest
from tests.data_prep.fuzzing import found
from tests.data_prep.test_sources import serve_from

ROOT = Path(__file__).parent.parent.parent
WHERE = "score >= 1 and language = 'en'"
LEAST, MOST = 20, 300
CHOICE = ["--where", WHERE, "--min-tokens", LEAST, "--max-tokens", MOST, "--deduplicate"]
WORDS = ("a", "bc", "def", "ghij", "Klm", "élan")
SETTINGS = OutputSettings(
    source="s",
    revision="r",
    tokenizer="trained",
    tokenizer_sample_mb=1,
    vocab_size=9,
    chunk_length=512,
    chunks_per_shard=9,
    valid_fraction=0.1,
    seed=0,
)
Rows = list[dict[str, Any]]


def made_rows(count: int, seed: int) -> Rows:
    """Rows of 3 to 200 words, a fifth of which are duplicates but for case and white space."""
    rng = random.Random(seed)
    rows: Rows = []
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, 200)))
        if number % 5 == 4:
            text = f" {rng.choice(rows)['text'].upper()}\n"
        language = "en" if number % 3 else "fr"
        rows.append({"id": f"{number}", "text": text, "score": number % 4, "language": language})
    rows[7]["text"] = None
    return rows


def write_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def rows() -> Rows:
    return made_rows(300, 0)


@pytest.fixture(scope="module")
def source(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choosing") / "in"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:150]), folder / "a.parquet", row_group_size=20)
    write_lines(folder / "b.jsonl", rows[150:])
    return folder


@pytest.fixture(scope="module")
def held_out(rows: Rows, source: Path) -> Path:
    """Documents of its own, one of them short, and copies of two for training."""
    path = source.parent / "held-out.jsonl"
    texts = [
        "short",
        *(row["text"] for row in made_rows(12, 1)[:4]),
        *(r["text"] for r in rows[1:3]),
    ]
    write_lines(path, [{"id": f"v{n}", "text": text} for n, text in enumerate(texts)])
    return path


@pytest.fixture(scope="module")
def chosen(source: Path, held_out: Path) -> Path:
    out = source.parent / "chosen"
    build(source, out, *CHOICE, "--valid", held_out)
    return out


def documents(out: Path, split: str) -> list[tuple[str, str]]:
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    return [(name, text) for name, _, text in read_documents(out / split, tokenizer)]


def choose(rows: Rows, tokenizer: Tokenizer, seen: set[bytes]) -> tuple[set[str], Counter[str]]:
    """Ids of the rows that are kept, and the others by reason: one row after the other."""
    kept, dropped = set(), Counter[str]()
    for row in rows:
        text = (row["text"] or "").encode()
        if row["score"] < 1 or row["language"] != "en":
            reason = "excluded by --where"
        elif row["text"] is None:
            reason = "null"
        elif (count := len(tokenizer.encode_utf8(text))) < LEAST:
            reason = "below --min-tokens"
        elif count > MOST:
            reason = "above --max-tokens"
        elif text_hash(text) in seen:
            reason = "duplicate"
        else:
            seen.add(text_hash(text))
            kept.add(row["id"])
            continue
        dropped[reason] += 1
    return kept, dropped


def test_what_is_left_is_what_a_naive_choice_keeps(
    rows: Rows, chosen: Path, held_out: Path
) -> None:
    tokenizer = Tokenizer.load(chosen / "tokenizer.json")
    held = [json.loads(line) for line in held_out.read_text().splitlines()]
    seen = {text_hash(row["text"].encode()) for row in held}
    kept, dropped = choose(rows, tokenizer, seen)
    train, valid = (documents(chosen, split) for split in ("train", "valid"))
    assert {name for name, _ in train} == kept and len(train) == len(kept)
    assert sorted(valid) == sorted((row["id"], row["text"]) for row in held)
    assert Manifest.load(chosen / "train").dropped == {"in": dropped}
    assert Manifest.load(chosen / "valid").dropped == {"held-out.jsonl": {}}
    assert set(dropped) == {reason.value for reason in Skip if reason.value in dropped}
    assert min(dropped.values()) > 0 and len(dropped) == 4


def test_what_was_dropped_is_counted_for_each_source_of_a_split() -> None:
    names, validation = ("b", "a", "b", ""), (False, False, False, True)
    parts, summaries = [], []
    for number, (name, is_validation) in enumerate(zip(names, validation, strict=True), 1):
        parts.append(part := Part())
        part.source, part.is_validation = name, is_validation
        counts = {"runs": (), "documents": 0, "tokens": 0, "smallest_split": 0, "largest_split": 0}
        skipped = {"null": number} if number < 3 else {"duplicate": number, "empty": 1}
        summaries.append(PartSummary.model_validate(counts | {"skipped": skipped}))
    dropped = dropped_by_split(parts, summaries, SETTINGS.model_copy(update={"valid": "v"}))
    train = {"a": {"null": 2}, "b": {"duplicate": 3, "empty": 1, "null": 1}}
    assert dropped == {"train": train, "valid": {"v": {"duplicate": 4, "empty": 1}}}
    assert list(dropped["train"]) == ["a", "b"]
    assert list(dropped["train"]["b"]) == sorted(train["b"])


def test_what_was_chosen_is_recorded_and_sound(chosen: Path) -> None:
    settings = OutputSettings.model_validate_json((chosen / "shard.json").read_bytes())
    assert (settings.where, settings.min_tokens, settings.max_tokens) == (WHERE, LEAST, MOST)
    assert settings.deduplicate and settings.valid == "held-out.jsonl"
    assert settings.valid_revision != settings.revision
    for split, name in (("train", "in"), ("valid", "held-out.jsonl")):
        manifest = Manifest.load(chosen / split)
        assert (manifest.version, manifest.source) == (2, name)
        assert isinstance(manifest.shards, ShardTable), "it was compared, not parsed"
    assert found(chosen) == []


def test_a_missing_record_of_what_was_dropped_is_found(chosen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", chosen, out], check=True)
    path = out / "train" / "manifest.json"
    raw = json.loads(path.read_bytes())
    del raw["dropped"]
    path.write_text(json.dumps(raw | {"version": 1}))
    (line,) = found(out)
    assert line.startswith("train/manifest.json, key dropped: is missing")
    path.write_text(json.dumps(raw))
    assert any("version 2 where dtype and keys are of 1" in line for line in found(out))


def test_workers_change_no_byte(source: Path, held_out: Path, chosen: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "out", *CHOICE, "--valid", held_out, "--workers", 3)
    assert tree_digest(tmp_path / "out") == tree_digest(chosen)


# Each of these ends the process by SIGKILL at a chosen call.
KILLS = {
    "in pass 1": ("shuffle.Spiller", "spill", 4),
    "while it compares": ("duplicates", "_save", 2),
    "while it marks": ("duplicates", "write_marks", 3),
    "while it packs": ("pack", "shard_bytes", 2),
}


@pytest.mark.parametrize("place", KILLS)
def test_a_run_killed_anywhere_continues_to_the_same_bytes(
    source: Path, held_out: Path, chosen: Path, tmp_path: Path, place: str
) -> None:
    target, attribute, call = KILLS[place]
    code = f"""
import os, sys
import data_prep.shard, data_prep.reading.files
from data_prep import duplicates, pack, shuffle
data_prep.reading.files._SMALLEST_PART = 4000
calls = 0
def deadly(*args, then={target}.{attribute}):
    global calls
    calls += 1
    return os.kill(os.getpid(), 9) if calls == {call} else then(*args)
{target}.{attribute} = deadly
data_prep.shard.main(sys.argv[1:])
"""
    out = tmp_path / "out"
    words = arguments(source, out, *CHOICE, "--valid", held_out)
    command = [sys.executable, "-c", code, *words]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert (out / ".work").exists()
    build(source, out, *CHOICE, "--valid", held_out, "--workers", 2)
    assert tree_digest(out) == tree_digest(chosen)


def test_a_run_that_chooses_nothing_records_nothing(built: Path) -> None:
    """So its bytes are those of before."""
    keys = {"layout", "source", "revision", "tokenizer", "tokenizer_sample_mb", "tokenizer_sample"}
    keys |= {"vocab_size", "chunk_length", "chunks_per_shard", "valid_fraction", "seed"}
    assert json.loads((built / "shard.json").read_bytes()).keys() == keys
    raw = json.loads((built / "train" / "manifest.json").read_bytes())
    assert raw["version"] == 1 and "dropped" not in raw


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "with --valid: "),
        ([*CHOICE, "--valid", "HELD", "--max-tokens", 301], "with max-tokens 300, not 301: "),
        (["--valid", "HELD", *CHOICE[2:]], "with --where: "),
        (["--valid", "HELD", *CHOICE, "--where", "score > 1"], "with where .*, not score > 1: "),
        (["--valid", "HELD", *CHOICE[:-1]], "with --deduplicate: "),
        (["--valid", "OTHER", *CHOICE], r"with valid held-out\.jsonl, not other\.jsonl: "),
    ],
)
def test_a_folder_of_another_choice_is_refused(
    source: Path, held_out: Path, chosen: Path, options: list[object], message: str
) -> None:
    write_lines(other := held_out.with_name("other.jsonl"), [{"text": "other"}])
    words = [{"HELD": held_out, "OTHER": other}.get(str(option), option) for option in options]
    before = tree_digest(chosen)
    with pytest.raises(UserError, match=rf"was made {message}choose another --out, or delete it"):
        build(source, chosen, *words)
    assert tree_digest(chosen) == before


def test_a_folder_without_a_choice_is_refused_with_one(corpus: Any, built: Path) -> None:
    for option, name in ((("--max-tokens", 9), "max-tokens"), (("--deduplicate",), "deduplicate")):
        with pytest.raises(UserError, match=f"was made without --{name}: choose another --out"):
            build(corpus[0], built, *option)


def test_a_choice_cannot_change_before_packing_either(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(UserError, match="raise --chunks-per-shard"),
        pytest.MonkeyPatch().context() as m,
    ):
        m.setattr("data_prep.second_pass.MAX_SHARDS", 0)
        build(source, out, "--min-tokens", 30)
    with pytest.raises(UserError, match="with min-tokens 30, not 31: choose another --out"):
        build(source, out, "--min-tokens", 31)
    build(source, out, "--min-tokens", 30, "--valid-fraction", 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-tokens", "9", "--max-tokens", "8"], "--min-tokens 9 is more than --max-tokens 8"),
        (["--valid", "x", "--valid-fraction", "0.1"], "--valid and --valid-fraction exclude each"),
        (["--min-tokens", "0"], "whole number from 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "score > 9"], r"in has no usable document \(it holds 300 excluded by --where"),
        (["--max-tokens", 1], r"299 above --max-tokens, 1 null\): .*, or choose less strictly"),
        (["--where", " "], "argument --where: it is empty"),
        (["--where", "nothing > 9"], "there is no column nothing; .* has the columns id, text, sc"),
        (["--source", "stdlib", "--where", "text = ''"], "--where needs rows with columns"),
        (["--valid", "{held}", "--where", "score > 9"], "no usable document"),
        (["--valid", "{held}", "--max-tokens", 1], "no document of --source in is left: choose"),
        (["--valid", "{blank}"], r"no document of --valid blank\.jsonl is left: .*or name another"),
        (["--valid", "{inside}"], r"b\.jsonl is in --source and in --valid: move it out"),
        (["--valid", "{held}.none"], "no file or folder"),
    ],
)
def test_a_choice_that_leaves_nothing_is_one_line(
    source: Path, held_out: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    write_lines(tmp_path / "blank.jsonl", [{"text": " "}])
    places = {"held": held_out, "blank": tmp_path / "blank.jsonl", "inside": source / "b.jsonl"}
    words = [option.format(**places) if isinstance(option, str) else option for option in options]
    with pytest.raises(UserError, match=message) as error:
        build(source, tmp_path / "out", *words)
    assert "\n" not in str(error.value)


def test_a_duplicate_of_the_validation_source_is_not_trained_on(
    source: Path, held_out: Path, tmp_path: Path
) -> None:
    """But only if that is asked for."""
    held = {
        text_hash(json.loads(line)["text"].encode()) for line in held_out.read_text().splitlines()
    }
    for options, both in (([], 2), (["--deduplicate"], 0)):
        out = tmp_path / f"out{both}"
        build(source, out, "--valid", held_out, *options)
        train = [text_hash(text.encode()) for _, text in documents(out, "train")]
        assert sum(text in held for text in train) >= both
        assert both or not any(text in held for text in train)


def test_the_tokenizer_is_not_trained_on_the_validation_source(
    source: Path, held_out: Path, tmp_path: Path
) -> None:
    build(source, tmp_path / "one")
    build(source, tmp_path / "two", "--valid", held_out)
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert tokenizers[0] == tokenizers[1]


def test_other_content_of_the_validation_source_is_refused(
    source: Path, held_out: Path, tmp_path: Path
) -> None:
    path = tmp_path / held_out.name
    path.write_bytes(held_out.read_bytes())
    build(source, tmp_path / "out", "--valid", path)
    build(source, tmp_path / "out", "--valid", path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"short", b"trohs"))
    with pytest.raises(UserError, match="other content of the same source"):
        build(source, tmp_path / "out", "--valid", path)
    path.write_bytes(data + b'{"text": "more"}\n')
    with pytest.raises(UserError, match="other content of the same source"):
        build(source, tmp_path / "out", "--valid", path)


def test_a_changed_file_of_training_is_told_from_one_of_validation(
    source: Path, held_out: Path, tmp_path: Path
) -> None:
    """Both are numbered from 0 by their sources."""
    text = tmp_path / "in" / "b.jsonl"
    text.parent.mkdir()
    text.write_bytes((source / "b.jsonl").read_bytes())
    options = [tmp_path / "out", "--valid", held_out]
    build(text.parent, *options)
    os.utime(text)
    build(text.parent, *options)
    text.write_bytes(text.read_bytes()[::-1].replace(b"\n", b"", 1) + b"\n")
    with pytest.raises(UserError, match=r"before .*in/b\.jsonl changed, from other content"):
        build(text.parent, *options)


def test_a_license_is_recorded_and_decides_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, "--license", "CC-BY-4.0")
    assert json.loads((out / "shard.json").read_bytes())["license"] == "CC-BY-4.0"
    build(source, out)  # it is complete
    raw = json.loads((out / "train" / "manifest.json").read_bytes())
    assert raw["version"] == 1
    assert found(out) == []


def test_the_end_of_a_run_and_the_report_show_what_was_dropped(
    source: Path, held_out: Path, chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dropped,) = (Manifest.load(chosen / "train").dropped or {}).values()
    report.main([str(chosen), "--html", str(tmp_path / "page.html")])
    said = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "page.html").read_text()
    for reason, count in dropped.items():
        assert f"│ in │ {reason} │ {count} │" in said
        assert f"<td>{reason}</td><td>{count}</td>" in page
    assert f"{sum(dropped.values())} documents were left out" in page
    build(source, tmp_path / "out", *CHOICE, "--valid", held_out)
    said = " ".join(capsys.readouterr().out.split())
    for reason, count in dropped.items():
        assert f"│ train: in │ {reason} │ {count} │" in said


def test_a_report_of_an_output_without_a_choice_says_nothing_of_it(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main([str(built)])
    assert "filters" not in capsys.readouterr().out


def test_the_forecast_counts_what_is_chosen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.forecast._PLACES", 100)
    build(source, tmp_path / "out", *CHOICE[:-1])
    made = sum(Manifest.load(tmp_path / "out" / split).tokens for split in ("train", "valid"))
    parts = file_source(source).chosen(WHERE).parts()
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    sample = measure(parts, tokenizer, choice=Choice(LEAST, MOST))
    assert sample is not None
    assert made / 1.5 < sample.tokens + 2 * sample.documents < made * 1.5


@pytest.mark.parametrize(
    ("tokens", "reason"), [(4, Skip.SHORT), (5, None), (9, None), (10, Skip.LONG)]
)
def test_both_bounds_are_allowed_lengths(tokens: int, reason: Skip | None) -> None:
    part = Excluding()
    assert Choice(5, 9).skip(part, tokens) is reason
    assert Choice(tokens, tokens).skip(part, tokens) is None
    assert Choice().skip(part, tokens) is None
    part.is_validation = True
    assert Choice(5, 9).skip(part, tokens) is None


def test_the_forecast_counts_no_documents_of_other_lengths(built: Path) -> None:
    tokenizer = Tokenizer.load(built / "tokenizer.json")
    length = len(tokenizer.encode_utf8(f"{0:100}".encode()))
    sizes = []
    for choice in (Choice(), Choice(length), Choice(length + 1)):
        sample = measure([Excluding()], tokenizer, choice=choice)
        assert sample
        sizes.append((round(sample.documents), sample.tokens > 0))
    assert sizes[0] == (250, True) and 0 < sizes[1][0] <= 250 and sizes[2][0] < sizes[1][0]


class Excluding(Part):
    """Of 1,000 documents of 100 bytes every fourth meets a condition."""

    size = 100_000

    def records(self) -> Iterator[Record]:
        for number in range(1000):
            text = Skip.WHERE if number % 4 else f"{number:100}"
            yield Record(f"f#{number}", "", "", text)


def test_a_part_that_is_not_read_to_its_end_is_estimated(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=0.005)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    sample = measure([Excluding()], Tokenizer.load(built / "tokenizer.json"))
    assert sample is not None and next(clock) < 7 and not sample.is_whole
    assert 240 < sample.documents < 260


def test_the_forecast_says_what_it_does_not_know(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(source, tmp_path / "out", *CHOICE, "--dry-run")
    said = capsys.readouterr().out
    assert "duplicates are counted in" in said and "too short or too long are counted in" in said
    build(source, tmp_path / "out", "--where", "score > 9", "--dry-run")
    assert "or no row of a sample meets --where" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    sample = measure(file_source(source).parts(), None)
    assert sample
    sizes = [
        Forecast.of(sample, SETTINGS.model_copy(update=update), 1).run_bytes
        for update in ({}, {"deduplicate": True})
    ]
    assert sizes[1] > sizes[0]


def test_rows_of_the_hub_are_chosen_by_its_columns(
    three_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_from(three_files, monkeypatch)
    monkeypatch.setattr(hub, "_license", lambda _, revision: f"odc-by at {revision}")
    out = ["--out", str(tmp_path / "out"), "--vocab-size", "300", "--workers", "1"]
    main([*out, "--where", "n % 2 = 1"])
    kept = [name for split in ("train", "valid") for name, _ in documents(tmp_path / "out", split)]
    assert sorted(kept) == [f"{file}-{n}" for file in range(3) for n in (1, 3)]
    dropped = Manifest.load(tmp_path / "out" / "train").dropped
    assert dropped == {hub.HUB_NAME: {"excluded by --where": 6}}
    assert (
        json.loads((tmp_path / "out" / "shard.json").read_bytes())["license"] == "odc-by at newest"
    )
    with pytest.raises(UserError, match=r"no column m; .*/0\.parquet has the columns text, id, n"):
        main([*out[:1], str(tmp_path / "other"), *out[2:], "--where", "m = 1"])


def test_a_source_for_validation_may_come_from_the_hub(
    source: Path,
    three_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is asked once: a finished output needs no network."""
    with monkeypatch.context() as patched:
        serve_from(three_files, patched)
        patched.setattr(hub, "_license", lambda _, revision: f"odc-by at {revision}")
        build(source, tmp_path / "out", "--valid", hub.DATASET)
    raw = json.loads((tmp_path / "out" / "shard.json").read_bytes())
    assert (raw["valid"], raw["valid_revision"]) == (hub.HUB_NAME, "newest")
    assert raw["valid_license"] == "odc-by at newest" and "license" not in raw
    assert len(documents(tmp_path / "out", "valid")) == 12
    assert found(tmp_path / "out") == []
    for name in ("_commit", "_license"):
        monkeypatch.setattr(hub, name, lambda *_: pytest.fail("it asks the hub"))
    build(source, tmp_path / "out", "--valid", hub.DATASET)
    assert capsys.readouterr().out.endswith("is already complete\n")


def test_the_license_of_the_hub_is_that_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        card: Any = None

        def dataset_info(self, *_: object, **__: object) -> Any:
            return SimpleNamespace(card_data=self.card)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    cards = ({"license": "odc-by"}, {"license": ["mit", "other"]}, {}, None)
    for Api.card, name in zip(cards, ("odc-by", "mit, other", None, None), strict=True):
        assert hub._license("x/y", "main") == name


def test_text_that_is_no_text_goes_by_its_own_reason(tmp_path: Path) -> None:
    """Beside those that were chosen."""
    lines = [b'{"text": null, "n": 1}', b'{"text": "\xff", "n": 1}', b'{"text": "a", "n": 1}']
    lines += [b'{"text": null, "n": 0}', b'{"text": "\\ud800", "n": 0}', b'{"text": "b", "n": 1}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    build(tmp_path / "a.jsonl", tmp_path / "out", "--where", "n = 1", "--vocab-size", 269)
    reasons = {"excluded by --where": 2, "null": 1, "undecodable": 1}
    assert Manifest.load(tmp_path / "out" / "train").dropped == {"a.jsonl": reasons}
    assert os.listdir(tmp_path / "out")
