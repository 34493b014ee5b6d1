"""The engine in one process: what it takes, what it refuses, and what its gradient is."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import Tensor

from i3dist.config import ModelSettings
from i3dist.engine import config_file, zero2
from i3dist.engine.interface import Engine
from i3dist.engine.setup import read_engine_config
from i3dist.engine.zero2 import Zero2Engine
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.optim import adamw
from tests.conftest import one_rank
from tests.engine.steps import ZERO2, Batch, backward, batch, build, snapshot
from tests.model.conftest import SMALL
from tests.model.streams import BOS


@pytest.fixture(scope="module", autouse=True)
def job() -> Iterator[None]:
    with one_rank():
        yield


def norm_of(engine: Engine, data: Batch, rows: int) -> float:
    """Norm of the gradient of one optimizer step."""
    backward(engine, data, rows)
    return engine.step(1e-2).norm


def test_it_computes_in_bf16_with_decays_in_fp32() -> None:
    model = build().model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("rows", [1, 2])
def test_the_gradient_does_not_depend_on_micro_batches(rows: int) -> None:
    """In fp32, where rounding is small: norm of the gradient and weights after the step."""
    whole, parts = build(bf16=False), build(4 // rows, bf16=False)
    data = batch(4)
    assert norm_of(parts, data, rows) == pytest.approx(norm_of(whole, data, 4), rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def test_a_sum_in_fp32_is_kept_between_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `training.estimate` says of memory: nothing for one micro-batch, else all elements."""
    engine = build(2)
    assert isinstance(engine, Zero2Engine)
    kept, sum_parts = [], zero2.collectives.sum_parts

    def observed(*arguments: Any) -> Tensor:
        parts = [group.flat_partition for group in engine._zero.gradients.values()]
        kept.append(sum(part.numel() * part.element_size() for part in parts))
        return sum_parts(*arguments)

    monkeypatch.setattr(zero2.collectives, "sum_parts", observed)
    backward(engine, batch(2), 1)
    whole = 4 * sum(engine._zero.partition_sizes)
    assert kept[0] == 0 and kept[len(kept) // 2 :] == [whole] * (len(kept) // 2)


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    trained = build(2, bf16=False)
    torch.manual_seed(0)
    plain = I3LM(ModelSettings.model_validate(SMALL), BOS)
    data = batch(4)
    state = LaneState.empty(4, plain.settings, torch.device("cpu"), torch.float32)
    losses, _ = plain(*data, state, torch.tensor(1.0))
    (losses.sum() / data[0].numel()).backward()
    squares = sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None)
    assert norm_of(trained, data, 2) == pytest.approx(squares**0.5, rel=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_norms_of_parts_make_up_the_whole_norm(bf16: bool) -> None:
    trained, data = build(bf16=bf16), batch(2)
    state = LaneState.empty(2, trained.model.settings, trained.device, trained.dtype)
    losses, _ = trained(*data, state, torch.tensor(1.0))
    trained.backward(losses.sum(), torch.tensor(data[0].numel()))
    tops = {name.split(".")[0] for name, _ in trained.model.named_parameters()}
    squares = [trained.gradient_norm_of(f"{top}.") ** 2 for top in tops]
    assert min(squares) > 0
    assert trained.gradient_norm_of("nothing.") == 0
    assert math.fsum(squares) ** 0.5 == pytest.approx(trained.gradient_norm_of(""), rel=1e-5)
    assert trained.gradient_norm_of("") == pytest.approx(trained.step(1e-2).norm, rel=1e-5)


def test_the_norm_of_a_part_is_that_of_its_gradient() -> None:
    trained = build(bf16=False)
    torch.manual_seed(0)
    plain, data = I3LM(ModelSettings.model_validate(SMALL), BOS), batch(2)
    state = LaneState.empty(2, plain.settings, torch.device("cpu"), torch.float32)
    losses, _ = trained(*data, state, torch.tensor(1.0))
    trained.backward(losses.sum(), torch.tensor(data[0].numel()))
    (plain(*data, state, torch.tensor(1.0))[0].sum() / data[0].numel()).backward()
    gradients = [p.grad.flatten() for p in plain.compressor.parameters() if p.grad is not None]
    wanted = float(torch.cat(gradients).norm())
    assert trained.gradient_norm_of("compressor.") == pytest.approx(wanted, rel=1e-4)
    trained.step(0.0)


def test_state_goes_out_and_comes_back_in() -> None:
    """A fresh engine that takes the fragments goes on exactly like the old one."""
    old, new = build(), build(seed=1)
    for seed in range(3):
        norm_of(old, batch(2, seed), 2)
    state = snapshot(old)
    assert set(state) == {name for name, _ in old.model.named_parameters()}
    assert all(t.abs().sum() > 0 for s in state.values() for k, t in s.items() if k in adamw.STATES)
    new.load(state, steps=3)
    for seed in range(3, 5):
        assert norm_of(new, batch(2, seed), 2) == norm_of(old, batch(2, seed), 2)
    for name, tensors in snapshot(new).items():
        for key, tensor in tensors.items():
            assert tensor.equal(snapshot(old)[name][key]), (name, key)


def test_decay_reaches_matrices_only() -> None:
    trained = build()
    groups = trained._engine.optimizer.param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_batch_size": 8}, "train_batch_size is computed from the settings"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is computed from the settings"),
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'"),
        ({"zero_optimization": {"stage": 3}}, "stage must be 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, None),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "not supported"),
        (
            {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
            "reduce_scatter must be true",
        ),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "must be true"),
        ({"zero_optimization": {"stage": 2}, "prescale_gradients": True}, "unknown key"),
        ({"gradient_clipping": "auto"}, None),
    ],
)
def test_the_file_holds_engine_matters_only(tmp_path: Path, change: dict, says: str | None) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(json.loads(ZERO2.read_text()) | change))
    if says is None:
        read_engine_config(path)
        return
    with pytest.raises(UserError, match=says):
        read_engine_config(path)


