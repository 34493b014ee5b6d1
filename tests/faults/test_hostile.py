"""Files made to do harm: refused in one line, nothing run, nothing written outside.

Whoever made them may have made the manifest too, so sizes and hashes agree here.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from i3dist.checkpoint.reader import OptimizerReader, read_lanes
from i3dist.checkpoint.verify import fault
from i3dist.config import Settings
from i3dist.data.archive import chunks_of, shard_bytes
from i3dist.data.manifest import MANIFEST_NAME, Manifest, member_name
from i3dist.data.shards import read_shard
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.optim import adamw
from tests.checkpoint.test_format import random_lanes, save
from tests.conftest import error_line, program


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def harmful_pickle(mark: Path) -> bytes:
    """A pickle that works: seen here, and undone."""
    data = pickle.dumps(Harm(mark))
    pickle.loads(data)
    mark.rmdir()
    return data


def listing(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-"
        for path in sorted(folder.rglob("*"))
    }


def member(name: str, payload: bytes = b"", **fields: object) -> bytes:
    """A member with its header as `fields` say, in the format that can say it."""
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + payload + bytes(-len(payload) % 512)


def pax(kind: bytes, record: str) -> bytes:
    """A header of the kind that changes the member after it (x), or all of them (g)."""
    line = next(
        f"{n} {record}\n" for n in range(999) if len(f"{n} {record}\n".encode()) == n
    ).encode()
    return member("././@PaxHeader", line, type=kind)


NAME = member_name(0, 0)
CHUNK = bytes(1024)
HOSTILE: dict[str, bytes] = {
    "../ name": member("../escaped.u16", CHUNK),
    "absolute name": member("/tmp/escaped.u16", CHUNK),
    "symbolic link": member(NAME, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member(NAME, type=tarfile.LNKTYPE, linkname="../../escaped"),
    "device": member(NAME, type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "fifo": member(NAME, type=tarfile.FIFOTYPE),
    "folder": member("../escaped/", type=tarfile.DIRTYPE),
    "8 GiB declared": member(NAME, size=8 << 30) + CHUNK,
    "2^80 bytes declared": member(NAME, size=1 << 80) + CHUNK,
    "pax path": pax(b"x", "path=../../escaped.u16") + member(NAME, CHUNK),
    "pax size": pax(b"x", "size=99999999999") + member(NAME, CHUNK),
    "global pax": pax(b"g", "linkpath=/etc/passwd") + member(NAME, CHUNK),
    "sparse": member(NAME, CHUNK, type=tarfile.GNUTYPE_SPARSE),
    "setuid": member(NAME, CHUNK, mode=0o4777),
    "other name": member("000000-000000.pyd", CHUNK),
}


def with_shard(data: Path, target: Path, content: bytes) -> tuple[Path, Manifest]:
    """A copy of a split whose first shard is `content`, as its manifest says."""
    shutil.copytree(data / "train", target)
    manifest = Manifest.load(target)
    shard = manifest.shards[0]
    assert len(content) == shard.size
    (target / shard.name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    shards = (shard.model_copy(update={"sha256": digest}), *manifest.shards[1:])
    manifest.model_copy(update={"shards": shards}).write(target)
    return target, Manifest.load(target)


def first_shard(data: Path) -> bytes:
    return (data / "train" / "shard-000000.tar").read_bytes()


def refused(folder: Path, manifest: Manifest) -> None:
    before = listing(folder.parent)
    with pytest.raises(UserError, match=r"shard-000000\.tar: not a shard of this") as error:
        read_shard(folder, manifest, 0)
    assert "\n" not in str(error.value)
    assert listing(folder.parent) == before


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["instead of the first member", "before all", "after all"])
def test_a_hostile_archive_is_refused(data: Path, tmp_path: Path, kind: str, place: str) -> None:
    good, evil = first_shard(data), HOSTILE[kind]
    size, end = len(good), 8 * 1536
    content = {
        "instead of the first member": evil + good[max(1536, len(evil)) :],
        "before all": evil + good,
        "after all": good[:end] + evil,
    }[place]
    refused(*with_shard(data, tmp_path / "train", content[:size].ljust(size, b"\0")))


@pytest.mark.parametrize("suffix", ["pkl", "pyd", "pth", "u16"])
def test_a_pickle_in_a_shard_is_never_loaded(data: Path, tmp_path: Path, suffix: str) -> None:
    harm = harmful_pickle(tmp_path / "mark").ljust(1024, b"\0")
    evil = member(f"000000-000000.{suffix}", harm)
    content = (evil + first_shard(data)[len(evil) :])[: len(first_shard(data))]
    refused(*with_shard(data, tmp_path / "train", content))
    assert not (tmp_path / "mark").exists()


def test_tokens_beyond_the_vocabulary_are_refused(data: Path, tmp_path: Path) -> None:
    """They would be looked up beyond the embedding's end."""
    tokens = chunks_of(first_shard(data), 8, 512).copy()
    tokens[3, 77] = Manifest.load(data / "train").vocab_size
    refused(*with_shard(data, tmp_path / "train", shard_bytes(0, tokens)))


