"""Which chunks a run reads when: from its settings and the schedule of lanes."""

import json
from pathlib import Path

from i3dist.checkpoint import store
from i3dist.config import Settings
from i3dist.data.corpus import Split, fingerprint_of
from i3dist.data.manifest import Manifest
from i3dist.data.schedule import Place
from i3dist.errors import UserError
from i3dist.files import regular
from i3dist.training.ledger import LEDGER, Entry, parse, samples_hash


class TrainedRun:
    """A run's folder beside the data that it was trained on. Steps count from 1."""

    def __init__(self, run: Path, data: Path) -> None:
        """Read a run's settings and the manifest of its data.

        Raises:
            UserError: they cannot be read, or the run was trained on other data.
        """
        self.run = run
        self.settings = Settings.load(run / store.SETTINGS).of_saved_run().train
        split = Split(data / "train", Manifest.load(data / "train"))
        self._check_data(data, split.manifest)
        self.schedule = split.schedule(
            self.settings.lane_count,
            self.settings.window_chunks,
            self.settings.seed,
            self.settings.schedule_version,
        )
        self._entries = _entries(run / LEDGER)

    def places(self, step: int, lane: int) -> list[Place | None]:
        """The chunks that a lane reads at a step, in order; None where it idles.

        Raises:
            UserError: there is no such lane, or the ledger says that the step read others.
        """
        if not 0 <= lane < self.settings.lane_count:
            last = self.settings.lane_count - 1
            raise UserError(f"{self.run} has no lane {lane}: the last is {last}")
        if step < 1:
            raise UserError(f"there is no step {step}: the first is 1")
        accumulation = self.settings.accumulation
        entry = self._entries.get(step)
        hashed = samples_hash(self.schedule, step * accumulation, accumulation)
        if entry is not None and entry.samples != hashed:
            raise UserError(
                f"{self.run / LEDGER} says that step {step} read other chunks than its settings "
                "and this data give: name the data that it was trained on"
            )
        windows = range((step - 1) * accumulation, step * accumulation)
        return [place for index in windows for place in self.schedule.chunks(index, lane)]

    def reading(self, shard: int, chunk: int) -> tuple[int, int]:
        """(step, lane) at which a chunk is read in the first epoch."""
        window, lane, _ = self.schedule.first_reading(shard, chunk)
        return window // self.settings.accumulation + 1, lane

    def state_of(self, step: int) -> str:
        """Whether a step has been taken, in words, as far as the ledger tells."""
        if (entry := self._entries.get(step)) is None:
            return "not in the ledger"
        return f"skipped ({entry.skipped})" if entry.skipped else "in the ledger"

    def _check_data(self, data: Path, train: Manifest) -> None:
        """Compare the data with the fingerprint in the newest checkpoint, if there is one."""
        for checkpoint in store.candidates(self.run / store.CHECKPOINTS)[:1]:
            try:
                trained_on = json.loads(regular(checkpoint / "state.json").read_bytes())["data"]
            except (OSError, ValueError, KeyError):
                return
            if trained_on != fingerprint_of(train, Manifest.load(data / "valid")):
                raise UserError(f"{self.run} was trained on other data than {data}: name its data")


def _entries(path: Path) -> dict[int, Entry]:
    """The entries of a ledger by step; a running run may have a torn last line."""
    try:
        lines = regular(path).read_bytes().splitlines()
    except OSError:
        return {}
    return {entry.step: entry for line in lines if (entry := parse(line)) is not None}
