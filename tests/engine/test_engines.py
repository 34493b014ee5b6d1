"""Both engines: what each must do alike, that their losses agree, and which one trains."""

import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from i3dist.config import OptimizerSettings, TrainSettings
from i3dist.engine import deepspeed_internals as internals
from i3dist.engine import setup
from i3dist.engine.config_file import read_engine_file
from i3dist.engine.interface import Engine
from i3dist.engine.stock import StockEngine
from i3dist.engine.zero2 import Zero2Engine
from i3dist.errors import UserError
from tests.conftest import one_rank, run_ranks
from tests.engine.steps import ENGINES, ZERO2, backward, batch, build, new_model, snapshot, step

both = pytest.mark.parametrize("kind", ENGINES.values(), ids=ENGINES)


@pytest.fixture(scope="module", autouse=True)
def job() -> Iterator[None]:
    with one_rank():
        yield


def equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return all(t.equal(b[name][key]) for name, tensors in a.items() for key, t in tensors.items())


def losses(trained: Engine, steps: int, rows: int = 2, first: int = 0) -> list[float]:
    """Sums of losses of so many steps over 4 lanes."""
    return [step(trained, batch(4, seed), rows).sums[0] for seed in range(first, first + steps)]


@both
@pytest.mark.parametrize("bf16", [True, False])
def test_weights_set_later_are_as_if_the_engine_had_been_built_with_them(
    kind: Callable[..., Engine], bf16: bool
) -> None:
    """To the last bit, in both types; and the step after it is the same."""
    wanted, late = (build(2, bf16, seed=seed, kind=kind) for seed in (1, 0))
    late.set_weights(new_model(1))
    for _ in range(2):
        for one, other in zip(late.model.parameters(), wanted.model.parameters(), strict=True):
            assert one.equal(other)
        assert losses(late, 1) == losses(wanted, 1)
        assert equal(snapshot(late), snapshot(wanted))


def test_all_ranks_have_the_first_weights_of_rank_0() -> None:
    """Rounding depends on a rank's threads and its CPU."""
    result = run_ranks(script="tests/engine/first_weights.py")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count("agrees") == 2


@pytest.mark.parametrize(
    ("optimizer", "bf16", "steps"), [("adamw", True, 20), ("adamw", False, 5), ("lion", True, 5)]
)
def test_losses_of_both_engines_agree(optimizer: str, bf16: bool, steps: int) -> None:
    """To 1e-3 in bf16 and 1e-5 in fp32, with clipping and two micro-batches a step.

    Not to the last bit: the plain model pads each weight where the flat one is stored padded, and
    DeepSpeed divides by (norm + 1e-6) / clip. A bf16 weight has 8 bits, so one that rounds the
    other way differs by 4e-3 of itself from then on.
    """
    lr = {"adamw": 1e-2, "lion": 1e-3}[optimizer]
    engines = [
        build(2, bf16, clip=0.5, optimizer=optimizer, kind=kind) for kind in ENGINES.values()
    ]
    for seed in range(steps):
        ours, stock = (step(trained, batch(4, seed), 2, lr) for trained in engines)
        close = 1e-3 if bf16 else 1e-5
        assert stock.sums == pytest.approx(ours.sums, rel=close), seed
        assert stock.norm == pytest.approx(ours.norm, rel=20 * close), seed


def test_losses_of_both_engines_agree_on_two_ranks() -> None:
    """And either continues from what the other, or another number of ranks, saved."""
    result = run_ranks(script="tests/engine/agreement.py")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count("agrees") == 2


def test_the_learning_rate_is_each_steps_own() -> None:
    trained = build(kind=StockEngine)
    before = snapshot(trained)
    step(trained, batch(2), 2, lr=0.0)
    after = snapshot(trained)
    assert all(after[name]["weight"].equal(before[name]["weight"]) for name in before)
    step(trained, batch(2), 2, lr=1e-2)
    assert not equal(snapshot(trained), after)


def test_stock_keeps_fp32_buffers() -> None:
    model = build(kind=StockEngine).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


