"""What each optimizer step is given and what it logs, against values worked out here.

A real engine on one CPU rank, which writes down all that the trainer hands to it.
"""

import hashlib
import json
import math
import runpy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from i3dist.checkpoint import verify
from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.checkpoint.format import read_state
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.engine.interface import Engine, StepResult
from i3dist.engine.setup import read_engine_config
from i3dist.engine.zero2 import Zero2Engine
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.tracking import interval
from i3dist.tracking.outbox import LOGS, Outbox
from i3dist.training.trainer import Trainer, build_trainer
from tests.conftest import ROOT, one_rank
from tests.known import BOS, CHUNK, MODEL, PAD, Known, documents, make

STEPS, LANES, K, WINDOWS, ROWS = 11, 4, 2, 2, 2
LATENTS, HISTORY = 2, 2
PEAK, FLOOR, WARMUP, DECAY = 1e-3, 0.2, 3, 9
OFF, RAMP = 2, 3
VALUES = {
    **MODEL,
    "model.latents": LATENTS,
    "model.history_chunks": HISTORY,
    "compression.off_steps": OFF,
    "compression.ramp_steps": RAMP,
    "optimizer.lr": PEAK,
    "optimizer.min_lr_ratio": FLOOR,
    "optimizer.warmup_steps": WARMUP,
    "optimizer.decay_steps": DECAY,
    "train.steps": STEPS,
    "train.lanes": LANES,
    "train.schedule": 2,
    "train.window_chunks": K,
    "train.accumulation": WINDOWS,
    "train.micro_batch": ROWS,
    "data.workers": 0,
    "log.every": 1,
    "log.diagnose_every": 3,
    "validate.every": 4,
    "validate.chunks": 8,
    "checkpoint.every": 4,
    "checkpoint.keep": 9,
}


@dataclass
class Micro:
    """A micro-batch as the engine got it, and what came of it."""

    tokens: Tensor
    targets: Tensor
    depth: Tensor
    before: LaneState
    gate: float
    loss: float
    after: LaneState
    scaled_by: float = math.nan
    taken: float = math.nan


@dataclass
class Step:
    """An optimizer step: its micro-batches, and what `Engine.step` got and returned."""

    micros: list[Micro]
    lr: float
    sums: list[float]
    limit: float
    stepped: StepResult