def changed(path: Path, group: str, key: str, value: object) -> Path:
    """The engine's file with one value changed; `group` is "" for the file itself."""
    tree = json.loads(ZERO2.read_text())
    (tree.setdefault(group, {}) if group else tree)[key] = value
    path.write_text(json.dumps(tree))
    return path


ZERO_FIELDS = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
GROUPS = [key for key, rule in config_file.ENGINE_KEYS.items() if isinstance(rule, dict)]
# What the engine makes of ZeRO's keys, as JSON; of any other value, and any other key, nothing.
HONOURED = {
    **dict.fromkeys(("contiguous_gradients", "reduce_scatter"), "true"),
    **dict.fromkeys(("allgather_partitions", "compute_grad_norm"), "true"),
    **dict.fromkeys(("overlap_comm", "round_robin_gradients", "parameter_alignment"), "false"),
    **dict.fromkeys(("cpu_offload", "cpu_offload_param"), "false"),
    **dict.fromkeys(("zero_quantized_weights", "zero_quantized_gradients"), "false"),
    **dict.fromkeys(("offload_param", "offload_optimizer"), "null {}"),
    "stage": "2",
    "reduce_bucket_size": '2 1000 999 500000000.0 "auto"',
    "allgather_bucket_size": '2 1000 500000000.0 "auto"',
}
VALUES = (True, False, 2, 1000, 999, 5e8, -2, 2.5, None, {}, {"device": "cpu"}, "true", "auto")


@pytest.mark.parametrize("key", sorted(ZERO_FIELDS | set(DeepSpeedZeroConfig.model_fields)))
def test_every_key_of_zero_is_honoured_or_refused_by_name(tmp_path: Path, key: str) -> None:
    for value in VALUES:
        path = changed(tmp_path / "zero.json", "zero_optimization", key, value)
        if json.dumps(value) in HONOURED.get(key, "").split():
            read_engine_config(path)
        else:
            with pytest.raises(UserError, match=rf"zero_optimization\.{key}\b"):
                read_engine_config(path)


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_key_is_refused_in_every_group(tmp_path: Path, group: str) -> None:
    with pytest.raises(UserError, match=rf"unknown key '{group}\.surprise'.*legal: "):
        read_engine_config(changed(tmp_path / "zero.json", group, "surprise", 1))
    with pytest.raises(UserError, match=f"{group} is not a JSON object"):
        read_engine_config(changed(tmp_path / "zero.json", "", group, [1]))


