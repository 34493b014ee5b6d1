"""What each optimizer step is given, against values worked out here."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import LANES, ROWS, STEPS, WINDOWS, Start, TrainedRun, gate, rate


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
        assert step.sums == pytest.approx([sum(losses), 0, 0, 0, 0], nan_ok=True)
        assert step.limit == math.inf


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