@both
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_state_goes_out_and_comes_back_in(kind: Callable[..., Engine], optimizer: str) -> None:
    """A new engine that restores it continues bit for bit."""
    old, new = (build(2, kind=kind, optimizer=optimizer, seed=seed) for seed in (0, 1))
    losses(old, 3)
    state = snapshot(old)
    assert set(state) == {name for name, _ in old.model.named_parameters()}
    assert all(t.any() for s in state.values() for key, t in s.items() if key != "weight")
    new.load(state, steps=3)
    assert equal(snapshot(new), state)
    assert losses(new, 2, first=3) == losses(old, 2, first=3)
    assert equal(snapshot(new), snapshot(old))


def test_one_engine_continues_from_the_others_state() -> None:
    old = build(2)
    losses(old, 3)
    new = build(2, kind=StockEngine, seed=1)
    new.load(snapshot(old), steps=3)
    assert equal(snapshot(new), snapshot(old))
    back = build(2, seed=2)
    back.load(snapshot(new), steps=3)
    assert losses(back, 2, first=3) == losses(old, 2, first=3)


@both
def test_state_of_another_optimizer_is_refused(kind: Callable[..., Engine]) -> None:
    adamw, lion = build(kind=kind), build(kind=kind, optimizer="lion")
    for trained in (adamw, lion):
        step(trained, batch(2), 2)
    before = snapshot(lion)
    with pytest.raises(UserError, match=r"state is exp_avg, exp_avg_sq, but this optimizer\.kind"):
        lion.load(snapshot(adamw), steps=1)
    assert equal(snapshot(lion), before)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_stock_measures_norms_of_parts(bf16: bool) -> None:
    ours, stock = (build(2, bf16, kind=kind) for kind in ENGINES.values())
    for trained in (ours, stock):
        backward(trained, batch(4), 2)
    for prefix in ("compressor.", "head.", ""):
        wanted = pytest.approx(ours.gradient_norm_of(prefix), rel=1e-2 if bf16 else 1e-5)
        assert stock.gradient_norm_of(prefix) == wanted
    assert stock.gradient_norm_of("nothing.") == 0
    whole = stock.gradient_norm_of("")
    assert stock.step(1e-2).norm == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("sums", "limit"),
    [([math.nan, 0.0], math.inf), ([math.inf, 0.0], math.inf), ([1.0, 0.0], 1e-9)],
)
def test_stock_skips_a_step_as_if_it_had_never_been(
    sums: list[float], limit: float, bf16: bool
) -> None:
    skipping, plain = (build(bf16=bf16, kind=StockEngine) for _ in range(2))
    for trained in (skipping, plain):
        step(trained, batch(2, 0), 2)
    backward(skipping, batch(2, 7), 2)
    skipped = skipping.step(1e-2, torch.tensor(sums), limit)
    assert not skipped.updated and skipped.norm > 0
    assert skipped.sums == pytest.approx(sums, nan_ok=True)
    assert equal(snapshot(skipping), snapshot(plain))
    assert step(skipping, batch(2, 1), 2) == step(plain, batch(2, 1), 2)
    assert equal(snapshot(skipping), snapshot(plain))


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_stock_skips_a_gradient_that_is_not_finite(bf16: bool) -> None:
    trained = build(bf16=bf16, kind=StockEngine)
    step(trained, batch(2), 2)
    before = snapshot(trained)
    weight = trained.model.head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.inf)
    backward(trained, batch(1), 1)
    stepped = trained.step(1e-2)
    assert not stepped.updated and not math.isfinite(stepped.norm)
    assert equal(snapshot(trained), before)
    with torch.no_grad():
        weight.copy_(kept)
    assert step(trained, batch(1), 1).updated


def choose(engine: str = "zero2") -> Engine:
    train = TrainSettings.model_validate({"engine": engine})
    return setup.build(new_model(), read_engine_file(ZERO2), OptimizerSettings(), train)


