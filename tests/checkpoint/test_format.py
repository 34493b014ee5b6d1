"""Checkpoints of one process: whole or refused, and the same whoever wrote which part."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from i3dist.checkpoint import store, verify, writer
from i3dist.checkpoint.format import (
    FileDigest,
    Fragment,
    GuardState,
    RunState,
    read_state,
    tensors_of_rank,
)
from i3dist.checkpoint.reader import OptimizerReader, read_lanes
from i3dist.config import CheckpointSettings, ModelSettings, Settings
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.model.state import LaneState
from i3dist.optim import adamw
from tests.model.conftest import SMALL

JOB = Job.detect({})
MODEL = ModelSettings.model_validate(SMALL | {"state_carry": True})


def random_lanes(rows: int) -> LaneState:
    empty = LaneState.empty(rows, MODEL, torch.device("cpu"), torch.bfloat16)
    return LaneState.from_tensors(
        {name: torch.randn(t.shape).to(t.dtype) for name, t in empty.tensors().items()}
    )


def fragment(name: str, start: int, size: int) -> Fragment:
    return Fragment(name, start, {k: torch.randn(size) for k in ("weight", *adamw.STATES)})


def state_of(step: int, guard: GuardState | None = None) -> RunState:
    return RunState(
        step=step,
        windows=step,
        tokens_seen=1,
        settings=Settings().to_dict(),
        data="x",
        engine={},
        guard=guard or GuardState(),
    )


def save(
    folder: Path, step: int, keep: int = 2, guard: GuardState | None = None
) -> tuple[Path, list[Fragment], LaneState]:
    parts = [fragment("a.weight", 0, 5), fragment("b", 0, 3)]
    lanes = random_lanes(2)
    retention = CheckpointSettings(keep=keep)
    path = writer.save(
        folder, JOB, state_of(step, guard), parts, (range(2), lanes), retention, b"{}"
    )
    return path, parts, lanes


def whole(path: Path) -> bool:
    return verify.fault(path, JOB) is None


def taken(folder: Path) -> Path | None:
    return store.first_whole(store.candidates(folder), verify.quick_fault)[0]


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path, parts, lanes = save(tmp_path, 7)
    assert taken(tmp_path) == path
    assert read_state(path).step == 7
    assert whole(path)
    reader = OptimizerReader(path)
    assert set(reader) == {"a.weight", "b"}
    for part in parts:
        assert all(reader[part.name][key].equal(t) for key, t in part.tensors.items())
    back = read_lanes(path, range(2), lanes)
    for name, tensor in lanes.tensors().items():
        assert back.tensors()[name].equal(tensor) and back.tensors()[name].dtype == tensor.dtype


def test_parts_of_several_ranks_join_by_name_and_lane(tmp_path: Path) -> None:
    """A parameter cut across ranks, and lanes written by one rank and read by another."""
    path, _, _ = save(tmp_path, 1)
    whole: dict[str, Tensor] = {k: torch.randn(9) for k in ("weight", *adamw.STATES)}
    lanes = random_lanes(4)
    for rank, cut in enumerate((slice(0, 4), slice(4, 9))):
        part = Fragment("w", cut.start, {k: t[cut] for k, t in whole.items()})
        numbers = range(2 * rank, 2 * rank + 2)
        rows = lanes.rows(numbers.start, numbers.stop)
        writer.write_files(path, tensors_of_rank(rank, [part], (numbers, rows)))
    reader = OptimizerReader(path)
    reader.check({"w": 9})
    assert all(reader["w"][key].equal(t) for key, t in whole.items())
    middle = read_lanes(path, range(1, 3), lanes)
    assert middle.latents.equal(lanes.latents[1:3])


TENSORS = st.dictionaries(
    st.text(max_size=5),
    st.builds(
        lambda shape, dtype: (100 * torch.randn(shape)).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    ),
    max_size=5,
)


@given(TENSORS, st.dictionaries(st.just("step"), st.text(max_size=5)))
def test_files_are_what_the_library_writes_and_digests_are_theirs(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "tensors"
    path.unlink(missing_ok=True)
    digest = writer.write_tensors(path, tensors, **metadata)
    assert path.read_bytes() == safetensors.torch.save(tensors, metadata or None)
    assert digest == FileDigest.of(path)
    assert path.stat().st_mode & 0o777 == 0o600, "for its owner, as the library's"


def test_hashing_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, real = threading.Event(), writer._sha256

    def sha256(content: list[bytes | memoryview]) -> str:
        digest = real(content)
        hashed.set()
        return digest

    def sync(_: int) -> None:
        assert hashed.wait(10), "nothing is hashed before the file is on disk"

    monkeypatch.setattr(writer, "_sha256", sha256)
    monkeypatch.setattr(os, "fsync", sync)
    writer.write_tensors(tmp_path / "tensors", {"a": torch.ones(3)})


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_of_bad_steps_push_out_none_from_before_them(tmp_path: Path, keep: int) -> None:
    """Rolling back needs those; when steps are good again only the newest stay."""
    for step, bad in enumerate((0, 0, 1, 2, 3), start=1):
        save(tmp_path, step, keep, GuardState(skipped=bad, bad=bad))
    before, among = {1: ([2], [5]), 2: ([1, 2], [4, 5])}[keep]
    assert sorted(store.steps(tmp_path)) == before + among
    save(tmp_path, 6, keep, GuardState(skipped=3))
    assert sorted(store.steps(tmp_path)) == [5, 6][-keep:]


def test_steps_that_updated_nothing_are_not_counted_as_taken() -> None:
    """AdamW's step count; that of a checkpoint which has no guard is its step."""
    assert state_of(9, GuardState(skipped=4)).taken == 5
    assert state_of(9).taken == 9


