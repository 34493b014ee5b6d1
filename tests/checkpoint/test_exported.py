"""An exported model is read back, by what its files say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from i3dist.checkpoint.exported import SAME, exported_settings, is_export
from i3dist.checkpoint.weights import export_weights, load_run
from i3dist.config import Settings
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from tests.known import BOS, MODEL, TOKENIZER


def exported(folder: Path, **changes: Any) -> I3LM:
    """Write what an export holds of a model: config.json, weights, a changed tokenizer.json."""
    settings = Settings().with_values(**MODEL | {"model.layers": "2xrwkv,1xdual-attention"}).model
    model = I3LM(settings, BOS)
    export_weights(folder, model, 3)
    content = {name: getattr(settings, name) for name in SAME}
    content |= {"model_type": "i3", "layers": settings.layer_kinds, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(content | changes))
    template = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer = json.loads(TOKENIZER) | {"post_processor": template | {"use_regex": False}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def test_an_exported_model_is_loaded_as_it_was(tmp_path: Path) -> None:
    model = exported(tmp_path)
    again, settings, tokenizer = load_run(tmp_path, torch.device("cpu"))
    assert settings.model == model.settings and again.joined == 0, "config.json does not say it"
    state = again.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    own = Tokenizer(TOKENIZER, Path("tokenizer.json"))
    assert tokenizer.sha256 != own.sha256 and tokenizer.encodes_like(own)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_model": "wide"}, "config.json: .*model.d_model='wide'"),
        ({"layers": 5}, "config.json is of no exported model"),
        ({"joined": 1.5}, "config.json: joined=1.5 should be from 0 to 1"),
        ({"vocab_size": 300}, "271 entries but model.vocab_size of .* is 300"),
        (
            {"d_model": 24},
            r"model.safetensors does not fit the settings beside it: "
            r"size mismatch for \S+\.weight: .*\[.*; restore it$",
        ),
        ({"model_type": "gpt2"}, "neither the folder of a run nor a checkpoint nor an export"),
    ],
)
def test_one_that_was_changed_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    exported(tmp_path, **changes)
    with pytest.raises(UserError, match=says):
        load_run(tmp_path, torch.device("cpu"))


def test_what_is_missing_or_no_json_is_no_export(tmp_path: Path) -> None:
    assert not is_export(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(text)
        assert not is_export(tmp_path)
    with pytest.raises(UserError, match="is of no exported model: 'vocab_size'"):
        exported_settings(tmp_path)


def test_weights_that_were_cut_are_said_to_be_unreadable(tmp_path: Path) -> None:
    exported(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read: .*; restore it$"):
        load_run(tmp_path, torch.device("cpu"))
