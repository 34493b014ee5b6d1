"""What the programs do with their arguments, and that what they print is what they found.

They run in the test's process, on a small model with random weights and data that are known.
"""

import importlib.util
import io
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from data_prep.tokenizer import train_tokenizer
from i3dist.checkpoint.weights import export_weights
from i3dist.config import Settings
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.inference.evaluate import ChunkLoss, Evaluation
from i3dist.inference.generate import Sampling
from i3dist.model.lm import I3LM
from tests.conftest import ROOT
from tests.known import BOS, CHUNK, TOKENIZER, Known, documents, make
from tests.known import MODEL as TINY

MODEL = TINY | {"train.window_chunks": 2}


def load(name: str) -> ModuleType:
    """One of launch/, as a module of its own for each test."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def typed(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Make these the command line's arguments."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make(tmp_path_factory.mktemp("known") / "data", documents(0, 6), documents(1, 7))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    settings = Settings().with_values(**MODEL)
    torch.manual_seed(0)
    export_weights(folder, I3LM(settings.model, BOS), 3)
    (folder / "settings.yaml").write_text(settings.to_yaml())
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    return folder


# launch/evaluate.py


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
    text = 0
    for shard in range(len(known.shards["valid"])):
        stored, wanted = known.shards["valid"][shard], known.targets("valid", shard)
        for chunk, depth in enumerate(known.depth("valid", shard)):
            index = depth
            for token, target in zip(stored[chunk], wanted[chunk], strict=True):
                index = 0 if token == BOS else index
                if target >= 0:
                    tokens[index] += 1
                    text += size[int(target)]
    assert figures["tokens"] == sum(tokens.values())
    assert {c["index"]: c["tokens"] for c in figures["by_chunk"]} == dict(tokens)
    bits = figures["loss"] * figures["tokens"] / math.log(2)
    assert figures["bits_per_byte"] == pytest.approx(bits / text)
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


def cells(said: str) -> list[list[str]]:
    """Rows of a printed table, its headings first."""
    lines = said.replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def row(chunk: dict[str, Any]) -> list[str]:
    """A row of evaluate's table."""
    loss, without, other = (
        chunk[f"loss{end}"] for end in ("", "_without_history", "_other_history")
    )
    shown = "" if other is None else f"{other:.4f}"
    figures = [f"{loss:.4f}", f"{without:.4f}", shown, f"{without - loss:+.4f}"]
    return [str(chunk["index"]), f"{chunk['tokens']:,}", *figures]