def test_another_shards_archive_is_refused(data: Path, tmp_path: Path) -> None:
    tokens = np.array(chunks_of(first_shard(data), 8, 512))
    refused(*with_shard(data, tmp_path / "train", shard_bytes(1, tokens)))


def test_a_pickle_for_a_manifest_is_refused(data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data / "train", tmp_path / "train")
    (folder / MANIFEST_NAME).write_bytes(harmful_pickle(tmp_path / "mark"))
    with pytest.raises(UserError, match=r"manifest\.json is not a valid manifest"):
        Manifest.load(folder)
    assert not (tmp_path / "mark").exists()


def let_manifest_agree(path: Path, name: str) -> None:
    """Have a checkpoint's manifest list a file as it now is."""
    listed = json.loads((path / "manifest.json").read_text())
    content = (path / name).read_bytes()
    digest = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    listed["files"][name] = digest
    (path / "manifest.json").write_text(json.dumps(listed))
    assert fault(path, Job.detect({})) is None


@pytest.mark.parametrize("kind", ["optimizer", "lanes"])
def test_a_pickle_in_a_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    """Its manifest agrees with it, so the hashes do not tell."""
    path, _, _ = save(tmp_path / "checkpoints", 1)
    torch.save({"harm": Harm(tmp_path / "mark")}, path / f"{kind}-00000.safetensors")
    let_manifest_agree(path, f"{kind}-00000.safetensors")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"{kind}-00000.safetensors is not a safetensors") as error:
        OptimizerReader(path)
        read_lanes(path, range(2), random_lanes(2))
    assert "\n" not in str(error.value)
    assert listing(tmp_path) == before


Tensors = dict[str, torch.Tensor]


def with_tensors(path: Path, name: str, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of one of a checkpoint's files, its manifest agreeing."""
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)
    let_manifest_agree(path, name)


def without(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def renamed(name: str, to: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({to: tensors.pop(name)})


def reshaped(name: str, *shape: int) -> Callable[[Tensors], object]:
    """Cut to so many elements, of that shape."""
    return lambda tensors: tensors.update(
        {name: tensors[name].flatten()[: math.prod(shape)].view(shape).clone()}
    )


def widened(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].double()})


