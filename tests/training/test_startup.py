"""How a run starts: what it decides, what it continues from, and what it refuses."""

import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from i3dist.checkpoint import verify
from i3dist.checkpoint.format import CheckpointManifest, FileDigest, RunState
from i3dist.cli.former_settings import FORMER_LAYERS
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.distributed import collectives
from i3dist.distributed.attempt import UNNAMED, Attempt
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.tracking.metrics_log import STARTS, MetricsLog
from i3dist.training import run
from i3dist.training.micro_batch import check_micro_batch
from i3dist.training.run_folder import lay_out, set_aside
from i3dist.training.startup import (
    Start,
    agree,
    check_progress,
    decide,
    foresee,
    resolve,
    starts_over,
    verify_checkpoint,
)
from tests.known import CHUNK, Known, documents, make

MODEL = {"model.chunk_length": CHUNK, "model.latents": 2}
ENGINE = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "zero_optimization": {"stage": 2},
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make(tmp_path_factory.mktemp("known") / "data", documents(0, 6), documents(1, 4))


@pytest.fixture(scope="module")
def corpus(known: Known) -> Corpus:
    return Corpus.open(known.folder, Settings().with_values(**MODEL).model)


@pytest.fixture
def typed(known: Known, tmp_path: Path) -> Settings:
    """What the user types, the same at each start."""
    places = {"run.path": str(tmp_path / "run"), "data.path": str(known.folder)}
    return Settings().with_values(**MODEL | places)


