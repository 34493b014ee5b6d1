"""`i3dist train`: what it does with its arguments, builds, says at the start and ends with."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from i3dist.config import Settings
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.programs.train import main
from i3dist.tracking.metrics_log import read_lines
from i3dist.tracking.mlflow_store import FinalModel
from i3dist.training import record, run
from i3dist.training.preflight import read_input
from tests.conftest import ROOT
from tests.known import CHUNK, Known
from tests.launch.conftest import MODEL, cells, typed


@pytest.fixture
def train() -> ModuleType:
    """What a rank does with its arguments, and `main` that reads them."""
    return run


def test_words_win_over_the_file_and_the_file_over_the_card(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("train: {steps: 5, seed: 5}\nrun: {path: from-the-file}\n")
    seen: list[Settings] = []
    monkeypatch.setattr(train, "dry_run", lambda settings, *_: seen.append(settings))
    typed(monkeypatch, "train.seed=7", "--dry-run", "--config", file, "log.every=9")
    monkeypatch.setattr(train, "StopRequest", mock.Mock())
    main()
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
    job = Job(0, ranks, 0, ranks, "127.0.0.1", 1, "python")
    train.dry_run(settings, job)
    said = capsys.readouterr().out
    shown = dict(r for r in cells(said) if len(r) == 2)
    assert shown["train.lanes"] == str(lanes)
    assert shown["optimizer.decay_steps"] == "777"
    assert shown["model.vocab_size"] == "271"
    assert f"tokens_per_step={lanes * 2 * CHUNK} ({lanes} lanes x 1 windows" in said
    train.dry_run(settings, Job(1, 2, 1, 2, "127.0.0.1", 1, "python"))
    assert capsys.readouterr().out == "", "the first rank alone speaks"


def test_a_dry_run_looks_ahead_at_a_run_that_continues(
    train: ModuleType, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreseen = mock.Mock(side_effect=UserError("far enough"))
    monkeypatch.setattr(train, "foresee", foreseen)
    monkeypatch.setattr(train, "StopRequest", mock.Mock())
    typed(
        monkeypatch,
        "--dry-run",
        "--fresh",
        f"data.path={known.folder}",
        *(f"{name}={value}" for name, value in MODEL.items()),
    )
    with pytest.raises(UserError, match="far enough"):
        main()
    _, corpus, *others = foreseen.call_args.args
    assert corpus.train.folder == known.folder / "train" and others == [1, True]


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
        main()
    settings, engine_config, corpus, ranks, fresh = resolved.call_args.args
    assert settings.data.path == known.folder and corpus.train.folder == known.folder / "train"
    assert (engine_config, ranks, fresh) == ({"the": "engine"}, 1, "--fresh" in words)
    (path,) = read.call_args.args
    wanted = Path("other.json") if "other.json" in words else ROOT / "configs" / "zero2.json"
    assert path.resolve() == wanted.resolve()


def test_a_job_that_has_started_in_vain_too_often_stops_before_it_looks_at_data(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They may be what hung before; and what follows the error is not watched."""
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    watchdogs, watch = [], train.watch_start
    observed = lambda *given: watchdogs.append(watch(*given)) or watchdogs[0]  # noqa: E731
    monkeypatch.setattr(train, "watch_start", observed)
    monkeypatch.setattr(train, "StopRequest", mock.Mock())
    monkeypatch.setattr(train.Corpus, "open", mock.Mock(side_effect=AssertionError))
    typed(monkeypatch, "data.path=nowhere", f"run.path={tmp_path}")
    with pytest.raises(UserError, match=r"^job 77: 3 starts in a row"):
        main()
    assert watchdogs[0]._closed.is_set()
    settings = Settings().with_values(**{"run.path": str(tmp_path)})
    arguments = SimpleNamespace(deepspeed=Path("x"), fresh=False)
    assert read_input(arguments, settings, Job.detect({})).fault.startswith("job 77: 3 starts")