B = [f"{kind}/0/b" for kind in ("weight", *adamw.STATES)]
MALFORMED = {
    "no parameter": ("optimizer", without(*B), "has 0 of 3 elements of weight b"),
    "no moment": ("optimizer", without(B[2]), "has 0 of 3 elements of exp_avg_sq b"),
    "too short": ("optimizer", reshaped(B[0], 2), "has 2 of 3 elements of weight b"),
    "no first part": ("optimizer", renamed(B[1], "exp_avg/2/b"), r"exp_avg/2/b of shape \[3\]"),
    "a matrix": ("optimizer", reshaped(B[0], 3, 1), r"weight/0/b of shape \[3, 1\]"),
    "no number": ("optimizer", renamed(B[0], "weight/x/b"), "no tensor named 'weight/x/b'"),
    "minus": ("optimizer", renamed(B[0], "weight/-1/b"), "no tensor named 'weight/-1/b'"),
    "two zeros": ("optimizer", renamed(B[0], "weight/00/b"), "no tensor named 'weight/00/b'"),
    "huge": ("optimizer", renamed(B[0], f"weight/{'9' * 5000}/b"), "no tensor named 'weight/99"),
    "other kind": ("optimizer", renamed(B[0], "momentum/0/b"), "no tensor named 'momentum/0/b'"),
    "one word": ("optimizer", renamed(B[0], "weight"), "no tensor named 'weight'"),
    "no lane": (
        "lanes",
        without(*(f"1/{name}" for name in random_lanes(2).tensors())),
        "no latents of lane 1",
    ),
    "half a lane": ("lanes", without("0/wkv"), "has no wkv of lane 0"),
    "lane x": ("lanes", renamed("1/latents", "x/latents"), "no tensor named 'x/latents'"),
    "lane 01": ("lanes", renamed("1/latents", "01/latents"), "no tensor named '01/latents'"),
    "other shape": ("lanes", reshaped("1/latents", 3, 2), r"latents of lane 1 is \[3, 2\] of"),
    "other numbers": ("lanes", widened("0/latents"), "latents of lane 0 is .* of torch.float64"),
    "no such state": ("lanes", renamed("1/latents", "1/harm"), "no tensor named '1/harm'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors_of_a_checkpoint_are_one_line(tmp_path: Path, case: str) -> None:
    """Its manifest agrees, so nothing but what its files hold tells."""
    kind, change, says = MALFORMED[case]
    path, parts, _ = save(tmp_path / "checkpoints", 1)
    with_tensors(path, f"{kind}-00000.safetensors", change)
    with pytest.raises(UserError, match=says) as error:
        OptimizerReader(path).check({part.name: len(part.tensors["weight"]) for part in parts})
        read_lanes(path, range(2), random_lanes(2))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "remove its folder" in str(error.value)


@pytest.mark.parametrize("name", ["../latest", "/etc/passwd", "a/../../latest", "", "a\nb"])
def test_a_checkpoint_lists_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    path, _, _ = save(tmp_path / "checkpoints", 1)
    listed = json.loads((path / "manifest.json").read_text())
    listed["files"][name] = {"size": 1, "sha256": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(listed))
    assert fault(path, Job.detect({})) == "manifest.json cannot be read"


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_pickle_for_a_checkpoints_json_is_refused(tmp_path: Path, name: str) -> None:
    path, _, _ = save(tmp_path / "checkpoints", 1)
    (path / name).write_bytes(harmful_pickle(tmp_path / "mark"))
    assert fault(path, Job.detect({})) == f"{name} cannot be read"
    assert not (tmp_path / "mark").exists()


def test_a_pickle_for_the_trained_weights_is_refused(data: Path, tmp_path: Path) -> None:
    """By the program itself: one line and status 1."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(data / "tokenizer.json", run)
    (run / "settings.yaml").write_text(
        Settings.load(Path("configs/tiny.yaml"), ["model.vocab_size=512"]).to_yaml()
    )
    torch.save({"head.weight": Harm(tmp_path / "mark")}, run / "model.safetensors")
    before = listing(tmp_path)
    words = ["--checkpoint", run, "--prompt", "x", "--tokens", 1]
    line = error_line(program("launch/generate.py", *words, timeout=60))
    assert "model.safetensors" in line
    assert listing(tmp_path) == before