def checkpoint(settings: Settings, corpus: Corpus, step: int, **changes: Any) -> Path:
    """A checkpoint as far as it is looked at before anything is read."""
    state = RunState(
        step=step,
        windows=step,
        tokens_seen=1,
        settings=settings.to_dict(),
        data=corpus.fingerprint,
        engine={k: v for k, v in ENGINE.items() if k != "zero_optimization"},
    ).model_copy(update=changes)
    folder = settings.run.path / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    data = state.model_dump_json().encode()
    (folder / "state.json").write_bytes(data)
    digest = FileDigest(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    listed = CheckpointManifest(files={"state.json": digest})
    (folder / "manifest.json").write_text(listed.model_dump_json())
    (folder.parent / "latest").write_text(folder.name)
    return folder


@pytest.mark.parametrize(("ranks", "lanes"), [(1, 4), (2, 8), (16, 64)])
def test_a_run_decides_what_is_left_to_it_and_nothing_else(ranks: int, lanes: int) -> None:
    settings = Settings().with_values(**{"train.steps": 123})
    decided = decide(settings, ranks, 4096)
    wanted = {"train.lanes": lanes, "optimizer.decay_steps": 123, "model.vocab_size": 4096}
    wanted |= {"train.schedule": 2, "compression.join_after": 4000, "compression.join_steps": 2000}
    assert decided == settings.with_values(**wanted)
    typed = {"train.lanes": 6, "optimizer.decay_steps": 500, "model.vocab_size": 300}
    typed |= {"train.schedule": 1, "compression.join_after": "never", "compression.join_steps": 3}
    assert decide(settings.with_values(**typed), ranks, 4096) == settings.with_values(**typed)


def test_an_empty_folder_starts_at_step_0(typed: Settings, corpus: Corpus) -> None:
    start = resolve(typed, ENGINE, corpus, 2, fresh=False)
    assert start == Start(decide(typed, 2, corpus.tokenizer.vocab_size))
    assert foresee(typed, corpus, 2, fresh=False) == start.settings


def test_the_same_words_continue_with_what_was_decided(typed: Settings, corpus: Corpus) -> None:
    """On another number of ranks, and for more steps: lanes and the curve's length stay."""
    folder = checkpoint(decide(typed, 2, corpus.tokenizer.vocab_size), corpus, 7)
    longer = typed.with_values(**{"train.steps": 30_000})
    start = resolve(longer, ENGINE, corpus, 8, fresh=False)
    assert start.checkpoint == folder and start.state is not None and start.state.step == 7
    wanted = {"train.lanes": 8, "optimizer.decay_steps": 20_000, "model.vocab_size": 271}
    wanted |= {"train.schedule": 2, "compression.join_after": 4000, "compression.join_steps": 2000}
    assert start.settings == longer.with_values(**wanted)
    assert foresee(longer, corpus, 8, fresh=False) == start.settings
    assert foresee(longer, None, 8, fresh=False) == start.settings
    assert foresee(longer, corpus, 8, fresh=True) == decide(longer, 8, 271)


def test_a_run_of_the_former_default_goes_on_or_says_what_to_type(
    known: Known, corpus: Corpus, tmp_path: Path
) -> None:
    """The same command continues it. A file that has today's stack in it is refused in one line,
    and the word that the line advises continues the run."""
    words = [f"{k}={v}" for k, v in MODEL.items()]
    words += [f"run.path={tmp_path / 'run'}", f"data.path={known.folder}"]
    today = Settings().model.layers
    new = resolve(Settings.load(None, words), ENGINE, corpus, 2, fresh=False)
    assert new.checkpoint is None and new.settings.model.layers == today
    saved = new.settings.with_values(**{"model.layers": FORMER_LAYERS})
    folder = checkpoint(saved, corpus, 7)
    start = resolve(Settings.load(None, words), ENGINE, corpus, 2, fresh=False)
    assert start.checkpoint == folder and start.settings == saved

    (tmp_path / "my.yaml").write_text(f"model: {{layers: '{today}'}}")
    with pytest.raises(UserError, match=f"is {today} but the saved run has") as refused:
        resolve(Settings.load(tmp_path / "my.yaml", words), ENGINE, corpus, 2, fresh=False)
    word = str(refused.value).partition("; type ")[2].partition(" to continue it")[0]
    assert word == f"model.layers={FORMER_LAYERS}"
    again = Settings.load(tmp_path / "my.yaml", [*words, word])
    assert resolve(again, ENGINE, corpus, 2, fresh=False) == start


def test_a_run_that_has_ended_may_get_another_curve(typed: Settings, corpus: Corpus) -> None:
    ended = typed.with_values(**{"train.steps": 150})
    checkpoint(decide(ended, 2, corpus.tokenizer.vocab_size), corpus, 150)
    longer = typed.with_values(**{"train.steps": 400, "optimizer.decay_steps": 400})
    start = resolve(longer, ENGINE, corpus, 2, fresh=False)
    assert start.settings.optimizer.decay_steps == 400 and start.checkpoint is not None
    with pytest.raises(UserError, match=r"should be more than optimizer\.warmup_steps=100"):
        short = longer.with_values(**{"optimizer.decay_steps": 100})
        resolve(short, ENGINE, corpus, 2, fresh=False)


def test_one_that_has_not_ended_keeps_its_curve(typed: Settings, corpus: Corpus) -> None:
    ended = typed.with_values(**{"train.steps": 150})
    checkpoint(decide(ended, 2, corpus.tokenizer.vocab_size), corpus, 149)
    longer = typed.with_values(**{"train.steps": 400, "optimizer.decay_steps": 400})
    with pytest.raises(UserError, match="decay_steps is 400 but the saved run has 150"):
        resolve(longer, ENGINE, corpus, 2, fresh=False)


def test_fresh_looks_at_nothing_that_is_there(typed: Settings, corpus: Corpus) -> None:
    checkpoint(decide(typed, 2, 999), corpus, 7, data="other")
    start = resolve(typed, ENGINE, corpus, 1, fresh=True)
    assert start == Start(decide(typed, 1, corpus.tokenizer.vocab_size))


def record(run: Path, step: int, attempt: Attempt) -> None:
    """Note a start as a run does."""
    run.mkdir(exist_ok=True)
    facts = {"job": attempt.job, "restarts": attempt.restarts}
    MetricsLog(run / STARTS).append(step, facts)


def test_fresh_counts_until_the_job_has_begun_its_run(tmp_path: Path) -> None:
    """Neither another job nor one without restarts forgets that it was typed."""
    run = tmp_path / "run"
    first, again = Attempt("77"), Attempt("77", 1)
    record(run, 500, Attempt("76", 2))
    assert starts_over(True, run, first) and starts_over(True, run, again)
    record(run, 0, first)
    assert not starts_over(True, run, again) and not starts_over(False, run, first)
    assert starts_over(True, run, Attempt("77")) and starts_over(True, run, Attempt("78", 1))
    assert starts_over(True, run, Attempt())


def test_an_earlier_job_without_a_name_is_another_one(tmp_path: Path) -> None:
    """Of two such jobs in one folder, the second has three starts of its own."""
    settings = Settings().with_values(**{"run.path": str(tmp_path), "guard.requeues": 3})
    for step, restarts in ((0, 0), (5, 1), (9, 2)):
        record(tmp_path, step, Attempt(UNNAMED, restarts))
    assert starts_over(True, tmp_path, Attempt(UNNAMED, 1)), "it has not begun its run"
    record(tmp_path, 9, Attempt(UNNAMED, 1))
    check_progress(settings, 10, Attempt(UNNAMED, 4))  # two since then died at once
    with pytest.raises(UserError, match=r"^this job: 3 starts"):
        check_progress(settings, 10, Attempt(UNNAMED, 5))


@example(saves=[False] * 4, dies=[True] * 4, most=3, begun=False)
@given(
    saves=st.lists(st.booleans(), min_size=1, max_size=12),
    dies=st.lists(st.booleans(), min_size=12, max_size=12),
    most=st.integers(0, 4),
    begun=st.booleans(),
)
def test_a_job_stops_after_so_many_starts_without_a_new_checkpoint(
    saves: list[bool], dies: list[bool], most: int, begun: bool
) -> None:
    """Whoever starts it again; some attempts die before they have noted their start."""
    with TemporaryDirectory() as folder:
        run, step, fruitless = Path(folder), 0, 0
        if begun:  # by another job
            step = 9
            record(run, 0, Attempt("76"))
        values = {"run.path": folder, "guard.requeues": most}
        settings = Settings().with_values(**values)
        for restarts, saved in enumerate(saves):
            attempt = Attempt("77", restarts)
            if 0 < most <= fruitless:
                with pytest.raises(
                    UserError, match=rf"^job 77.*: {fruitless} starts .*step {step}"
                ):
                    check_progress(settings, step, attempt)
                return
            check_progress(settings, step, attempt)
            if saved or not dies[restarts]:
                record(run, step, attempt)
            step, fruitless = (step + 1, 0) if saved else (step, fruitless + 1)


@pytest.mark.parametrize(
    ("words", "changes", "engine", "says"),
    [
        ({"train.seed": 1}, {}, {}, "train.seed is 1 but the saved run has 0"),
        ({"train.lanes": 16}, {}, {}, "train.lanes is 16 but the saved run has 8"),
        ({}, {"data": "0" * 64}, {}, "trained on other data"),
        ({}, {}, {"bf16": {"enabled": False}}, "other engine settings"),
        ({}, {}, {"communication_data_type": "bf16"}, "other engine settings"),
        ({}, {}, {"data_types": {}}, "other engine settings"),
        ({"train.steps": 6}, {}, {}, "beyond train.steps=6: the run has taken 7 steps"),
    ],
)
def test_what_is_of_another_run_is_refused_with_two_ways_out(
    typed: Settings,
    corpus: Corpus,
    words: dict[str, Any],
    changes: dict[str, Any],
    engine: dict[str, Any],
    says: str,
) -> None:
    folder = checkpoint(decide(typed, 2, corpus.tokenizer.vocab_size), corpus, 7, **changes)
    with pytest.raises(UserError) as error:
        resolve(typed.with_values(**words), ENGINE | engine, corpus, 2, fresh=False)
    line = str(error.value)
    assert says in line and str(folder) in line
    assert "another run.path" in line and "--fresh" in line


def test_engine_matters_that_decide_no_number_may_change(typed: Settings, corpus: Corpus) -> None:
    checkpoint(decide(typed, 2, corpus.tokenizer.vocab_size), corpus, 7)
    other = ENGINE | {"zero_optimization": {"stage": 2, "reduce_bucket_size": 9}}
    assert resolve(typed, other, corpus, 2, fresh=False).checkpoint is not None


def test_the_last_step_may_be_the_checkpoints_own(typed: Settings, corpus: Corpus) -> None:
    checkpoint(decide(typed, 2, corpus.tokenizer.vocab_size), corpus, 7)
    start = resolve(typed.with_values(**{"train.steps": 7}), ENGINE, corpus, 2, fresh=False)
    assert start.state is not None and start.state.step == 7


@pytest.mark.parametrize("differs", ["nothing", "settings", "step"])
def test_ranks_that_see_other_folders_do_not_start(
    typed: Settings, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, differs: str
) -> None:
    state = RunState(step=7, windows=7, tokens_seen=1, settings={}, data="", engine={})
    start = Start(typed, Path("x"), state)
    theirs = {
        "nothing": (7, typed.to_yaml()),
        "settings": (7, typed.with_values(**{"train.seed": 1}).to_yaml()),
        "step": (0, typed.to_yaml()),
    }
    monkeypatch.setattr(collectives, "gather_objects", lambda mine: [mine, mine, theirs[differs]])
    if differs == "nothing":
        agree(start)
        return
    with pytest.raises(UserError, match="not the same folder on every host"):
        agree(start)


def test_an_earlier_run_takes_the_first_free_number(tmp_path: Path) -> None:
    for number, name in enumerate(("run", "run", "run")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(str(number))
        set_aside(tmp_path / name)
    found = {path.name: (path / "which").read_text() for path in tmp_path.iterdir()}
    assert found == {"run.1": "0", "run.2": "1", "run.3": "2"}


@pytest.mark.parametrize("there", ["nothing", "a killed run", "a checkpoint"])
def test_a_run_from_step_0_begins_in_an_empty_folder(
    typed: Settings, corpus: Corpus, there: str
) -> None:
    """One that continues keeps what is there; either writes its own settings and tokenizer."""
    folder = typed.run.path
    settings = decide(typed, 1, corpus.tokenizer.vocab_size)
    if there != "nothing":
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "settings.yaml").write_text("earlier")
        (folder / "metrics.jsonl").write_text("earlier\n")
        (folder / "checkpoints" / ".step-00000009.partial").mkdir()
    continues = there == "a checkpoint"
    start = Start(settings, checkpoint(settings, corpus, 7) if continues else None)
    lay_out(start, corpus)
    assert Settings.load(folder / "settings.yaml") == settings
    assert (folder / "tokenizer.json").read_bytes() == corpus.tokenizer.data
    assert (folder / "metrics.jsonl").exists() == continues
    aside = folder.with_name("run.1")
    assert aside.exists() == (there == "a killed run")
    if aside.exists():
        assert (aside / "metrics.jsonl").read_text() == "earlier\n"
    assert not list(folder.glob("checkpoints/.*")), "nothing half done is left"


def test_lanes_are_shared_by_ranks_and_micro_batches(typed: Settings) -> None:
    job = Job(0, 2, 0, 2, "127.0.0.1", 1, "python")
    for rows, fits in (
        (1, True),
        (2, True),
        (3, True),
        (6, True),
        (4, False),
        (5, False),
        (12, False),
    ):
        settings = typed.with_values(**{"train.lanes": 12, "train.micro_batch": rows})
        if fits:
            check_micro_batch(settings, job)
            continue
        with pytest.raises(UserError, match=rf"={rows} does not divide the 6 .* 1, 2, 3, 6, auto"):
            check_micro_batch(settings, job)
    check_micro_batch(typed.with_values(**{"train.lanes": 12}), job)
    with pytest.raises(UserError, match=r"train\.lanes=5 cannot be shared by 2 ranks"):
        check_micro_batch(typed.with_values(**{"train.lanes": 5}), job)


def test_settings_in_a_checkpoint_are_plain(typed: Settings, corpus: Corpus) -> None:
    """Whoever reads state.json finds the names that users type."""
    settings = decide(typed, 2, corpus.tokenizer.vocab_size)
    folder = checkpoint(settings, corpus, 7)
    written = json.loads((folder / "state.json").read_text())["settings"]
    assert written["validate"]["chunks"] == 1024 and written["train"]["lanes"] == 8
    assert Settings.build(written) == settings


def test_a_checkpoint_is_read_while_the_caller_goes_on(
    typed: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be done there is raised where the result is wanted."""
    going_on = threading.Event()

    def hash_slowly(path: Path, job: Job) -> str | None:
        assert going_on.wait(10)
        if path.name == "none":
            raise PermissionError
        return None

    monkeypatch.setattr(verify, "fault_of_share", hash_slowly)
    starts = [Start(typed, Path(name)) for name in ("whole", "none")]
    whole, none = (verify_checkpoint(start, Job.detect({})) for start in starts)
    going_on.set()
    assert whole() is starts[0]
    with pytest.raises(PermissionError):
        none()


def test_first_weights_are_initialized_aside_and_are_those_of_the_seed(
    typed: Settings, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rank 0, with the threads of its main thread, whatever others sample meanwhile.

    A run that loads weights initializes none, one with extensions its own.
    """
    settings = decide(typed, 1, corpus.tokenizer.vocab_size)
    bos_id, job = corpus.tokenizer.bos_id, Job.detect({})
    torch.manual_seed(settings.train.seed)
    wanted = I3LM(settings.model, bos_id).state_dict()
    threads: list[int] = []

    def count_threads(*arguments: Any) -> I3LM:
        threads.append(torch.get_num_threads())
        return I3LM(*arguments)

    monkeypatch.setattr(run, "I3LM", count_threads)
    model, await_weights = run.build_model(Start(settings), job, corpus)
    torch.rand(3)
    assert await_weights is not None and not model.head.weight.any()
    assert all(value.equal(wanted[name]) for name, value in await_weights().state_dict().items())
    assert threads == [torch.get_num_threads()] * 2
    _, await_weights = run.build_model(Start(settings), replace(job, rank=1, world_size=2), corpus)
    assert await_weights is not None and await_weights() is None
    model, await_weights = run.build_model(Start(settings, Path("checkpoint")), job, corpus)
    assert await_weights is None and not model.head.weight.any()
    monkeypatch.setattr(run, "LOADED", [Path("extension.py")])
    model, await_weights = run.build_model(Start(settings), job, corpus)
    assert await_weights is None
    assert all(value.equal(wanted[name]) for name, value in model.state_dict().items())


def test_a_newer_checkpoint_that_a_quick_look_refuses_is_named(
    typed: Settings, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that is taken is whole."""
    settings = decide(typed, 1, corpus.tokenizer.vocab_size)
    older, newer = (checkpoint(settings, corpus, step) for step in (7, 9))
    (newer / "lanes").touch()
    start = resolve(typed, ENGINE, corpus, 1, fresh=False)
    assert start.checkpoint == older and verify_checkpoint(start, Job.detect({}))() == start
    assert capsys.readouterr().out == (
        f"warning: checkpoint {newer} is refused: lanes is not in its manifest; "
        "step-00000007 is taken instead\n"
    )