@pytest.mark.parametrize("count", [1, 12, 13, 20])
def test_evaluates_table_says_how_much_it_leaves_out(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chunks = [
        ChunkLoss(i, 1000 + i, 3 - i / 64, 3 + i / 32, None if i == 1 else 4.0 + i)
        for i in range(count)
    ]
    load("evaluate").print_tables(Evaluation(3.0, 20.0, 1.0, 12345, chunks))
    said = capsys.readouterr().out
    assert cells(said) == [
        ["chunk", "tokens", "loss", "without history", "another document's", "gain"],
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


def test_evaluate_finds_before_the_work_that_it_cannot_write(
    finished: Path, known: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load("evaluate")
    monkeypatch.setattr(module, "load_run", mock.Mock(side_effect=AssertionError))
    words = ["--checkpoint", finished, "--data", known.folder]
    typed(monkeypatch, *words, "--json", tmp_path / "none" / "x")
    with pytest.raises(OSError, match="No such file"):
        module.main()


# launch/generate.py


def generated(finished: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[Any, ...]:
    """What `generate` is called with."""
    module, called = load("generate"), mock.Mock(return_value=iter(["one ", "two"]))
    monkeypatch.setattr(module, "generate", called)
    typed(monkeypatch, "--checkpoint", finished, "--device", "cpu", *words)
    module.main()
    called.assert_called_once()
    return called.call_args.args[2:] + tuple(called.call_args.kwargs.values())


def test_generates_defaults(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("read from there\n"))
    wanted = ("read from there\n", 256, Sampling(0.8, 0, 1.0), 0, False)
    assert generated(finished, monkeypatch) == wanted
    assert capsys.readouterr().out == "read from there\none two\n"


@pytest.mark.parametrize(
    ("words", "place", "value"),
    [
        (["--tokens", 7], 1, 7),
        (["--temperature", 0.5], 2, Sampling(temperature=0.5)),
        (["--temperature", 0], 2, Sampling(temperature=0)),
        (["--top-k", 5], 2, Sampling(top_k=5)),
        (["--top-p", 0.9], 2, Sampling(top_p=0.9)),
        (["--seed", 2**63 - 1], 3, 2**63 - 1),
        (["--ignore-eos"], 4, True),
    ],
)
def test_each_of_generates_options_reaches_its_place(
    finished: Path, monkeypatch: pytest.MonkeyPatch, words: list[object], place: int, value: object
) -> None:
    wanted: list[object] = ["x", 256, Sampling(0.8, 0, 1.0), 0, False]
    wanted[place] = value
    assert list(generated(finished, monkeypatch, "--prompt", "x", *words)) == wanted


def test_generate_writes_what_it_was_given_and_so_many_tokens(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn anew with the seed; likeliest tokens need none."""
    module = load("generate")

    def text(*words: object) -> str:
        typed(monkeypatch, "--checkpoint", finished, "--device", "cpu", "--ignore-eos", *words)
        module.main()
        said = capsys.readouterr().out
        assert said.startswith("ab") and said.endswith("\n")
        return said

    words = ["--prompt", "ab", "--tokens", 20]
    assert text(*words) == text(*words) != text(*words, "--seed", 1)
    greedy = [*words, "--temperature", 0]
    assert text(*greedy) == text(*greedy, "--seed", 1) == text(*words, "--top-k", 1)
    assert text(*greedy)[:-1].startswith(
        text("--prompt", "ab", "--tokens", 5, "--temperature", 0)[:-1]
    )


# launch/train.py


@pytest.fixture
def train() -> ModuleType:
    return load("train")


def test_words_win_over_the_file_and_the_file_over_the_card(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("train: {steps: 5, seed: 5}\nrun: {path: from-the-file}\n")
    seen: list[Settings] = []
    monkeypatch.setattr(train, "dry_run", lambda settings, job: seen.append(settings))
    typed(monkeypatch, "train.seed=7", "--dry-run", "--config", file, "log.every=9")
    monkeypatch.setattr(train, "StopRequest", mock.Mock())
    train.main()
    (settings,) = seen
    values = settings.train.steps, settings.train.seed, settings.log.every, settings.run.path
    assert values == (5, 7, 9, Path("from-the-file"))
    expected = Settings().with_values(
        **{"train.steps": 5, "train.seed": 7, "log.every": 9, "run.path": "from-the-file"}
    )
    assert settings == expected


@pytest.mark.parametrize(("ranks", "lanes"), [(1, 4), (6, 24)])
def test_a_dry_run_prints_what_the_run_would_decide(
    train: ModuleType, known: Known, capsys: pytest.CaptureFixture[str], ranks: int, lanes: int
) -> None:
    settings = Settings().with_values(
        **MODEL | {"model.vocab_size": "auto", "data.path": str(known.folder), "train.steps": 777}
    )
    job = Job(0, ranks, 0, ranks, 1, "127.0.0.1", 1, "python")
    train.dry_run(settings, job)
    said = capsys.readouterr().out
    shown = dict(r for r in cells(said) if len(r) == 2)
    assert shown["train.lanes"] == str(lanes)
    assert shown["optimizer.decay_steps"] == "777"
    assert shown["model.vocab_size"] == "271"
    assert f"tokens_per_step={lanes * 2 * CHUNK} ({lanes} lanes x 1 windows" in said
    train.dry_run(settings, Job(1, 2, 1, 2, 1, "127.0.0.1", 1, "python"))
    assert capsys.readouterr().out == "", "the first rank alone speaks"


@pytest.mark.parametrize("words", [[], ["--fresh"], ["--deepspeed", "other.json"]])
def test_train_starts_as_it_is_told(
    train: ModuleType, known: Known, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(train, "StopRequest", mock.Mock())
    read = mock.Mock(return_value={"the": "engine"})
    monkeypatch.setattr(train.setup, "read_engine_config", read)
    resolved = mock.Mock(side_effect=UserError("far enough"))
    monkeypatch.setattr(train, "resolve", resolved)
    values = MODEL | {"data.path": known.folder}
    typed(monkeypatch, *words, *(f"{name}={value}" for name, value in values.items()))
    with pytest.raises(UserError, match="far enough"):
        train.main()
    settings, engine_config, corpus, ranks, fresh = resolved.call_args.args
    assert settings.data.path == known.folder and corpus.train.folder == known.folder / "train"
    assert (engine_config, ranks, fresh) == ({"the": "engine"}, 1, "--fresh" in words)
    (path,) = read.call_args.args
    given = "other.json" in words
    assert path == (Path("other.json") if given else ROOT / "configs" / "zero2.json")


@pytest.mark.parametrize("done", [True, False])
def test_train_ends_as_it_went(
    train: ModuleType,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    done: bool,
) -> None:
    """Done: recorded as finished. Asked to stop: as killed, and with the status of a requeue."""
    stop, left = mock.Mock(), mock.Mock()
    stop.return_value.exit_to_requeue.side_effect = SystemExit(75)
    tracker = mock.Mock(**{"where.return_value": ["mlflow ui", "http://there"]})
    trainer = SimpleNamespace(
        log=mock.Mock(tracker=tracker), fit=lambda: done, progress=SimpleNamespace(step=12)
    )
    monkeypatch.setattr(train, "StopRequest", stop)
    monkeypatch.setattr(train, "build", lambda *_: trainer)
    monkeypatch.setattr(train.collectives, "leave_group", left)
    typed(
        monkeypatch, f"data.path={known.folder}", f"model.chunk_length={CHUNK}", "model.latents=2"
    )
    if done:
        train.main()
    else:
        with pytest.raises(SystemExit):
            train.main()
    trainer.log.tracker.finish.assert_called_once_with("FINISHED" if done else "KILLED")
    said = capsys.readouterr().out
    assert ("stopped on request at step 12: run the same command to continue" in said) == (not done)
    charts = "done: runs/i3-4096ctx\ncharts    mlflow ui\n          http://there\n"
    assert (charts in said) == done
    assert left.called == done and stop.return_value.exit_to_requeue.called != done


@dataclass
class Built:
    """What `build` puts together, with stand-ins for all that is heavy."""

    model: mock.Mock
    trainer: mock.Mock
    recorded: mock.Mock
    seed: int


def build(
    train: ModuleType,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    rank: int = 0,
    checkpoint: Path | None = None,
    **changes: Any,
) -> Built:
    """Build a trainer of two ranks, which continues from `checkpoint`."""
    settings = Settings().with_values(**MODEL | {"train.lanes": 8} | changes)
    corpus = train.Corpus.open(known.folder, settings.model)
    start = train.Start(settings, checkpoint, mock.Mock() if checkpoint else None)
    built = Built(mock.Mock(), mock.Mock(), mock.Mock(return_value=mock.Mock()), -1)

    def model(*_: object) -> mock.Mock:
        built.seed = torch.initial_seed()
        return built.model

    for name, stand_in in {
        "resolve": lambda *_: start,
        "agree": mock.Mock(),
        "verify_checkpoint": lambda start, job: start,
        "I3LM": model,
        "build_trainer": mock.Mock(return_value=built.trainer),
        "begin_record": built.recorded,
    }.items():
        monkeypatch.setattr(train, name, stand_in)
    for name in ("read_engine_config", "start", "build"):
        monkeypatch.setattr(train.setup, name, mock.Mock())
    for name in ("share_threads", "keep_freed_memory"):
        monkeypatch.setattr(train.host, name, mock.Mock())
    arguments = SimpleNamespace(deepspeed=Path("x"), fresh=False, verbose=False)
    job = Job(rank, 2, rank, 2, 1, "127.0.0.1", 1, "python")
    assert train.build(arguments, settings, job, corpus, mock.Mock()) is built.trainer
    return built


@pytest.mark.parametrize("seed", [0, 5])
def test_the_first_weights_are_of_the_runs_seed(
    train: ModuleType, known: Known, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    torch.manual_seed(999)
    assert build(train, known, monkeypatch, **{"train.seed": seed}).seed == seed


@pytest.mark.parametrize(
    ("chosen", "gpu", "compiled"),
    [
        (True, False, True),
        (True, True, True),
        (False, True, False),
        ("auto", True, True),
        ("auto", False, False),
    ],
)
def test_blocks_are_compiled_as_chosen(
    train: ModuleType,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    chosen: bool | str,
    gpu: bool,
    compiled: bool,
) -> None:
    monkeypatch.setattr(train.devices, "uses_cuda", lambda: gpu)
    built = build(train, known, monkeypatch, **{"train.compile": chosen})
    assert built.model.compile_blocks.called == compiled


def test_the_first_rank_alone_keeps_the_record(
    train: ModuleType, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings().with_values(**MODEL | {"train.lanes": 8, "train.schedule": 2})
    corpus = train.Corpus.open(known.folder, settings.model)
    kept = {name: mock.Mock() for name in ("lay_out", "print_overview")}
    for name, stand_in in kept.items():
        monkeypatch.setattr(train, name, stand_in)
    started = mock.Mock(**{"return_value.where.return_value": []})
    monkeypatch.setattr(train.tracking, "start", started)
    for rank in (1, 0):
        job = Job(rank, 2, rank, 2, 1, "127.0.0.1", 1, "python")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(train.collectives, "gather_objects", lambda mine, _=None: [mine])
        tracker = train.begin_record(train.Start(settings), job, corpus)
        assert (tracker is started.return_value) == (rank == 0)
        for used in (*kept.values(), started):
            assert used.called == (rank == 0)


def test_a_run_is_resumed_from_its_checkpoint_and_else_from_none(
    train: ModuleType, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not build(train, known, monkeypatch).trainer.checkpointer.restore.called
    built = build(train, known, monkeypatch, checkpoint=Path("step-00000003"))
    assert built.trainer.checkpointer.restore.call_args.args[0] == Path("step-00000003")


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("continues", [False, True])
def test_a_run_says_what_it_is_before_it_begins(
    train: ModuleType,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    continues: bool,
    verbose: bool,
) -> None:
    """A new record and a note on an early history are for new runs; tables for who asks."""
    monkeypatch.setattr(train, "lay_out", mock.Mock())
    opened = mock.Mock(**{"return_value.where.return_value": ["http://there"]})
    monkeypatch.setattr(train.tracking, "start", opened)
    long = {"train.lanes": 4, "train.steps": 10**7, "run.path": "somewhere"}
    settings = Settings().with_values(**MODEL | long)
    corpus = train.Corpus.open(known.folder, settings.model)
    start = train.Start(settings, Path("step-00000003") if continues else None)
    job = Job(0, 1, 0, 1, 1, "127.0.0.1", 1, "python")
    tracker = train.begin_record(start, job, corpus, verbose)
    said = capsys.readouterr().out
    assert ("note: history begins" in said) == (not continues)
    assert f"batch     {4 * 2 * CHUNK} tokens: " in said
    assert (f"tokens_per_step={4 * 2 * CHUNK} " in said) == verbose
    if not verbose:
        assert len(said.splitlines()) <= 10 and max(map(len, said.splitlines()[:7])) <= 80
    assert said.endswith("charts    http://there\n")
    train.lay_out.assert_called_once_with(start, corpus)
    assert opened.call_args.args[0] == settings
    assert opened.call_args.kwargs["fresh"] == (not continues)
    assert opened.call_args.args[1].tags["data_fingerprint"] == corpus.fingerprint
    kept = [call.args[0] for call in tracker.artifact.call_args_list]
    assert kept == [Path("somewhere/settings.yaml"), Path("somewhere/tokenizer.json")]


# launch/ledger.py


def ledger_of(folder: Path, losses: list[float]) -> Path:
    """A run's ledger with these losses."""
    folder.mkdir()
    entries = [
        {"step": n, "samples": f"s{n}", "lanes": f"l{n}", "loss": loss, "gradient_norm": 1.0}
        for n, loss in enumerate(losses, start=1)
    ]
    lines = [
        json.dumps(entry | {"skipped": "spike" if entry["step"] == 2 else None})
        for entry in entries
    ]
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def ledgers(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Of two runs whose second steps differ by 1%."""
    yield ledger_of(tmp_path / "one", [4.0, 2.0]), ledger_of(tmp_path / "other", [4.0, 2.02])


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "step 2 differs in loss"), (["--tolerance", "0.005"], "step 2 differs in loss")],
)
def test_ledger_compares_to_the_tolerance(
    ledgers: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    module = load("ledger")
    typed(monkeypatch, *ledgers, *words)
    with pytest.raises(UserError, match=says):
        module.main()
    assert capsys.readouterr().out == f"{ledgers[0]}: unbroken, 2 steps, 1 skipped\n"
    typed(monkeypatch, *ledgers, "--tolerance", "0.02")
    module.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"{ledgers[1]}: the same steps"