@pytest.mark.parametrize(("done", "fails"), [(True, False), (True, True), (False, False)])
def test_train_ends_as_it_went(
    train: ModuleType,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    done: bool,
    fails: bool,
) -> None:
    """Done: recorded as finished, and the model is logged; if that fails, it changes nothing.
    Asked to stop: recorded as killed, and ends with the status of a requeue."""
    stop, left = mock.Mock(), mock.Mock()
    stop.return_value.exit.side_effect = SystemExit(75)
    tracker = mock.Mock(**{"where.return_value": ["mlflow ui", "http://there"]})
    tracker.log_model.side_effect = OSError("no room") if fails else None
    settings = Settings().with_values(**{"tracking.registered_model": "mine"})
    trainer = SimpleNamespace(
        log=mock.Mock(tracker=tracker),
        fit=lambda: done,
        orders=SimpleNamespace(stop=False),
        progress=SimpleNamespace(step=12),
        settings=settings,
    )
    monkeypatch.setattr(train, "StopRequest", stop)
    monkeypatch.setattr(train, "settle", lambda *_: (train.Start(settings), {}))
    monkeypatch.setattr(train, "build", lambda *_: trainer)
    monkeypatch.setattr(train.collectives, "leave_group", left)
    typed(
        monkeypatch, f"data.path={known.folder}", f"model.chunk_length={CHUNK}", "model.latents=2"
    )
    if done:
        main()
    else:
        with pytest.raises(SystemExit):
            main()
    trainer.log.tracker.finish.assert_called_once_with("FINISHED" if done else "KILLED")
    said = capsys.readouterr().out
    assert ("stopped on request at step 12: run the same command to continue" in said) == (not done)
    charts = "done: runs/i3-4096ctx\ncharts    mlflow ui\n          http://there\n"
    assert (charts in said) == done
    assert left.called == done and stop.return_value.exit.call_args_list == [((75,),)] * (not done)
    logged = [call.args[0] for call in tracker.log_model.call_args_list]
    assert logged == [FinalModel(settings.run.path, 12, "mine")] * done
    assert ("warning: tracking: no room" in said) == fails


