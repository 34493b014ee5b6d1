"""Checkpoints of one process: whole or refused, and the same whoever wrote which part."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from i3dist import checkpoint
from i3dist.checkpoint import OptimizerReader, RunState
from i3dist.config import ModelSettings, Settings
from i3dist.dist import Job
from i3dist.engine import ADAM_STATES, Fragment
from i3dist.errors import UserError
from i3dist.model.state import LaneState
from tests.model.conftest import SMALL

JOB = Job.detect({})
MODEL = ModelSettings.model_validate(SMALL | {"state_carry": True})


def random_lanes(rows: int) -> LaneState:
    empty = LaneState.empty(rows, MODEL, torch.device("cpu"), torch.bfloat16)
    return LaneState.from_tensors(
        {name: torch.randn(t.shape).to(t.dtype) for name, t in empty.tensors().items()}
    )


def fragment(name: str, start: int, size: int) -> Fragment:
    return Fragment(name, start, {k: torch.randn(size) for k in ("weight", *ADAM_STATES)})


def save(folder: Path, step: int, keep: int = 2) -> tuple[Path, list[Fragment], LaneState]:
    settings = Settings().to_dict()
    state = RunState(step=step, windows=step, tokens_seen=1, settings=settings, data="x", engine={})
    parts = [fragment("a.weight", 0, 5), fragment("b", 0, 3)]
    lanes = random_lanes(2)
    path = checkpoint.save(folder, JOB, state, parts, (range(2), lanes), keep)
    return path, parts, lanes


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path, parts, lanes = save(tmp_path, 7)
    assert checkpoint.find_latest(tmp_path) == path
    assert checkpoint.read_state(path).step == 7
    checkpoint.verify(path, JOB)
    reader = OptimizerReader(path)
    assert set(reader) == {"a.weight", "b"}
    for part in parts:
        assert all(reader[part.name][key].equal(t) for key, t in part.tensors.items())
    back = checkpoint.read_lanes(path, range(2), torch.device("cpu"))
    for name, tensor in lanes.tensors().items():
        assert back.tensors()[name].equal(tensor) and back.tensors()[name].dtype == tensor.dtype


def test_parts_of_several_ranks_join_by_name_and_lane(tmp_path: Path) -> None:
    """A parameter cut across ranks, and lanes written by one rank and read by another."""
    path, _, _ = save(tmp_path, 1)
    whole: dict[str, Tensor] = {k: torch.randn(9) for k in ("weight", *ADAM_STATES)}
    lanes = random_lanes(4)
    for rank, cut in enumerate((slice(0, 4), slice(4, 9))):
        part = Fragment("w", cut.start, {k: t[cut] for k, t in whole.items()})
        numbers = range(2 * rank, 2 * rank + 2)
        rows = lanes.rows(numbers.start, numbers.stop)
        checkpoint._write_share(path, rank, [part], (numbers, rows))
    assert all(OptimizerReader(path)["w"][key].equal(t) for key, t in whole.items())
    middle = checkpoint.read_lanes(path, range(1, 3), torch.device("cpu"))
    assert middle.latents.equal(lanes.latents[1:3])


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000010"]


def test_a_future_that_was_given_up_is_dropped(tmp_path: Path) -> None:
    """A run that continues from an earlier checkpoint keeps what it then writes."""
    for step in (100, 200, 300):
        save(tmp_path, step, keep=9)
    (tmp_path / "latest").write_text("step-00000100")
    path, _, _ = save(tmp_path, 150, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000100", "step-00000150"]
    assert checkpoint.find_latest(tmp_path) == path


def test_what_was_left_unfinished_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.partial").mkdir()
    save(tmp_path, 9)
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": {}}', "x"])
def test_a_manifest_that_lists_less_than_there_is_verifies_nothing(
    tmp_path: Path, manifest: str
) -> None:
    path, _, _ = save(tmp_path, 1)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError) as error:
        checkpoint.verify(path, JOB)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file", ["state.json", "optimizer-00000.safetensors", "lanes-00000.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_damage_is_found_before_anything_is_loaded(tmp_path: Path, file: str, damage: str) -> None:
    path, _, _ = save(tmp_path, 1)
    target = path / file
    content = bytearray(target.read_bytes())
    if damage == "missing":
        target.unlink()
    elif damage == "cut":
        target.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 4
        target.write_bytes(content)
    with pytest.raises(UserError, match=file):
        checkpoint.verify(path, JOB)


def test_a_latest_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find_latest(tmp_path)


def test_an_unfinished_checkpoint_is_never_seen(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.partial").mkdir()
    assert checkpoint.find_latest(tmp_path) is None
    path, _, _ = save(tmp_path, 5)
    assert checkpoint.find_latest(tmp_path) == path
    assert not list(tmp_path.glob(".*"))


def test_a_strange_state_is_one_line(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1)
    (path / "state.json").write_text(json.dumps({"step": "many"}))
    with pytest.raises(UserError, match=r"state\.json") as error:
        checkpoint.read_state(path)
    assert "\n" not in str(error.value)
