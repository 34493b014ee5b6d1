"""The options of shard.py, end to end, and what it says while it works and when it is done."""

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from data_prep import progress
from data_prep.output_settings import OutputSettings
from data_prep.reading.hub import DATASET, HUB_NAME
from data_prep.shard import parse, settings_of
from data_prep.tokenizer import check_vocabulary
from i3dist.errors import UserError

WHOLE = {
    "vocab-size": (269, 16_777_216),
    "tokenizer-sample-mb": (1, 10_000),
    "workers": (1, 1024),
    "chunk-length": (2, 65_536),
    "min-tokens": (1, 2**40),
    "max-tokens": (1, 2**40),
    "chunks-per-shard": (1, 1_000_000),
    "seed": (0, 2**63 - 1),
}
DEFAULTS = {
    "extend": None,
    "dry_run": False,
    "begin": False,
    "task": None,
    "merge": False,
    "format": "text",
    "source": [(DATASET, 1.0)],
    "out": Path("data/fineweb-edu"),
    "scratch": None,
    "text_column": None,
    "tokenizer": None,
    "vocab_size": None,
    "tokenizer_sample_mb": None,
    "workers": len(os.sched_getaffinity(0)),
    "chunk_length": 512,
    "chunks_per_shard": None,
    "valid_fraction": 0.005,
    "seed": 0,
    "where": None,
    "min_tokens": None,
    "max_tokens": None,
    "deduplicate": False,
    "valid": None,
    "license": None,
}


def value(name: str, word: object) -> Any:
    return getattr(parse([f"--{name}", str(word)]), name.replace("-", "_"))


def test_what_is_not_given_is_the_default() -> None:
    assert vars(parse([])) == DEFAULTS


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_reaches_from_end_to_end(name: str) -> None:
    low, high = WHOLE[name]
    assert (value(name, low), value(name, high)) == (low, high)
    for wrong in (low - 1, high + 1, f"{low + 1}.5", "x", ""):
        with pytest.raises(UserError, match=f"--{name}.* whole number from {low:,} to {high:,}"):
            value(name, wrong)


def test_the_fraction_reaches_from_end_to_end() -> None:
    assert [value("valid-fraction", word) for word in ("0", "0.9", "0.25")] == [0.0, 0.9, 0.25]
    for wrong in ("-0.001", "0.901", "nan", "inf", "x"):
        with pytest.raises(UserError, match=r"is not a number from 0\.0 to 0\.9"):
            value("valid-fraction", wrong)


@pytest.mark.parametrize("name", ["out", "tokenizer"])
def test_a_place_is_what_was_typed(name: str) -> None:
    assert str(value(name, "a b#c")) == "a b#c"


def test_sources_are_what_was_typed_each_with_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c:2").write_text("x")
    monkeypatch.chdir(tmp_path)
    words = ["a b#c", "d:0.25", "e:3", "stdlib:1e-3", "f:x", "c:2", "c:2:2", "g:", "./h:.5"]
    typed = parse([word for text in words for word in ("--source", text)]).source
    assert [(str(spec), weight) for spec, weight in typed] == [
        ("a b#c", 1.0),
        ("d", 0.25),
        ("e", 3.0),
        ("stdlib", 0.001),
        ("f:x", 1.0),
        ("c:2", 1.0),
        ("c:2", 2.0),
        ("g:", 1.0),
        ("h", 0.5),
    ]
    for wrong in ("a:0", "a:-1", "a:1001", "a:1e-7", "a:1e999"):
        with pytest.raises(UserError, match=r"a weight is a number from 0\.000001 to 1000, not"):
            parse(["--source", wrong])


SOURCE = SimpleNamespace(name="texts", outline="r1", revision="r2", license=None)
GIVEN = SimpleNamespace(sha256=f"{0:064x}", vocab_size=300, path="t.json")


def test_settings_of_an_output_are_all_options_that_decide_its_bytes() -> None:
    words = ["--chunk-length", "7", "--chunks-per-shard", "5", "--seed", "3", "--workers", "9"]
    options = parse([*words, "--valid-fraction", "0.5", "--tokenizer-sample-mb", "4"])
    trained = settings_of(options, SOURCE, None, None)
    wanted = OutputSettings(
        source="texts",
        revision="r1",
        tokenizer="trained",
        tokenizer_sample_mb=4,
        tokenizer_sample="even",
        vocab_size=32_000,
        chunk_length=7,
        chunks_per_shard=5,
        valid_fraction=0.5,
        seed=3,
    )
    assert trained == wanted
    given = {"tokenizer": f"sha256 {0:064x}", "tokenizer_sample_mb": 0, "vocab_size": 300}
    assert settings_of(options, SOURCE, GIVEN, trained) == wanted.model_copy(update=given)
    sized = settings_of(parse([*words, "--vocab-size", "4000"]), SOURCE, None, None)
    assert sized.vocab_size == 4000


@pytest.mark.parametrize("wanted", [None, 300])
def test_a_tokenizer_of_the_size_that_was_asked_for_serves(wanted: int | None) -> None:
    check_vocabulary(GIVEN, wanted)


@pytest.mark.parametrize("wanted", [299, 301])
def test_a_tokenizer_of_another_size_is_refused(wanted: int) -> None:
    with pytest.raises(UserError, match=rf"vocabulary of 300, not of --vocab-size {wanted}"):
        check_vocabulary(GIVEN, wanted)


def test_the_hub_is_named_as_the_default_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert HUB_NAME in " ".join(capsys.readouterr().out.split())


def split(documents: int, tokens: int, sizes: tuple[int, ...]) -> Any:
    shards = [SimpleNamespace(size=size) for size in sizes]
    return SimpleNamespace(documents=documents, tokens=tokens, chunks=7, shards=shards)


def test_the_closing_table_counts_what_was_made() -> None:
    manifests = {"valid": split(12, 3_000, (500_000,)), "train": split(3456, 9_000, (10**6, 10**7))}
    skipped = {"null": 2, "empty": 1234}
    console = Console(file=io.StringIO(), width=100)
    console.print(progress.closing_table(manifests, skipped, 4.0))
    said = console.file.getvalue()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    assert [row for row in rows if row] == [
        ["train", "3,456", "9,000", "7", "2", "11.0"],
        ["valid", "12", "3,000", "7", "1", "0.5"],
    ]
    caption = "4.0 s, 3,000 tokens/s; skipped documents: 1,234 empty, 2 null"
    assert caption in " ".join(said.split())
    console.print(progress.closing_table(manifests, {}, 0.0))
    assert "no document skipped" in console.file.getvalue()


def test_the_bar_shows_all_that_was_reported_and_how_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn anew every tenth of a second, and at the end."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(Progress, "update", lambda self, task, **fields: shown.append(fields))
    with progress.pass_bar(Console(file=io.StringIO()), "pack", "documents", 10) as report:
        steps = ((0.0625, 1, 10), (0.0625, 2, 21), (0.0625, 1, 5), (1.8125, 0, 65))
        for seconds, units, tokens in steps:
            now[0] += seconds
            report(units, tokens)
        report(6, 100)
    assert [(s["completed"], s["tokens"]) for s in shown] == [
        (3, ", 31 tokens, 248/s"),
        (4, ", 101 tokens, 50/s"),
        (10, ", 201 tokens, 100/s"),
    ]
    del shown[:]
    with progress.pass_bar(Console(file=io.StringIO()), "count", "runs", 1) as report:
        report(1, 0)
    assert [s["tokens"] for s in shown] == [""], "a pass that reads no tokens"
