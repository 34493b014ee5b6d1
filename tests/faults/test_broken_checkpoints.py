"""Two ranks meet broken checkpoints and a full disk. About 30 s, with the undisturbed run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from i3dist.tracking.metrics_log import STARTS, read_lines
from tests.conftest import QUICK, SAVING, deepspeed, error_line, losses, program, run_ranks
from tests.faults.test_hostile import with_tensors, without


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_whole_one_is_taken_and_said(whole: Path, data: Path, tmp_path: Path) -> None:
    """The newest has a bit flipped, the next is cut short; the one before continues, exactly."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(run / "checkpoints" / "step-00000012" / "optimizer-00001.safetensors")
    os.truncate(run / "checkpoints" / "step-00000010" / "lanes-00000.safetensors", 100)
    (run / "checkpoints" / ".step-00000014.partial").mkdir()
    result = run_ranks(*QUICK, *SAVING, f"data.path={data}", f"run.path={run}")
    assert result.returncode == 0, result.stderr
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("warning: checkpoint")]
    assert "step-00000012 is refused: optimizer-00001.safetensors is altered" in line
    assert "step-00000010 is refused: lanes-00000.safetensors has 100 of" in line
    assert line.endswith("step-00000005 is taken instead")
    assert "continued from step 5\n" in result.stdout
    assert read_lines(run / STARTS)[-1]["step"] == 5, "by which requeues are counted"
    assert not list((run / "checkpoints").glob(".*")), "a killed run's leftovers are cleared"
    assert losses(run) == losses(whole)
    for name in ("model.safetensors", "checkpoints/step-00000012/optimizer-00001.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_no_whole_checkpoint_is_one_line(whole: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").glob("step-*"):
        flip(path / "optimizer-00000.safetensors")
    words = [*QUICK, *SAVING, f"data.path={data}", f"run.path={run}"]
    files = [path for path in run.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    line = error_line(program("launch/train.py", *words, "train.steps=20"))
    assert "no whole one is left" in line and "--fresh" in line
    assert {path: path.read_bytes() for path in before} == before


def test_a_missing_tensor_is_one_line(whole: Path, data: Path, tmp_path: Path) -> None:
    """Every file is what its manifest says, but rank 1's has not the weights of one parameter."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest, file = run / "checkpoints" / "step-00000012", "optimizer-00001.safetensors"
    missing = next(key for key in load_file(newest / file) if key.startswith("weight/"))
    with_tensors(newest, file, without(missing))
    words = [*QUICK, *SAVING, f"data.path={data}", f"run.path={run}"]
    line = error_line(program("launch/train.py", *words))
    assert str(newest) in line and missing.split("/")[2] in line and "remove its folder" in line


# Runs its arguments with $1 as a file system that has room for one checkpoint and a half, and
# leaves what is then in it in $1.
SMALL_DISK = """
mkdir -p "$1" && mount -t tmpfs -o "size=$2" none "$1" || exit 99
kept=$1.kept run=$1; shift 2
"$@"; code=$?
cp -a "$run" "$kept"
exit $code
"""


def test_a_full_disk_while_saving(whole: Path, data: Path, tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("a small file system needs root and namespaces")
    run = tmp_path / "run"
    size = sum(f.stat().st_size for f in (whole / "checkpoints" / "step-00000005").iterdir())
    disk = ["unshare", "--mount", "sh", "-c", SMALL_DISK, "sh", run, int(1.6 * size)]
    words = [*QUICK, *SAVING, f"data.path={data}", f"run.path={run}"]
    result = deepspeed(*words, before=disk, timeout=120)
    assert "checkpoint" in error_line(result) and "No space left on device" in error_line(result)
    kept = Path(f"{run}.kept")
    assert (kept / "checkpoints" / "latest").read_text() == "step-00000005"
    assert [p.name for p in (kept / "checkpoints").glob("*step*")] == ["step-00000005"]
    for file in ("optimizer-00000.safetensors", "lanes-00001.safetensors"):
        name = f"checkpoints/step-00000005/{file}"
        assert (kept / name).read_bytes() == (whole / name).read_bytes()
