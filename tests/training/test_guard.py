"""Which steps are skipped, what they leave in the lanes, and when it is enough."""

import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from i3dist.checkpoint.format import GuardState
from i3dist.config import GuardSettings, ModelSettings
from i3dist.engine.interface import StepResult
from i3dist.model.state import LaneState
from i3dist.training.guard import Guard
from tests.model.conftest import SMALL

SPIKES = GuardSettings(spike_factor=3.0, spike_window=4, spike_steps=2, bad_steps=3)
NORMS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 40.0, math.nan, math.inf]), max_size=40)


def take(guard: Guard, norm: float) -> str | None:
    """What the engine and the guard make of a step with this norm."""
    taken = math.isfinite(norm) and norm <= guard.limit()
    return guard.judge(StepResult(taken, norm, [1.0, 0.0]))


@given(norms=NORMS)
def test_spikes_are_skipped_but_never_many(norms: list[float]) -> None:
    guard, taken, row, bad = Guard(SPIKES), [], 0, 0
    for norm in norms:
        high = len(taken) >= 4 and norm > 3 * statistics.median(taken[-4:])
        reason = take(guard, norm)
        if not math.isfinite(norm):
            wanted, bad = "not finite", bad + 1
        elif high and row < 2:
            wanted, row, bad = "spike", row + 1, 0
        else:
            wanted, row, bad = None, 0, 0
            taken.append(norm)
        assert reason == wanted
        assert guard.gives_up() == (bad >= 3)


@given(norms=NORMS, cut=st.integers(0, 40))
def test_a_continued_guard_decides_alike(norms: list[float], cut: int) -> None:
    whole, before = Guard(SPIKES), Guard(SPIKES)
    expected = [take(whole, norm) for norm in norms]
    got = [take(before, norm) for norm in norms[:cut]]
    saved = before.state.model_dump_json()
    after = Guard(SPIKES, GuardState.model_validate_json(saved))
    assert got + [take(after, norm) for norm in norms[cut:]] == expected
    assert after.state == whole.state


@given(before=NORMS, after=NORMS)
def test_a_state_that_somebody_holds_never_changes(before: list[float], after: list[float]) -> None:
    guard = Guard(SPIKES)
    for norm in before:
        take(guard, norm)
    held = guard.state
    was = held.model_dump_json()
    for norm in after:
        take(guard, norm)
    guard.rolled_back(99, 3, 2)
    assert held.model_dump_json() == was
    with pytest.raises(ValidationError):
        held.bad = 7  # type: ignore[misc]


def test_a_state_of_an_older_checkpoint_can_be_read() -> None:
    """It has lists, and no word of when the run was rolled back."""
    old = '{"skipped": 4, "bad": 1, "spikes": 0, "norms": [1.5, 2.0], "rolled_back_to": [3, 6]}'
    state = GuardState.model_validate_json(old)
    assert (state.norms, state.rolled_back_to) == ((1.5, 2.0), (3, 6))
    assert [step for step in range(1, 10) if state.may_roll_back_to(step, 9)] == [1, 2, 4, 5, 7, 8]
    assert state.model_dump(mode="json") == json.loads(old), "and they stay equal"


@given(norms=st.lists(st.sampled_from([1.0, math.nan, math.nan]), max_size=40))
def test_rolling_back_gives_up_the_weights_of_now(norms: list[float]) -> None:
    """To a checkpoint of this past from before the bad steps, whatever else lies in the folder.

    There is one of every step, made when the step was done with.
    """
    guard = Guard(GuardSettings(bad_steps=3, rollbacks=9))
    past: list[int] = []  # steps with a checkpoint on the way to the weights of now
    streak: list[int] = []
    for step, norm in enumerate(norms, start=1):
        streak = [] if take(guard, norm) is None else [*streak, step]
        past.append(step)
        if not guard.gives_up():
            continue
        allowed = [s for s in past if s not in streak and s not in guard.state.rolled_back_to]
        assert allowed == [s for s in range(60) if s and guard.state.may_roll_back_to(s, step)]
        if not allowed:
            break
        guard.rolled_back(step, allowed[-1], taken=1)
        past, streak = [s for s in past if s < allowed[-1]], []


@given(norms=NORMS)
def test_what_is_rolled_back_to_has_other_weights_than_now(norms: list[float]) -> None:
    """Steps in a row that updated nothing may be of both kinds, by turns."""
    guard, updated = Guard(SPIKES), 0
    for step, norm in enumerate(norms, start=1):
        updated = step if take(guard, norm) is None else updated
        for checkpoint in range(1, step + 1):
            assert guard.state.may_roll_back_to(checkpoint, step) == (checkpoint <= updated)


def test_by_default_no_norm_is_too_large() -> None:
    guard = Guard(GuardSettings())
    assert [take(guard, 10.0**power) for power in range(300)] == [None] * 300
    assert guard.state == GuardState()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_what_is_not_finite_is_emptied(bad: float) -> None:
    model = ModelSettings.model_validate(SMALL | {"state_carry": True})
    empty = LaneState.empty(3, model, torch.device("cpu"), torch.bfloat16)
    state = empty.map(lambda part: torch.randn(part.shape).to(part.dtype))
    hurt = state.map(torch.clone)
    hurt.latents[1, -2, 0, 3] = bad
    hurt.layers["channel_shift"][2, 0, 1] = bad
    healed = hurt.finite(empty)
    wanted = state.map(torch.clone)
    wanted.latents[1, -2] = 0
    for name, part in wanted.layers.items():
        part[2] = empty.layers[name][2]
    for name, tensor in healed.tensors().items():
        assert tensor.equal(wanted.tensors()[name]), name
        assert tensor.dtype == state.tensors()[name].dtype
    assert all(part.equal(state.layers[n]) for n, part in state.finite(empty).layers.items())


def test_lanes_that_carry_no_rwkv_state_are_emptied_too() -> None:
    model = ModelSettings.model_validate(SMALL)
    state, empty = (LaneState.empty(2, model, torch.device("cpu"), torch.float32) for _ in range(2))
    state.latents.fill_(math.nan)
    assert state.finite(empty).latents.eq(0).all()


@given(
    norms=NORMS,
    rollbacks=st.integers(0, 3),
    checkpoints=st.sets(st.integers(1, 40), max_size=4),
)
def test_rolling_back_is_bounded_and_counts_what_it_gives_up(
    norms: list[float], rollbacks: int, checkpoints: set[int]
) -> None:
    """As a trainer does it: to the newest checkpoint that it was not done with before."""
    guard = Guard(SPIKES.model_copy(update={"rollbacks": rollbacks}))
    taken = {0: 0}  # step -> steps up to it that stand
    for step, norm in enumerate(norms, start=1):
        taken[step] = taken[step - 1] + (take(guard, norm) is None)
        there = {c for c in checkpoints if c <= step} - set(guard.state.rolled_back_to)
        if guard.rolls_back() and there:
            guard.rolled_back(step, max(there), taken[max(there)])
            taken[step] = taken[max(there)]
            assert not guard.gives_up() and guard.limit() == math.inf
        assert guard.state.skipped == step - taken[step]
    went = guard.state.rolled_back_to
    assert len(went) == len(set(went)) <= rollbacks
