"""A model that was exported to transformers, read back: what its config.json says."""

import json
from pathlib import Path
from typing import Any

from i3dist.cli.layer_pattern import write_layers
from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.files import regular

CONFIGURATION, MODEL_TYPE = "config.json", "i3"
# Settings of the model that config.json has under the same names.
SAME = (
    *("vocab_size", "d_model", "heads", "ff_mult", "chunk_length", "latents", "compressor"),
    *("sub_latents", "history_chunks", "state_carry"),
)


def is_export(folder: Path) -> bool:
    """Whether a folder holds an exported model, judged by its config.json."""
    return _configuration(folder).get("model_type") == MODEL_TYPE


def exported_settings(folder: Path) -> Settings:
    """The settings of an exported model; those of its training are the defaults.

    Raises:
        UserError: config.json lacks some, or has an illegal one.
    """
    content = _configuration(folder)
    try:
        values = {name: content[name] for name in SAME}
        return Settings.build({"model": values | {"layers": write_layers(content["layers"])}})
    except (LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / CONFIGURATION} is of no exported model: {reason}") from None
    except UserError as error:
        raise UserError(f"{folder / CONFIGURATION}: {error}") from None


def exported_joined(folder: Path) -> float:
    """The share j of `I3LM.join_softmaxes` of an exported model; 0 in exports of earlier versions.

    Raises:
        UserError: config.json has an illegal one.
    """
    joined = _configuration(folder).get("joined", 0.0)
    if not isinstance(joined, int | float) or not 0 <= joined <= 1:
        raise UserError(f"{folder / CONFIGURATION}: joined={joined!r} should be from 0 to 1")
    return float(joined)


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(regular(folder / CONFIGURATION).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