class Recorder(Zero2Engine):
    """An engine that writes down what it is given; the loss of steps in `bad` is NaN."""

    bad: frozenset[int] = frozenset()

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.micros: list[Micro] = []
        self.steps: list[Step] = []

    def __call__(
        self, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        before = state.map(torch.clone)
        losses, after = super().__call__(tokens, targets, depth, state, gate)
        if len(self.steps) in self.bad and len(self.micros) == 1:
            losses = losses * math.nan
        loss = float(losses.detach().sum())
        kept = [part.clone() for part in (tokens, targets, depth)]
        self.micros.append(Micro(*kept, before, float(gate), loss, after.map(torch.clone)))
        return losses, after

    def backward(self, loss_sum: Tensor, targets: Tensor) -> None:
        self.micros[-1].taken = float(loss_sum.detach())
        self.micros[-1].scaled_by = float(targets)
        super().backward(loss_sum, targets)

    def step(self, lr: float, sums: Tensor | None = None, limit: float = math.inf) -> StepResult:
        assert sums is not None
        given = sums.tolist()
        stepped = super().step(lr, sums, limit)
        self.steps.append(Step(self.micros, lr, given, limit, stepped))
        self.micros = []
        return stepped


class Asked:
    """Stands in for `StopRequest`: asked to stop in step `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.votes, self.heard = at, 0, 0.0

    def vote(self) -> float:
        self.votes += 1
        return float(self.votes == self.at)

    def count(self, votes: float) -> None:
        self.heard += votes

    def agreed(self) -> bool:
        return self.heard > 0

    def vote_now(self) -> bool:
        return self.agreed()


@dataclass
class TrainedRun:
    """A trainer, and all that came of it."""

    trainer: Trainer
    engine: Recorder
    tracker: mock.Mock
    data: Known
    done: bool = False
    sent: list[int] = field(default_factory=list)  # lines in the logs when the tracker was told
    first: int = 0  # steps that were taken before
    settings: Settings = field(default_factory=Settings)

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.settings.run.path / f"{name}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def places(self, step: int, window: int) -> list[list[tuple[int, int] | None]]:
        """The (shard, chunk) of every lane in a window of a step, the first of which is 0."""
        index = step * WINDOWS + window
        return [self.trainer.data.schedule.chunks(index, lane) for lane in range(LANES)]

    def wanted(self, step: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, targets [LANES, K, CHUNK] and depth [LANES, K] of a window, from the data."""
        tokens = np.full((LANES, K, CHUNK), PAD)
        targets = np.full((LANES, K, CHUNK), -100)
        depth = np.zeros((LANES, K), np.int64)
        for lane, row in enumerate(self.places(step, window)):
            for k, place in enumerate(row):
                if place is not None:
                    shard, chunk = place
                    tokens[lane, k] = self.data.shards["train"][shard][chunk]
                    targets[lane, k] = self.data.targets("train", shard)[chunk]
                    depth[lane, k] = self.data.depth("train", shard)[chunk]
        return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(depth)


def rate(step: int) -> float:
    """Linear over WARMUP steps up to PEAK, then half a cosine down to FLOOR of it at DECAY."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    share = min(step - WARMUP, DECAY - WARMUP) / (DECAY - WARMUP)
    return PEAK * FLOOR + (PEAK - PEAK * FLOOR) * (1 + math.cos(math.pi * share)) / 2


def gate(step: int) -> float:
    """0 for OFF steps; then a RAMPth more with each step, up to 1."""
    return min(max(step - OFF + 1, 0), RAMP) / RAMP


@pytest.fixture(scope="module", autouse=True)
def job() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """17 shards of training for 4 lanes, the last chunk of them partly padding: lanes' epochs end
    unevenly."""
    data = make(tmp_path_factory.mktemp("known") / "data", documents(0, 17), documents(1, 4))
    assert len(data.shards["train"]) == 17 and (data.shards["train"][-1][-1] == PAD).any()
    return data


Start = Callable[..., TrainedRun]


@pytest.fixture(scope="module")
def start(known: Known) -> Iterator[Start]:
    """Puts a trainer together, as launch/train.py does."""
    made: list[Engine] = []

    def put_together(
        folder: Path, stop: Asked | None = None, bad: set[int] | None = None, **changes: Any
    ) -> TrainedRun:
        settings = Settings().with_values(
            **VALUES, **{"data.path": str(known.folder), "run.path": str(folder)}
        )
        settings = settings.with_values(**changes)
        corpus = Corpus.open(known.folder, settings.model.model_copy(update={"vocab_size": "auto"}))
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        recorder = Recorder(
            I3LM(settings.model, BOS),
            read_engine_config(ROOT / "configs" / "zero2.json"),
            settings.optimizer,
            settings.train,
        )
        recorder.bad = frozenset(bad or ())
        made.append(recorder)
        tracker, sent = mock.Mock(), []
        files = [settings.run.path / name for name in LOGS]
        tracker.send = lambda: sent.append(
            sum(len(file.read_text().splitlines()) for file in files if file.exists())
        )
        job = Job.detect({})
        trainer = build_trainer(settings, job, corpus, recorder, tracker, stop or Asked())  # type: ignore[arg-type]
        return TrainedRun(trainer, recorder, tracker, known, settings=settings, sent=sent)

    yield put_together
    for recorder in made:
        recorder.close()


@pytest.fixture(scope="module")
def run(start: Start, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """An undisturbed run."""
    run = start(tmp_path_factory.mktemp("whole") / "run")
    run.done = run.trainer.fit()
    return run


@pytest.fixture(scope="module")
def stopped(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainedRun, TrainedRun]:
    """A run whose third step is skipped and which is asked to stop in its sixth; the one that goes
    on from there, and finds a line of a seventh step, as a run leaves it that is killed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    before = start(folder, stop=Asked(6), bad={2})
    before.done = before.trainer.fit()
    with (folder / "ledger.jsonl").open("a") as file:
        file.write(json.dumps(before.lines("ledger")[-1] | {"step": 7}) + "\n")
    after = start(folder)
    after.first = 6
    path = verify.newest_whole(folder / "checkpoints", after.trainer.checkpointer.saver.job)
    assert path is not None
    after.trainer.checkpointer.restore(path, read_state(path))
    after.done = after.trainer.fit()
    return before, after


@pytest.fixture(scope="module")
def skipping(start: Start, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run whose fourth and seventh steps' losses are not finite."""
    run = start(tmp_path_factory.mktemp("skipping") / "run", bad={3, 6})
    run.done = run.trainer.fit()
    return run


@pytest.fixture(scope="module", params=["whole", "continued", "skipping"])
def any_run(request: pytest.FixtureRequest) -> TrainedRun:
    if request.param == "continued":
        return request.getfixturevalue("stopped")[1]
    return request.getfixturevalue("run" if request.param == "whole" else "skipping")


def test_step_s_uses_the_rate_and_the_gate_of_step_s(any_run: TrainedRun) -> None:
    steps = any_run.engine.steps
    assert [s.lr for s in steps] == pytest.approx([rate(n) for n in range(any_run.first, STEPS)])
    for number, step in enumerate(steps, start=any_run.first):
        assert [m.gate for m in step.micros] == pytest.approx([gate(number)] * len(step.micros))


def test_step_s_reads_the_windows_of_step_s_from_every_lane(any_run: TrainedRun) -> None:
    """Window by window, in micro-batches of lanes, in order."""
    for number, step in enumerate(any_run.engine.steps, start=any_run.first):
        assert len(step.micros) == WINDOWS * LANES // ROWS
        for window in range(WINDOWS):
            micros = step.micros[window * LANES // ROWS :][: LANES // ROWS]
            wanted = any_run.wanted(number, window)
            for name, part in zip(("tokens", "targets", "depth"), wanted, strict=True):
                given = [getattr(micro, name) for micro in micros]
                assert [len(part) for part in given] == [ROWS] * len(given)
                assert torch.cat(given).equal(part), (number, window, name)


def test_a_lane_reads_a_shard_from_its_first_chunk_to_its_last(run: TrainedRun) -> None:
    sizes = [len(shard) for shard in run.data.shards["train"]]
    windows = [run.places(step, window) for step in range(STEPS) for window in range(WINDOWS)]
    for lane in range(LANES):
        read = [place for rows in windows for place in rows[lane] if place is not None]
        assert len(read) > sum(sizes) / LANES, "more than an epoch"
        for (shard, chunk), following in pairwise(read):
            ends = chunk + 1 == sizes[shard]
            assert following[1] == 0 if ends else following == (shard, chunk + 1)


def test_a_lane_carries_on_what_its_last_window_left(any_run: TrainedRun) -> None:
    """From micro-batch to micro-batch of the same lanes, over steps and a cut; from nothing."""
    micros = [micro for step in any_run.engine.steps for micro in step.micros]
    if not any_run.first:
        assert all(not m.before.latents.any() for m in micros[: LANES // ROWS])
    for former, later in zip(micros, micros[LANES // ROWS :], strict=False):
        assert later.before.latents.equal(former.after.latents)
        assert later.before.latents.any() and not later.before.latents.requires_grad


def test_the_continued_run_has_the_lanes_of_the_one_that_stopped(
    stopped: tuple[TrainedRun, TrainedRun],
) -> None:
    last, first = stopped[0].engine.steps[-1], stopped[1].engine.steps[0]
    for lanes in range(LANES // ROWS):
        left = last.micros[-LANES // ROWS + lanes].after.latents
        assert first.micros[lanes].before.latents.equal(left)


def test_each_micro_batch_counts_by_the_targets_of_the_whole_step(any_run: TrainedRun) -> None:
    for number, step in enumerate(any_run.engine.steps, start=any_run.first):
        targets = sum(int((any_run.wanted(number, w)[1] >= 0).sum()) for w in range(WINDOWS))
        assert [m.scaled_by for m in step.micros] == [targets] * len(step.micros)
        losses = [m.loss for m in step.micros]
        assert [m.taken for m in step.micros] == pytest.approx(losses, nan_ok=True)
        assert step.sums == pytest.approx([sum(losses), 0, 0], nan_ok=True)
        assert step.limit == math.inf


def test_a_line_of_metrics_is_of_its_step(any_run: TrainedRun) -> None:
    lines = any_run.lines("metrics")[-len(any_run.engine.steps) :]
    assert [line["step"] for line in lines] == list(range(any_run.first + 1, STEPS + 1))
    for line, step in zip(lines, any_run.engine.steps, strict=True):
        number = line["step"] - 1
        loss = sum(m.loss for m in step.micros) / step.micros[0].scaled_by
        wanted = {
            "learning_rate": rate(number),
            "gate": gate(number),
            "loss": None if math.isnan(loss) else pytest.approx(loss, rel=1e-6),
            "perplexity": None if math.isnan(loss) else pytest.approx(math.exp(loss), rel=1e-6),
            "active_latents": active_latents(any_run, number),
        }
        assert {key: line[key] for key in wanted} == {
            key: value if value is None else pytest.approx(value) for key, value in wanted.items()
        }
        if step.stepped.updated:
            assert line["gradient_norm"] == step.stepped.norm > 0


def active_latents(run: TrainedRun, step: int) -> float:
    """What a chunk may see, mean over the step's chunks that are no padding; 0 behind the gate."""
    seen = []
    for window in range(WINDOWS):
        tokens, _, depth = run.wanted(step, window)
        for lane in range(LANES):
            for k in range(K):
                if (tokens[lane, k] != PAD).any():
                    seen.append(LATENTS * min(HISTORY, int(depth[lane, k])))
    return sum(seen) / len(seen) if gate(step) else 0.0


def test_tokens_seen_are_the_inputs_but_padding(any_run: TrainedRun) -> None:
    """Of all steps, those before a cut and those that were skipped as well."""
    each = [
        sum(int((any_run.wanted(step, window)[0] != PAD).sum()) for window in range(WINDOWS))
        for step in range(STEPS)
    ]
    assert min(each) < LANES * WINDOWS * K * CHUNK, "padding takes part"
    totals = {line["step"]: line["tokens_seen"] for line in any_run.lines("metrics")}
    assert totals == {n: sum(each[:n]) for n in range(1, STEPS + 1)}


def test_skipped_steps_are_counted_named_and_change_no_later_one(skipping: TrainedRun) -> None:
    counts = [line["skipped_steps"] for line in skipping.lines("metrics")]
    assert counts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    named = {entry["step"]: entry["skipped"] for entry in skipping.lines("ledger")}
    assert {step for step, reason in named.items() if reason} == {4, 7}
    assert named[4] == named[7] == "not finite"
    last = read_state(skipping.settings.run.path / "checkpoints" / "step-00000011")
    assert (last.step, last.taken, last.guard.skipped) == (11, 9, 2)


def test_steps_skipped_before_a_cut_are_counted_behind_it(
    stopped: tuple[TrainedRun, TrainedRun],
) -> None:
    folder = stopped[1].settings.run.path
    assert [line["skipped_steps"] for line in stopped[1].lines("metrics")] == [0, 0] + [1] * 9
    for step, taken in ((6, 5), (11, 10)):
        state = read_state(folder / "checkpoints" / f"step-{step:08d}")
        assert (state.step, state.taken) == (step, taken)


def test_the_ledger_has_each_steps_samples_loss_and_norm(any_run: TrainedRun) -> None:
    """One window after the other, in each lane by lane."""
    entries = any_run.lines("ledger")
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    for entry, step in zip(entries[any_run.first :], any_run.engine.steps, strict=True):
        read = [row for w in range(WINDOWS) for row in any_run.places(entry["step"] - 1, w)]
        text = json.dumps(read, separators=(",", ":")).encode()
        assert entry["samples"] == hashlib.blake2b(text, digest_size=16).hexdigest()
        if step.stepped.updated:
            loss = sum(m.loss for m in step.micros) / step.micros[0].scaled_by
            assert entry["loss"] == pytest.approx(loss, rel=1e-6)
            assert entry["gradient_norm"] == step.stepped.norm
        else:
            assert entry["loss"] is None


def test_the_ledgers_program_knows_what_each_step_read(any_run: TrainedRun, tmp_path: Path) -> None:
    """From the data and the run's settings; with another seed it would have been other shards."""
    checked = runpy.run_path(str(ROOT / "launch" / "ledger.py"))["checked"]
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(any_run.settings.run.path / "ledger.jsonl", folder)
    (folder / "settings.yaml").write_text(any_run.settings.to_yaml())
    assert [entry.step for entry in checked(folder, any_run.data.folder)] == [*range(1, STEPS + 1)]
    (folder / "settings.yaml").write_text(
        any_run.settings.with_values(**{"train.seed": 1}).to_yaml()
    )
    with pytest.raises(UserError, match="step 1 read other samples than the schedule gives it"):
        checked(folder, any_run.data.folder)
    assert len(checked(folder, None)) == STEPS


def test_intervals_end_where_they_say_and_with_the_run(run: TrainedRun) -> None:
    saved = sorted(path.name for path in (run.settings.run.path / "checkpoints").glob("step-*"))
    assert saved == [f"step-{step:08d}" for step in (4, 8, 11)]
    assert [line["step"] for line in run.lines("validation")] == [0, 4, 8, 11]
    assert [line["step"] for line in run.lines("diagnostics")] == [3, 6, 9, 11]


def test_a_checkpoint_says_where_the_run_stood(run: TrainedRun) -> None:
    seen = {line["step"]: line["tokens_seen"] for line in run.lines("metrics")}
    for step in (4, 8, 11):
        path = run.settings.run.path / "checkpoints" / f"step-{step:08d}"
        state = read_state(path)
        assert (state.step, state.windows, state.taken) == (step, step * WINDOWS, step)
        assert state.tokens_seen == seen[step]
        assert state.data == run.trainer.validator.corpus.fingerprint
        assert Settings.build(state.settings) == run.settings


def test_what_is_tracked_is_what_is_logged(run: TrainedRun) -> None:
    """The tracker is told of each line once it is in its log, and takes it from there."""
    logged = [line for log in LOGS for line in run.lines(log.removesuffix(".jsonl"))]
    assert run.sent == list(range(1, len(logged) + 1))
    box = Outbox(run.settings.run.path)
    box.begin("run")
    taken = []
    while (found := box.unsent())[0]:
        taken += found[0]
        box.sent("run", found[1])
    assert [(entry["step"], entry["time_ms"]) for entry in taken] == [
        (line["step"], round(1000 * line["time"])) for line in logged
    ]
    box.clear()
    drawn = {(c.args[0].name, c.args[1]) for c in run.tracker.artifact.call_args_list}
    assert drawn >= {("loss.png", "plots"), ("history.png", "plots")}


def test_a_run_is_done_at_its_last_step_only(
    run: TrainedRun, stopped: tuple[TrainedRun, TrainedRun]
) -> None:
    before, after = stopped
    assert (run.done, before.done, after.done) == (True, False, True)
    assert len(before.engine.steps) == 6, "the step in which it was asked is the last"
    assert not any(step.sums[1] for step in before.engine.steps[:-1])
    assert before.engine.steps[-1].sums[1] == 1
    assert [len(r.engine.steps) for r in (run, after)] == [STEPS, STEPS - 6]
    assert (before.settings.run.path / "model.safetensors").exists()


def test_a_look_inside_is_of_its_steps_first_window(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the lanes as they were before it, the step's gate, and the gradient of all its parts."""
    seen: list[tuple[Any, ...]] = []
    figures = {"attention_age_01": 0.5, "effective_rank": 2.0}
    monkeypatch.setattr(
        "i3dist.training.diagnoser.diagnose", lambda *words: seen.append(words) or figures
    )
    run = start(tmp_path / "run", **{"train.steps": 4, "log.diagnose_every": 2})
    norms = []
    whole = run.engine.gradient_norm_of
    run.engine.gradient_norm_of = lambda prefix: (
        norms.append(  # type: ignore[method-assign]
            (prefix, len(run.engine.micros), whole(prefix))
        )
        or norms[-1][-1]
    )
    monkeypatch.setattr(run.trainer.validator, "validate", lambda: None)
    monkeypatch.setattr(run.trainer.log, "plot", lambda: None)
    run.trainer.fit()
    assert [len(words) for words in seen] == [6, 6]
    for number, (model, *batch, state, opened) in zip((1, 3), seen, strict=True):
        assert model is run.engine.model
        assert all(a.equal(b) for a, b in zip(batch, run.wanted(number, 0), strict=True))
        assert float(opened) == pytest.approx(gate(number))
        micros = run.engine.steps[number].micros[: LANES // ROWS]
        assert state.latents.equal(torch.cat([m.before.latents for m in micros]))
    assert [norm[:2] for norm in norms] == [("compressor.", WINDOWS * LANES // ROWS)] * 2
    logged = [line["compressor_gradient_norm"] for line in run.lines("diagnostics")]
    assert logged == [norm[2] for norm in norms]


class ManualClock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def passing(self, seconds: float, then: Callable[..., Any] = lambda *_: None) -> Any:
        """A function that takes so long, and is then `then`."""

        def take(*words: Any, **named: Any) -> Any:
            self.now += seconds
            return then(*words, **named)

        return take


def test_step_time_leaves_out_what_is_no_training(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 2 s and waits 0.5 s for each window; the rest takes long and is not counted."""
    clock = ManualClock()
    monkeypatch.setattr(interval, "time", clock)
    changes = {"train.steps": 6, "log.every": 3, "checkpoint.every": 1, "validate.every": 1}
    run = start(tmp_path / "run", **changes, **{"log.diagnose_every": 1})
    trainer, recorder = run.trainer, run.engine
    monkeypatch.setattr(recorder, "step", clock.passing(2.0, recorder.step))
    monkeypatch.setattr(trainer.validator, "validate", clock.passing(100.0))
    monkeypatch.setattr(trainer.checkpointer, "save", clock.passing(50.0))
    monkeypatch.setattr(trainer.diagnoser, "diagnose", clock.passing(30.0))
    monkeypatch.setattr(trainer.checkpointer, "export", clock.passing(70.0))
    monkeypatch.setattr(trainer.log, "plot", lambda: None)
    batches = trainer.batches

    def slow() -> Iterator[Any]:
        for batch in batches():
            clock.now += 0.5
            yield batch

    monkeypatch.setattr(trainer, "batches", slow)
    trainer.fit()
    lines = run.lines("metrics")
    assert [line["step"] for line in lines] == [3, 6]
    before = 0
    for line in lines:
        assert line["step_time"] == pytest.approx(3.0)
        assert line["data_wait"] == pytest.approx(1.0 / 3.0)
        tokens, before = line["tokens_seen"] - before, line["tokens_seen"]
        assert line["tokens_per_second"] == pytest.approx(tokens / 9.0)


def test_a_line_of_several_steps_is_of_the_last(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"log.every": 4, "validate.every": 0, "log.diagnose_every": 0, "checkpoint.every": 0}
    run = start(tmp_path / "run", **changes)
    monkeypatch.setattr(run.trainer.validator, "validate", lambda: None)
    monkeypatch.setattr(run.trainer.log, "plot", lambda: None)
    run.trainer.fit()
    lines = run.lines("metrics")
    assert [line["step"] for line in lines] == [4, 8, 11]
    for line in lines:
        step = run.engine.steps[line["step"] - 1]
        assert line["learning_rate"] == pytest.approx(rate(line["step"] - 1))
        assert line["gate"] == pytest.approx(gate(line["step"] - 1))
        loss = sum(m.loss for m in step.micros) / step.micros[0].scaled_by
        assert line["loss"] == pytest.approx(loss, rel=1e-6)
        assert line["gradient_norm"] == step.stepped.norm


@pytest.mark.parametrize("where", ["validator.validate", "train_step", "checkpointer.export"])
def test_what_follows_an_error_is_not_watched(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It may take longer than guard.hang_seconds, and would end before the error is told."""
    trainer = start(tmp_path / "run", **{"train.steps": 1, "guard.hang_seconds": 1000}).trainer
    failed = mock.Mock(side_effect=UserError("the true error"))
    *part, name = where.split(".")
    monkeypatch.setattr(getattr(trainer, *part) if part else trainer, name, failed)
    watched = []

    def leave(*_: object) -> None:
        watched.append(not trainer.watchdog._closed.is_set())

    monkeypatch.setattr(AsyncSaver, "__exit__", leave)
    with pytest.raises(UserError, match="the true error"):
        trainer.fit()
    assert watched == [False]


def test_the_last_save_is_watched_to_its_end(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(tmp_path / "run", **{"train.steps": 1, "guard.hang_seconds": 1000}).trainer
    watched, wait = [], AsyncSaver.wait

    def observed(saver: AsyncSaver) -> None:
        if saver._writing is not None:
            watched.append(not trainer.watchdog._closed.is_set())
        wait(saver)

    monkeypatch.setattr(AsyncSaver, "wait", observed)
    assert trainer.fit() and watched == [True] and trainer.watchdog._closed.is_set()


@pytest.mark.parametrize("way", ["restore", "roll_back"])
def test_a_checkpoint_that_another_rank_cannot_read_stops_this_one_too(
    stopped: tuple[TrainedRun, TrainedRun],
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """It would wait for the other in what the ranks do together next."""
    trainer = start(tmp_path / "run").trainer
    path = verify.newest_whole(
        stopped[0].settings.run.path / "checkpoints", trainer.checkpointer.saver.job
    )
    assert path is not None
    monkeypatch.setattr(verify, "newest_whole", lambda *_: path)
    monkeypatch.setattr(
        collectives, "gather_objects", lambda mine, _=None: [mine, (None, "not here")]
    )
    with pytest.raises(UserError, match=r"^not here$"):
        if way == "restore":
            trainer.checkpointer.restore(path, read_state(path))
        else:
            trainer.recovery.roll_back()
    assert trainer.progress.step == 0