def test_the_setting_names_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert type(choose()) is Zero2Engine
    assert type(choose("stock")) is StockEngine
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "0.18.9+cu128", "1.0"])
def test_stock_trains_where_deepspeeds_version_is_unknown(
    version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(internals.deepspeed, "__version__", version)
    trained = choose()
    (line,) = capsys.readouterr().out.splitlines()
    assert f"does not fit DeepSpeed {version} (" in line and "slower" in line
    assert type(trained) is StockEngine and step(trained, batch(2), 2).updated


@pytest.mark.parametrize("version", ["0.19.8", "0.19.12", "0.19.8+cu128"])
def test_known_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals.deepspeed, "__version__", version)
    assert internals.is_known_version()


def shifted(zero: SimpleNamespace) -> None:
    """Parameters lie elsewhere in the partition."""
    zero.bit16_groups[0][0]._hp_mapping.hp_fragment_address.start = 16
    zero.bit16_groups[0][0]._hp_mapping.lp_fragment_address.numel -= 16


CHANGES: dict[str, Callable[[SimpleNamespace], object]] = {
    **{
        name: lambda zero, name=name: delattr(zero, name)
        for name in (
            *("dtype", "gradient_accumulation_dtype", "optimizer", "bit16_groups"),
            *("single_partition_of_fp32_groups", "partition_size", "averaged_gradients"),
            "ipg_buckets",
        )
    },
    "_hp_mapping": shifted,
    "average_tensor": lambda zero: setattr(zero, "average_tensor", lambda tensor: None),
    "averaged_gradients is not": lambda zero: setattr(zero, "averaged_gradients", []),
    "partition_size ": lambda zero: setattr(zero, "partition_size", [1, 1]),
    "gradient_accumulation_dtype is": lambda zero: setattr(
        zero, "gradient_accumulation_dtype", torch.bfloat16
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_stock_trains_where_an_internal_is_missing_or_different(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the model is as it was before."""
    initialize = internals.initialize

    def other(*arguments: object) -> object:
        engine = initialize(*arguments)
        CHANGES[name](engine.optimizer)
        return engine

    with monkeypatch.context() as patch:
        patch.setattr(internals, "initialize", other)
        trained = choose()
    (line,) = capsys.readouterr().out.splitlines()
    assert name.split()[0] in line and "does not fit DeepSpeed 0.19.8 (" in line
    assert type(trained) is StockEngine
    assert step(trained, batch(2), 2) == step(choose("stock"), batch(2), 2)


def test_a_missing_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = build()
    flats = [flat.parameter for flat in trained._flat.flats]
    monkeypatch.delattr(internals.deepspeed.runtime.zero.stage_1_and_2, "GradPartitionBufferGroup")
    with pytest.raises(internals.UnknownDeepSpeedError, match="GradPartitionBufferGroup"):
        internals.ZeroInternals(trained._engine, flats, trained._optimizer)


def test_a_parser_that_takes_other_arguments_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another DeepSpeed's parser cannot be asked, DeepSpeed itself speaks later."""

    def parser(config: dict[str, object], mesh: object) -> None: ...

    assert internals.refusal({"train_batch_size": "many"}) is not None
    monkeypatch.setattr("deepspeed.runtime.config.DeepSpeedConfig", parser)
    assert internals.refusal({"train_batch_size": "many"}) is None


@both
def test_a_ranks_own_time_has_no_waiting_for_others_in_it(
    kind: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward takes 0.1 s more here, and each exchange a second."""
    engine = build(2, kind=kind)
    forward = engine._engine.forward

    def slow(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def late(*words: Any, **more: Any) -> Any:
            time.sleep(seconds)
            return call(*words, **more)

        return late

    monkeypatch.setattr(engine._engine, "forward", slow(0.1, forward))
    for name in ("all_reduce", "reduce_scatter_tensor"):
        monkeypatch.setattr(torch.distributed, name, slow(0.9, getattr(torch.distributed, name)))
    step(engine, batch(2), 1)
    assert 0.1 <= engine.compute_seconds < 0.9
