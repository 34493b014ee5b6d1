"""One run on 4, then 2, then 1, then 4 ranks, against one that stays on 4. About 40 s.

Each change is the same command under another number of ranks. A run carries on exactly what was
saved. What it computes then rounds differently where micro-batches or the order of sums differ.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from i3dist.training import ledger
from tests.conftest import QUICK, error_line, losses, program, run_ranks
from tests.faults.test_hostile import renamed, with_tensors

LOSS_TOLERANCE = 2e-3  # nats, in every step
FIGURES_TOLERANCE = 0.01  # of losses and gradient norms, relative


class Part(NamedTuple):
    """So many ranks from a step to a step."""

    ranks: int
    start: int
    stop: int
    micro_batch: int  # lanes at once; there are 4 in all


FIRST = Part(ranks=4, start=0, stop=2, micro_batch=1)
CHANGED = [Part(2, 2, 4, 1), Part(1, 4, 6, 2), Part(4, 6, 8, 1)]
STEPS = CHANGED[-1].stop


class Runs(NamedTuple):
    """A run that stays on 4 ranks, one that changes, and what the latter held at each change."""

    whole: Path
    changing: Path
    noted: dict[Part, Path]


Train = Callable[[Part, Path], Path]


@pytest.fixture(scope="module")
def train(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains one part of a run; returns the folder of what it held when it continued."""
    notes = tmp_path_factory.mktemp("notes")

    def train(part: Part, run: Path) -> Path:
        words = [*QUICK, f"data.path={data}", f"run.path={run}", f"train.steps={part.stop}"]
        words += ["checkpoint.every=2", "checkpoint.keep=9"]
        words += [f"train.micro_batch={part.micro_batch}"]
        noted, script = notes / str(part.start), "tests/distributed/noted.py"
        with pytest.MonkeyPatch.context() as environ:
            environ.setenv("NOTED", str(noted))
            if part.ranks == 1:
                result = program(script, *words)
            else:
                result = run_ranks(*words, ranks=part.ranks, script=script)
        assert result.returncode == 0, result.stderr
        assert (f"continued from step {part.start}\n" in result.stdout) == (part.start > 0)
        return noted

    return train


@pytest.fixture(scope="module")
def runs(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    whole, changing = folder / "whole", folder / "changing"
    train(FIRST._replace(stop=STEPS), whole)
    forget_after(FIRST.stop, whole, changing)
    return Runs(whole, changing, {part: train(part, changing) for part in CHANGED})


def forget_after(step: int, whole: Path, run: Path) -> None:
    """Make `run` what `whole` was when it had just saved a step."""
    later = [f"step-{number:08d}" for number in range(step + 1, STEPS + 1)]
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns(*later, "*.jsonl", "model.*"))
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}")
    for name in ("ledger.jsonl", "metrics.jsonl"):
        lines = (whole / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:step]))


def joined(folder: Path) -> dict[str, Tensor]:
    """Tensors of all ranks in a folder, those of the optimizer put together by parameter."""
    lanes: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for path in folder.glob("lanes-*.safetensors"):
        lanes |= load_file(path)
    for path in folder.glob("optimizer-*.safetensors"):
        for key, tensor in load_file(path).items():
            kind, start, name = key.split("/", 2)
            parts.setdefault(f"{kind} of {name}", []).append((int(start), tensor))
    ordered = {key: sorted(part, key=lambda piece: piece[0]) for key, part in parts.items()}
    return lanes | {key: torch.cat([t for _, t in part]) for key, part in ordered.items()}


@pytest.mark.parametrize("part", CHANGED, ids=lambda part: f"{part.ranks} ranks")
def test_what_was_saved_is_what_is_carried_on(runs: Runs, part: Part) -> None:
    """Weights, optimizer and lanes of all ranks together, bit for bit."""
    noted = runs.noted[part]
    assert len(list(noted.glob("lanes-*"))) == part.ranks
    held = joined(noted)
    saved = joined(runs.changing / "checkpoints" / f"step-{part.start:08d}")
    assert {key.split(" of ")[0] for key in saved} > {"weight", "exp_avg", "exp_avg_sq"}
    assert held.keys() == saved.keys()
    assert not [key for key in saved if not held[key].equal(saved[key])]


def test_every_step_reads_the_same_and_learns_alike(runs: Runs, data: Path) -> None:
    """The samples' hashes are equal in every step, the figures as near as is stated."""
    words = [runs.changing, runs.whole, "--data", data, "--tolerance", FIGURES_TOLERANCE]
    checked = program("launch/ledger.py", *words)
    assert checked.returncode == 0, checked.stderr
    changing, whole = ledger.read(runs.changing), ledger.read(runs.whole)
    assert [entry.samples for entry in changing] == [entry.samples for entry in whole]
    assert len(losses(runs.changing)) == STEPS
    assert losses(runs.changing) == pytest.approx(losses(runs.whole), abs=LOSS_TOLERANCE)


def test_the_first_step_after_a_change_moves_lanes_alike(runs: Runs) -> None:
    """Bit for bit, as weights and micro-batches are the same; only later gradients round."""
    step = CHANGED[0].start + 1
    changing, whole = (ledger.read(run)[step - 1] for run in (runs.changing, runs.whole))
    assert changing.step == whole.step == step
    assert changing.lanes == whole.lanes


def test_lanes_that_change_places_are_refused(runs: Runs, data: Path, tmp_path: Path) -> None:
    """The hash of what is loaded on one rank must be the one that four ranks wrote."""
    run = tmp_path / "run"
    forget_after(FIRST.stop, runs.whole, run)
    exchange_lanes(run / "checkpoints" / f"step-{FIRST.stop:08d}", 0, 3)
    words = [*QUICK, f"data.path={data}", f"run.path={run}", f"train.steps={STEPS}"]
    line = error_line(program("launch/train.py", *words))
    assert f"the lanes' state of step {FIRST.stop} differs" in line


def exchange_lanes(checkpoint: Path, one: int, other: int) -> None:
    """Give two lanes, each of a rank of its own, each other's state, and make the hashes agree."""
    for old, new in ((one, other), (other, one)):
        for name in ("latents", "wkv", "time_shift", "channel_shift"):
            change = renamed(f"{old}/{name}", f"{new}/{name}")
            with_tensors(checkpoint, f"lanes-{old:05d}.safetensors", change)
