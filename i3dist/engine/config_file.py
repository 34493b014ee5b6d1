"""The engine's file, configs/zero2.json: which of DeepSpeed's settings it may hold."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from i3dist.errors import UserError
from i3dist.files import regular


class Legal(NamedTuple):
    """Which values a key may have."""

    says: str
    holds: Callable[[Any], bool]


def _one_of(*values: object) -> Legal:
    return Legal(" or ".join(map(json.dumps, values)), lambda value: value in values)


def _is_whole(value: object) -> bool:
    """JSON may write 500000000 as 5e8."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _elements(step: int) -> Legal:
    return Legal(
        f'a multiple of {step} above 0, or "auto"',
        lambda value: value == "auto" or (_is_whole(value) and value > 0 and value % step == 0),
    )


SWITCH, ON = _one_of(True, False), _one_of(True)
OFF, NOTHING = _one_of(False), _one_of(None, {})  # anything else is "not supported"
WHOLE = Legal("a whole number", _is_whole)
DTYPE = Legal(
    "fp32, bf16 or fp16", lambda value: str(value).lower() in ("none", "fp32", "bf16", "fp16")
)
# The trainer computes these from its own settings; the file leaves them out or says "auto".
OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
# All that the file may hold. DeepSpeed (0.19.8) ignores unknown top-level keys and, with ZeRO-2,
# many known ones; `Zero2Engine` replaces others. Keys without effect are refused, except switches
# for what the engine always does (`ON`) or never does (`OFF`, `NOTHING`).
ENGINE_KEYS: dict[str, Any] = {
    "bf16": {
        "enabled": SWITCH,
        "check_grad_overflow": ON,  # `Engine.step` does
        "immediate_grad_update": OFF,
        "bf16_master_weights_and_grads": OFF,
        "bf16_optimizer_states": OFF,
    },
    "data_types": {"grad_accum_dtype": _one_of("fp32", "float32", "float", "torch.float32")},
    "communication_data_type": DTYPE,
    "zero_optimization": {
        "stage": _one_of(2),
        "contiguous_gradients": ON,
        "reduce_scatter": ON,
        "reduce_bucket_size": _elements(1),
        "allgather_bucket_size": _elements(2),
        "allgather_partitions": ON,
        "compute_grad_norm": ON,  # `Engine.step` does
        "overlap_comm": OFF,  # `Zero2Engine._reduce` runs on backward's stream
        "round_robin_gradients": OFF,
        "parameter_alignment": OFF,
        "offload_optimizer": NOTHING,
        "offload_param": NOTHING,
        "cpu_offload": OFF,
        "cpu_offload_param": OFF,
        "zero_quantized_weights": OFF,
        "zero_quantized_gradients": OFF,
    },
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": OFF,
    "comms_logger": {"enabled": OFF},
    "compile": {"deepcompile": OFF},
    "flops_profiler": {
        "enabled": SWITCH,
        "profile_step": WHOLE,
        "module_depth": WHOLE,
        "top_modules": WHOLE,
        "detailed": SWITCH,
        "recompute_fwd_factor": Legal("a number", lambda v: type(v) in (int, float)),
        "output_file": Legal("a path or null", lambda v: v is None or isinstance(v, str)),
    },
}
# Keys that decide numbers, which a run keeps; of a group, the one key that does.
NUMERIC_KEYS = {"bf16": "enabled", "data_types": "grad_accum_dtype", "communication_data_type": ""}


def read_engine_file(path: Path) -> dict[str, Any]:
    """Read the engine's file (configs/zero2.json), and check every key and value.

    Raises:
        UserError: unreadable, not ZeRO-2, or a key or value that the engine does not honour.
    """
    try:
        config = json.loads(regular(path).read_text("utf-8"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise UserError(f"cannot read engine config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"engine config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"engine config {path} is not a JSON object")
    for key in OURS:
        if config.pop(key, "auto") != "auto":
            raise UserError(
                f"engine config {path}: {key} is computed from the settings; remove it or write "
                '"auto", and use train.* and optimizer.* settings'
            )
    _check_keys(config, ENGINE_KEYS, f"engine config {path}: ")
    if "stage" not in config.get("zero_optimization", {}):
        raise UserError(f"engine config {path}: zero_optimization.stage must be 2")
    return config


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; if a key is there twice, Python would silently take the last value."""
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"key {counts.most_common(1)[0][0]!r} is there twice")
    return dict(pairs)


def _check_keys(config: Any, legal: dict[str, Any], where: str, group: str = "") -> None:
    """Raise `UserError` unless a group of the file holds only `legal` keys and values."""
    if not isinstance(config, dict):
        raise UserError(f"{where}{group} is not a JSON object")
    for key, value in config.items():
        name, rule = f"{group}.{key}" if group else key, legal.get(key)
        if rule is None:
            here = ", ".join(legal)
            raise UserError(f"{where}unknown key {name!r}, not supported here; legal: {here}")
        if isinstance(rule, dict):
            _check_keys(value, rule, where, name)
        elif not rule.holds(value):
            off = rule in (OFF, NOTHING)
            wrong = "is not supported; remove it" if off else f"must be {rule.says}"
            raise UserError(f"{where}{name} {wrong}")


def numeric_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of the engine's file that decides numbers and therefore stays a run's.

    Applied to its own result, it returns the same.
    """
    part = {}
    for key, decides in NUMERIC_KEYS.items():
        if key in config:
            value = config[key]
            part[key] = {k: v for k, v in value.items() if k == decides} if decides else value
    return part
