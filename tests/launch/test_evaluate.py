"""launch/evaluate.py: it reads every target once, and what it prints is what it found."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from data_prep.tokenizer import train_tokenizer
from i3dist.errors import UserError
from i3dist.inference.evaluate import ChunkLoss, Evaluation
from tests.known import BOS, TOKENIZER, Known
from tests.launch.conftest import cells, load, typed

HEADINGS = ["chunk", "tokens", "loss", "without history", "another's", "gain", "bits/byte"]


def evaluated(
    finished: Path, known: Known, folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], str]:
    """What the program writes and prints."""
    with pytest.MonkeyPatch.context() as patch:
        words = ["--checkpoint", finished, "--data", known.folder, "--device", "cpu"]
        typed(patch, *words, "--json", folder / "figures.json")
        load("evaluate").main()
    return json.loads((folder / "figures.json").read_text()), capsys.readouterr().out


def test_evaluate_reads_every_target_of_the_valid_split(
    finished: Path, known: Known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By chunk within the document, and bits by the bytes that the targets stand for."""
    figures, _ = evaluated(finished, known, tmp_path, capsys)
    names = {number: name for name, number in json.loads(TOKENIZER)["model"]["vocab"].items()}
    size = {number: len(names[number]) if number > 12 else 0 for number in names}
    tokens: Counter[int] = Counter()
    text: Counter[int] = Counter()
    for shard in range(len(known.shards["valid"])):
        stored, wanted = known.shards["valid"][shard], known.targets("valid", shard)
        for chunk, depth in enumerate(known.depth("valid", shard)):
            index = depth
            for token, target in zip(stored[chunk], wanted[chunk], strict=True):
                index = 0 if token == BOS else index
                if target >= 0:
                    tokens[index] += 1
                    text[index] += size[int(target)]
    assert figures["tokens"] == sum(tokens.values())
    assert {c["index"]: c["tokens"] for c in figures["by_chunk"]} == dict(tokens)
    bits = figures["loss"] * figures["tokens"] / math.log(2)
    assert figures["bits_per_byte"] == pytest.approx(bits / text.total())
    for chunk in figures["by_chunk"]:
        bits = chunk["loss"] * chunk["tokens"] / math.log(2)
        assert chunk["bits_per_byte"] == pytest.approx(bits / text[chunk["index"]])
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    total = sum(c["loss"] * c["tokens"] for c in figures["by_chunk"])
    assert figures["loss"] == pytest.approx(total / figures["tokens"])


def test_evaluate_prints_what_it_writes(
    finished: Path, known: Known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, said = evaluated(finished, known, tmp_path, capsys)
    assert (
        said.splitlines()[0].split()
        == (
            f"loss {figures['loss']:.4f} nats/token perplexity {figures['perplexity']:.2f} "
            f"bits/byte {figures['bits_per_byte']:.4f} tokens {figures['tokens']:,}"
        ).split()
    )
    assert cells(said)[1:] == [row(chunk) for chunk in figures["by_chunk"]]


def row(chunk: dict[str, Any]) -> list[str]:
    """A row of evaluate's table."""
    loss, without, other = (
        chunk[f"loss{end}"] for end in ("", "_without_history", "_other_history")
    )
    shown = "" if other is None else f"{other:.4f}"
    bits = "" if chunk["bits_per_byte"] is None else f"{chunk['bits_per_byte']:.4f}"
    figures = [f"{loss:.4f}", f"{without:.4f}", shown, f"{without - loss:+.4f}", bits]
    return [str(chunk["index"]), f"{chunk['tokens']:,}", *figures]


@pytest.mark.parametrize("count", [1, 12, 13, 20])
def test_evaluates_table_says_how_much_it_leaves_out(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chunks = [
        ChunkLoss(
            i, 1000 + i, 3 - i / 64, 3 + i / 32, *((None, None) if i == 1 else (4.0 + i, 1.5))
        )
        for i in range(count)
    ]
    load("evaluate").print_tables(Evaluation(3.0, 20.0, 1.0, 12345, chunks))
    said = capsys.readouterr().out
    assert cells(said) == [
        HEADINGS,
        *(row(vars(chunk)) for chunk in chunks[:12]),
    ]
    assert ("later chunks" in said) == (count > 12)
    if count > 12:
        assert f"({count - 12} later chunks: see --json)" in said


def test_evaluate_refuses_data_of_another_tokenizer_of_the_same_size(
    finished: Path, known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "tokenizer.json").write_bytes(train_tokenizer(["cd cd cd"], 300))
    typed(monkeypatch, "--checkpoint", run, "--data", known.folder, "--device", "cpu")
    with pytest.raises(UserError, match=rf"{known.folder} was made with another tokenizer"):
        load("evaluate").main()


@pytest.mark.parametrize(("name", "says"), [("none/x", "No such file"), (".", "Is a directory")])
def test_evaluate_finds_before_the_work_that_it_cannot_write(
    finished: Path,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    says: str,
) -> None:
    module = load("evaluate")
    monkeypatch.setattr(module, "load_run", mock.Mock(side_effect=AssertionError))
    words = ["--checkpoint", finished, "--data", known.folder]
    typed(monkeypatch, *words, "--json", tmp_path / name)
    with pytest.raises(UserError, match=rf"--json: .* cannot be written: {says}.*; .*name another"):
        module.main()


def test_json_on_standard_output_stands_alone(
    finished: Path,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["--checkpoint", finished, "--data", known.folder, "--device", "cpu"]
    typed(monkeypatch, *words, "--json", "/dev/stdout")
    load("evaluate").main()
    out, aside = capfd.readouterr()
    assert json.loads(out)["loss"] > 0 and "loss by chunk index" in aside


@pytest.mark.parametrize("option", ["--task-folder", "--limit", "--batch-size"])
def test_options_of_tasks_are_refused_with_data(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    typed(monkeypatch, "--checkpoint", "x", "--data", "y", option, "1")
    with pytest.raises(UserError, match=f"{option} is an option of --tasks"):
        load("evaluate").main()