def test_a_future_that_was_given_up_is_dropped(tmp_path: Path) -> None:
    """A run that continues from an earlier checkpoint keeps what it then writes."""
    for step in (100, 200, 300):
        save(tmp_path, step, keep=9)
    (tmp_path / "latest").write_text("step-00000100")
    path, _, _ = save(tmp_path, 150, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000100", "step-00000150"]
    assert taken(tmp_path) == path


def test_a_killed_runs_leftovers_are_written_over(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.partial").mkdir()
    (tmp_path / ".step-00000009.partial" / "lanes-00007.safetensors").touch()
    path, _, _ = save(tmp_path, 9)
    assert whole(path)


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": {}}', "x"])
def test_a_manifest_that_lists_less_than_there_is_verifies_nothing(
    tmp_path: Path, manifest: str
) -> None:
    path, _, _ = save(tmp_path, 1)
    (path / "manifest.json").write_text(manifest)
    assert not whole(path)


FILES = ["manifest.json", "state.json", "optimizer-00000.safetensors", "lanes-00000.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "longer"])
def test_damage_is_found_and_the_one_before_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    before, _, _ = save(tmp_path, 1)
    path, _, _ = save(tmp_path, 2)
    target = path / file
    content = bytearray(target.read_bytes())
    if damage == "missing":
        target.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
        target.write_bytes(content)
    else:
        target.write_bytes(content[:-1] if damage == "cut" else content + b"}")
    assert verify.newest_whole(tmp_path, JOB) == before
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{path} is refused" in line and f"{before.name} is taken" in line
    assert file in line or "is altered" in line  # a flipped manifest may blame another file


def test_where_none_is_whole_nothing_is_taken(tmp_path: Path) -> None:
    for step in (1, 2):
        path, _, _ = save(tmp_path, step)
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000002.*step-00000001.*--fresh") as error:
        taken(tmp_path)
    assert "\n" not in str(error.value)


def test_an_unfinished_checkpoint_is_never_seen(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.partial").mkdir()
    assert taken(tmp_path) is None
    path, _, _ = save(tmp_path, 5)
    assert taken(tmp_path) == path
    assert not list(tmp_path.glob(".*"))


def test_a_strange_state_is_one_line(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1)
    (path / "state.json").write_text(json.dumps({"step": "many"}))
    with pytest.raises(UserError, match=r"state\.json") as error:
        read_state(path)
    assert "\n" not in str(error.value)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")


@pytest.mark.parametrize(
    "place",
    ["writer.write_tensors", "writer.os.fsync", "writer.write_whole", "store.write_whole"],
)
def test_a_full_disk_leaves_the_old_state_whole(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _, _ = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(f"i3dist.checkpoint.{place}", full)
        with pytest.raises(UserError, match="No space left") as error:
            save(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob(".*")), "nothing staged is left"
    assert taken(tmp_path) == before and whole(before)
    assert taken(save(tmp_path, 2)[0].parent) == tmp_path / "step-00000002"


def test_every_file_and_folder_is_synced_before_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut can lose is what was not synced when the name that leads to it was made."""
    done: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        real_sync(handle)

    def replace(source: Path, target: Path) -> None:
        done.append(f"name {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "replace", replace)
    save(tmp_path, 3)
    named = done.index("name step-00000003")
    for file in FILES[2:]:
        assert f"sync {file}" in done[:named]
    for file in FILES[:2]:
        assert done.index(f"name {file}") < named
        assert any(f".{file}." in entry for entry in done[:named]), "synced aside"
    assert done[named - 1] == "sync .step-00000003.partial"
    assert f"sync {tmp_path.parent.name}" in done[:named], "it may have no other checkpoint yet"
    assert done[named + 1] == f"sync {tmp_path.name}"
    assert done[-2:] == ["name latest", f"sync {tmp_path.name}"]