@pytest.mark.parametrize(
    ("group", "key", "value", "says"),
    [
        ("bf16", "enabled", "true", "bf16.enabled must be true or false"),
        ("bf16", "enabled", 2, "bf16.enabled must be true or false"),
        ("bf16", "immediate_grad_update", True, "bf16.immediate_grad_update is not supported"),
        ("data_types", "grad_accum_dtype", "bf16", "data_types.grad_accum_dtype must be"),
        ("data_types", "buffer_dtype", "bf16", "unknown key 'data_types.buffer_dtype'"),
        ("comms_logger", "enabled", True, "comms_logger.enabled is not supported"),
        ("compile", "deepcompile", True, "compile.deepcompile is not supported"),
        ("flops_profiler", "profile_step", "5", "flops_profiler.profile_step must be"),
        ("", "dump_state", True, "dump_state is not supported"),
        ("", "wall_clock_breakdown", "no", "wall_clock_breakdown must be"),
        ("", "communication_data_type", "int8", "communication_data_type must be"),
        ("", "fp16", {"enabled": False}, "unknown key 'fp16'"),
    ],
)
def test_a_value_without_effect_is_refused(
    tmp_path: Path, group: str, key: str, value: object, says: str
) -> None:
    with pytest.raises(UserError) as error:
        read_engine_config(changed(tmp_path / "zero.json", group, key, value))
    assert says in str(error.value)


def test_a_key_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2, "stage": 2}}')
    with pytest.raises(UserError, match="key 'stage' is there twice"):
        read_engine_config(path)


def test_what_decides_numbers_outlives_keys_that_do_not() -> None:
    """Checkpoints hold it; older ones with keys that had no effect and are refused by now."""
    old = {
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16"},
        "communication_data_type": "fp32",
    }
    now = config_file.numeric_part(read_engine_config(ZERO2))
    assert config_file.numeric_part(old) == now == config_file.numeric_part(now)
    old["bf16"] = {"enabled": False}
    assert config_file.numeric_part(old) != now


@pytest.mark.parametrize("content", ["", "[]", "{", "3"])
def test_a_broken_file_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_engine_config(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.json"):
        read_engine_config(Path("nowhere.json"))


@pytest.mark.parametrize("bf16", [True, False])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_changes_nothing(bf16: bool) -> None:
    trained = build(bf16=bf16)
    norm_of(trained, batch(2), 2)
    before = snapshot(trained)
    with torch.no_grad():
        trained.model.head.weight.fill_(float("inf"))
    assert not math.isfinite(norm_of(trained, batch(1), 1))
    for name, tensors in snapshot(trained).items():
        for key, tensor in tensors.items():
            assert tensor.equal(before[name][key]), (name, key)


@pytest.mark.parametrize(
    ("sums", "limit"),
    [([math.nan, 0.0], math.inf), ([math.inf, 0.0], math.inf), ([1.0, 0.0], 1e-9)],
)
def test_a_skipped_step_is_as_if_it_had_never_been(sums: list[float], limit: float) -> None:
    """The steps after it too: AdamW does not count it, and gradients do not stay."""
    skipping, plain = build(), build()
    for engine_ in (skipping, plain):
        norm_of(engine_, batch(2, 0), 2)
    backward(skipping, batch(2, 7), 2)
    skipped = skipping.step(1e-2, torch.tensor(sums), limit)
    assert not skipped.updated and skipped.norm > 0
    assert skipped.sums == pytest.approx(sums, nan_ok=True)
    continued = build(seed=1)
    continued.load(snapshot(skipping), steps=1)
    norms = {norm_of(engine_, batch(2, 1), 2) for engine_ in (skipping, plain, continued)}
    assert len(norms) == 1
    for name, tensors in snapshot(plain).items():
        for key, tensor in tensors.items():
            assert tensor.equal(snapshot(skipping)[name][key]), (name, key)
            assert tensor.equal(snapshot(continued)[name][key]), (name, key)


def test_a_step_says_what_it_came_to() -> None:
    trained = build()
    backward(trained, batch(1), 1)
    stepped = trained.step(1e-2, torch.tensor([2.5, 1.0]))
    assert stepped.updated and stepped.sums == [2.5, 1.0]


def test_gradients_above_the_bound_are_scaled_down_to_it() -> None:
    """AdamW's first moment after one step is a tenth of the gradient that it was given."""
    trained = build(clip=0.01)
    assert norm_of(trained, batch(1), 1) > 0.02
    moments = [tensors["exp_avg"] for tensors in snapshot(trained).values()]
    norm = sum(float(moment.square().sum()) for moment in moments) ** 0.5
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-4)
