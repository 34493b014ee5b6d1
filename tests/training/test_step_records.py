"""What a run writes about its steps: metrics, counters, clocks and the ledger."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from i3dist.checkpoint.format import read_state
from i3dist.errors import UserError
from i3dist.programs.ledger import checked
from i3dist.tracking import interval
from i3dist.tracking.outbox import LOGS, Outbox
from tests.known import CHUNK, PAD
from tests.training.runs import (
    HISTORY,
    LANES,
    LATENTS,
    STEPS,
    WINDOWS,
    K,
    Start,
    TrainedRun,
    gate,
    rate,
)


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
