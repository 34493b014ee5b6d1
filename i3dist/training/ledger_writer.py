"""Writing the run's ledger (see `ledger`). Notation: B lanes of this rank, N steps.

Figures stay on the device until lines are written, so that no step waits for them.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from i3dist.data.schedule import LaneSchedule
from i3dist.distributed import collectives
from i3dist.engine.interface import StepResult
from i3dist.errors import UserError
from i3dist.files import regular, sync
from i3dist.model.state import LaneState
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.training.ledger import LEDGER, digest, parse, samples_hash
from i3dist.training.progress import Progress


class _Step(NamedTuple):
    """A step whose line is not written yet; tensors are on the device."""

    step: int
    windows: int  # read so far
    targets: Tensor  # scalar
    checksums: Tensor  # [B] int64
    stepped: StepResult
    skipped: str | None


class LedgerWriter:
    """One rank's part of the ledger; the first rank writes it."""

    def __init__(self, folder: Path, schedule: LaneSchedule, accumulation: int, lanes: range):
        """Write the ledger in the run's folder.

        Args:
            folder: the run's.
            schedule: of the lanes.
            accumulation: windows of a step.
            lanes: those of this rank.
        """
        self.path = folder / LEDGER
        self.schedule = schedule
        self.accumulation = accumulation
        self.lanes = lanes
        self._writes = lanes.start == 0
        self._waiting: list[_Step] = []

    def add(
        self, progress: Progress, targets: Tensor, stepped: StepResult, skipped: str | None
    ) -> None:
        """Add a step; `flush` writes its line. Does not wait for the device.

        Args:
            progress: where the run stands after the step.
            targets: scalar, number of targets in the whole job's step.
            stepped: the engine's result; the first of its sums is the loss sum.
            skipped: why nothing was updated, or None.
        """
        checksums = lane_checksums(progress.lane_state)
        self._waiting.append(
            _Step(progress.step, progress.windows, targets, checksums, stepped, skipped)
        )

    def flush(self) -> None:
        """Write the lines of all steps added; every rank calls this."""
        if not self._waiting:
            return
        steps, self._waiting = self._waiting, []
        hashes = self._hashes(torch.stack([step.checksums for step in steps]))
        targets = torch.stack([step.targets for step in steps]).clamp(min=1).tolist()
        if not self._writes:
            return
        lines = [
            {
                "step": step.step,
                "samples": samples_hash(self.schedule, step.windows, self.accumulation),
                "lanes": lanes,
                "loss": step.stepped.sums[0] / count,
                "gradient_norm": step.stepped.norm,
                "skipped": step.skipped,
            }
            for step, count, lanes in zip(steps, targets, hashes, strict=True)
        ]
        MetricsLog(self.path).extend(lines)

    def sync(self) -> None:
        """Flush to disk, so that the ledger reaches as far as the checkpoint that follows."""
        self.flush()
        if self._writes and self.path.exists():
            sync(self.path)
            sync(self.path.parent)  # the file may be new

    def resume(self, step: int, state: LaneState) -> None:
        """Cut off the lines after the checkpoint of `step`; every rank calls this.

        Raises:
            UserError: the lanes' state differs from what the ledger has for that step.
        """
        (hashed,) = self._hashes(lane_checksums(state).unsqueeze(0))
        collectives.on_rank_0(lambda: self._cut(step, hashed))

    def _hashes(self, checksums: Tensor) -> list[str]:
        """[N, B] of every rank -> N hashes over all lanes of the job, equal on every rank."""
        every = checksums.new_zeros(len(checksums), self.schedule.lanes)
        every[:, self.lanes.start : self.lanes.stop] = checksums
        return [digest(",".join(map(str, row))) for row in collectives.all_sum(every).tolist()]

    def _cut(self, step: int, hashed: str) -> None:
        """Keep the lines up to `step`, and check the lanes' hash of the last one."""
        if not self.path.exists():
            return
        kept, end, last = 0, 0, None
        with regular(self.path).open("rb") as file:
            for line in file:
                end += len(line)
                entry = parse(line)
                if entry is None:
                    continue  # a broken line between whole ones stays, for launch/ledger.py to find
                if entry.step > step:
                    break
                kept, last = end, entry
        if last is not None and last.step == step and last.lanes != hashed:
            raise UserError(
                f"{self.path} is of another run than its checkpoint: the lanes' state of step "
                f"{step} differs; restore either of them, or start over with --fresh"
            )
        os.truncate(self.path, kept)


def lane_checksums(state: LaneState) -> Tensor:
    """[B] int64: a checksum of each lane's state.

    It is the sum of the state's words, each multiplied by an odd number of its own, modulo 2^64:
    the same in whatever order a device adds. It misses a difference with a chance below 2^-32.
    """
    total = torch.zeros(len(state.latents), dtype=torch.int64, device=state.latents.device)
    for salt, tensor in enumerate(state.tensors().values()):
        kind = torch.int16 if tensor.element_size() == 2 else torch.int32
        words = tensor.detach().contiguous().flatten(1).view(kind)
        total += (words * _multipliers(words.shape[1], salt, words.device)).sum(1)
    return total


@lru_cache(maxsize=16)
def _multipliers(count: int, salt: int, device: torch.device) -> Tensor:
    """[count] odd int64 that look random: splitmix64 (Steele et al., 2014) of 1, 2, ..."""
    x: NDArray[Any] = np.arange(1, count + 1, dtype=np.uint64)
    x = (x + (salt << 40)) * 0x9E3779B97F4A7C15
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor
    return torch.from_numpy(((x ^ (x >> 31)) | 1).view(np.int64)).to(device)