def test_a_model_is_logged_unless_the_user_does_not_want_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other ranks wait meanwhile, so it takes half of the time after which they give up."""
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "3")
    stop = SimpleNamespace(reason=None)
    for wanted in (True, False):
        trainer = mock.Mock(settings=Settings().with_values(**{"tracking.log_model": wanted}))
        record.log_model(trainer, stop)
        assert trainer.log.tracker.log_model.called == wanted
        if wanted:
            _, patience, gives_up = trainer.log.tracker.log_model.call_args.args
            assert patience == 90 and not gives_up()
            stop.reason = "SIGTERM"
            assert gives_up()


@dataclass
class Built:
    """What `build` puts together, with stand-ins for all that is heavy."""

    model: mock.Mock
    trainer: mock.Mock
    recorded: mock.Mock
    sampled: float = 0.0  # a weight; 0 if it was not initialized


def first_weight() -> float:
    return torch.nn.init.normal_(torch.nn.Parameter(torch.zeros(1))).item()


def build(
    train: ModuleType,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    rank: int = 0,
    checkpoint: Path | None = None,
    **changes: Any,
) -> Built:
    """Build a trainer of two ranks, which continues from `checkpoint`."""
    monkeypatch.setattr(train.compiled, "_folder", None)  # whatever is set is forgotten
    settings = Settings().with_values(**MODEL | {"train.lanes": 8} | changes)
    corpus = train.Corpus.open(known.folder, settings.model)
    start = train.Start(settings, checkpoint, mock.Mock() if checkpoint else None)
    built = Built(mock.Mock(), mock.Mock(), mock.Mock(return_value=mock.Mock()))
    built.model.to.return_value = built.model

    def model(*_: object) -> mock.Mock:
        built.sampled = built.sampled or first_weight()
        return built.model

    for name, stand_in in {
        "resolve": lambda *_: start,
        "agree": mock.Mock(),
        "verify_checkpoint": lambda start, job: lambda: start,
        "I3LM": model,
        "Trainer": mock.Mock(return_value=built.trainer),
        "begin_record": built.recorded,
    }.items():
        monkeypatch.setattr(train, name, stand_in)
    for name in ("read_engine_config", "start", "build"):
        monkeypatch.setattr(train.setup, name, mock.Mock())
    monkeypatch.setattr(train.devices, "device", lambda _: torch.device("cpu"))
    for name in ("share_threads", "keep_freed_memory"):
        monkeypatch.setattr(train.host, name, mock.Mock())
    job = Job(rank, 2, rank, 2, "127.0.0.1", 1, "python")
    start, config = train.settle(Path("x"), settings, job, corpus, fresh=False)
    made = train.build(start, config, job, corpus, *(mock.Mock() for _ in range(3)))
    assert made is built.trainer
    return built


@pytest.mark.parametrize("seed", [0, 5])
def test_the_first_weights_are_of_the_runs_seed(
    train: ModuleType, known: Known, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    torch.manual_seed(seed)
    wanted = first_weight()
    torch.manual_seed(999)
    assert build(train, known, monkeypatch, **{"train.seed": seed}).sampled == wanted


@pytest.mark.parametrize(
    ("continues", "extensions", "initialized"),
    [(True, [], False), (True, [Path("layer.py")], True), (False, [], True)],
)
def test_weights_that_a_checkpoint_replaces_are_not_initialized(
    train: ModuleType,
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    continues: bool,
    extensions: list[Path],
    initialized: bool,
) -> None:
    """But extensions sample theirs again, also what no checkpoint holds."""
    monkeypatch.setattr(train, "LOADED", extensions)
    built = build(train, known, monkeypatch, checkpoint=tmp_path if continues else None)
    assert (built.sampled != 0) == initialized


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
    train: ModuleType, known: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"train.lanes": 8, "train.schedule": 2, "run.path": str(tmp_path)}
    settings = Settings().with_values(**MODEL | changes)
    corpus = train.Corpus.open(known.folder, settings.model)
    kept = {name: mock.Mock() for name in ("lay_out", "print_overview")}
    for name, stand_in in kept.items():
        monkeypatch.setattr(record, name, stand_in)
    started = mock.Mock(**{"return_value.where.return_value": []})
    monkeypatch.setattr(record.tracking, "start", started)
    for rank in (1, 0):
        job = Job(rank, 2, rank, 2, "127.0.0.1", 1, "python")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(train.collectives, "gather_objects", lambda mine, _=None: [mine])
        tracker = record.begin_record(train.Start(settings), job, corpus)
        assert (tracker is started.return_value) == (rank == 0)
        for used in (*kept.values(), started):
            assert used.called == (rank == 0)
        assert (tmp_path / "starts.jsonl").exists() == (rank == 0)


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
    tmp_path: Path,
    continues: bool,
    verbose: bool,
) -> None:
    """A new record and a note on idle lanes are for new runs; tables for who asks."""
    monkeypatch.chdir(tmp_path)
    folder = Path("somewhere")
    monkeypatch.setattr(record, "lay_out", mock.Mock(side_effect=lambda *_: folder.mkdir()))
    opened = mock.Mock(**{"return_value.where.return_value": ["http://there"]})
    monkeypatch.setattr(record.tracking, "start", opened)
    corpus = train.Corpus.open(known.folder, Settings().with_values(**MODEL).model)
    lanes = len(corpus.train.manifest.shards) + 1
    long = {"train.lanes": lanes, "train.steps": 10**7, "run.path": "somewhere"}
    settings = Settings().with_values(**MODEL | long | {"train.schedule": 2})
    start = train.Start(settings, Path("step-00000003") if continues else None)
    job = Job(0, 1, 0, 1, "127.0.0.1", 1, "python")
    tracker = record.begin_record(start, job, corpus, verbose)
    said = capsys.readouterr().out
    assert (f"warning: {lanes} lanes but" in said) == (not continues)
    assert said.count("warning:") + said.count("note:") == (0 if continues else 1)
    assert f"batch     {lanes * 2 * CHUNK} tokens: " in said
    assert (f"tokens_per_step={lanes * 2 * CHUNK} " in said) == verbose
    if not verbose:
        assert len(said.splitlines()) <= 10 and max(map(len, said.splitlines()[:7])) <= 80
    assert said.endswith("charts    http://there\n")
    record.lay_out.assert_called_once_with(start, corpus)
    assert opened.call_args.args[0] == settings
    assert opened.call_args.kwargs["fresh"] == (not continues)
    assert opened.call_args.args[1].tags["data_fingerprint"] == corpus.fingerprint
    kept = [call.args[0] for call in tracker.artifact.call_args_list]
    assert kept == [folder / "settings.yaml", folder / "tokenizer.json"]
    (line,) = read_lines(folder / "starts.jsonl")
    assert line["data_fingerprint"] == corpus.fingerprint
