"""The training loop. Letters: B lanes of this rank, K chunks of a window, T tokens.

One optimizer step reads `train.accumulation` windows of every lane, each in micro-batches of
lanes, and trains on the mean loss over all targets of the whole job's step.
"""

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from i3dist.checkpoint import format as checkpoint
from i3dist.checkpoint import store
from i3dist.checkpoint.async_saver import Saver
from i3dist.checkpoint.run_state import RunState
from i3dist.checkpoint.weights import export_weights
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.data.held_out import HeldOut
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.data.schedule import divisors, lanes_of_rank
from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.distributed.signals import Stop, held_back
from i3dist.distributed.watchdog import Watchdog
from i3dist.engine.zero2 import Engine
from i3dist.errors import UserError, warned
from i3dist.inference.evaluate import evaluate
from i3dist.model.state import LaneState
from i3dist.tracking.diagnose import diagnose
from i3dist.tracking.history import history_warning, validation_metrics
from i3dist.tracking.interval import Interval, count_step
from i3dist.tracking.metrics import measure
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.tracking.report import diagnosis_line, progress_bar, report_line, validation_line
from i3dist.tracking.tracker import NoTracker, Tracker
from i3dist.training.guard import NOT_FINITE, Guard
from i3dist.training.ledger_writer import LedgerWriter

DIAGNOSED_LANES = 4  # of rank 0, or as many as it has
PLOT_SECONDS = 60  # at most: a job that is to be requeued has two minutes


@dataclass
class Progress:
    """Where the run stands."""

    step: int = 0  # optimizer steps taken
    windows: int = 0  # windows of the job read


class Trainer:
    """One rank of a run. `launch/train.py` builds the parts and calls `fit`."""

    def __init__(
        self,
        settings: Settings,
        job: Job,
        corpus: Corpus,
        engine: Engine,
        tracker: Tracker | NoTracker,
        stop: Stop,
    ):
        """Put the parts together; `settings` has no "auto" left where a run decides it."""
        self.settings = settings
        self.job = job
        self.corpus = corpus
        self.engine = engine
        self.tracker = tracker
        self.stop = stop
        self.progress = Progress()
        folder = settings.run.path
        self.saver = Saver(
            folder / store.CHECKPOINTS, job, settings.checkpoint, corpus.tokenizer.data
        )
        self.guard = Guard(settings.guard)
        self.watchdog = Watchdog(settings.guard.hang_seconds, job)
        self.pad_id = corpus.train.manifest.pad_id
        self.lanes = lanes_of_rank(settings.train.lane_count, job.rank, job.world_size)
        self.lane_state = self._empty_lanes()
        self.micro_batch = self._lanes_at_once()
        engine.accumulate(settings.train.accumulation * len(self.lanes) // self.micro_batch)
        engine.prepare(*self._sample(self.micro_batch))  # before loaders start their threads
        self.schedule = corpus.train.schedule(
            settings.train.lane_count,
            settings.train.window_chunks,
            settings.train.seed,
            settings.train.schedule_version,
        )
        self.ledger = LedgerWriter(folder, self.schedule, settings.train.accumulation, self.lanes)
        self.metrics_log = MetricsLog(folder / "metrics.jsonl")
        self.validation_log = MetricsLog(folder / "validation.jsonl")
        self.diagnostics_log = MetricsLog(folder / "diagnostics.jsonl")
        # On the device, so that counting does not wait for it.
        self.tokens_seen = torch.zeros((), dtype=torch.int64, device=engine.device)
        self._interval = Interval(engine.model, job.world_size)

    def fit(self) -> bool:
        """Train to `train.steps`; the last step is always reported, validated and saved.

        Returns:
            Whether that is done: False where the job was asked to stop before, and has saved.
        """
        stop = self.stop
        # The watchdog goes first: what comes after an error takes its time, and decides nothing.
        with self.saver, closing(self.watchdog):
            if self.progress.step == 0:
                self.validate()
            stop.ask_all()  # what came in while the run was set up
            self._interval = Interval(self.engine.model, self.job.world_size)
            with closing(self._batches()) as batches:
                while self.progress.step < self.settings.train.steps and not stop.agreed():
                    self.train_step(batches)
                    self.report_if_due()
                    self.validate_if_due()
                    self.checkpoint_if_due()
            done = self.progress.step == self.settings.train.steps
            if done:
                self.export()
            else:
                self.save()
            self.saver.wait()
        self.plot()
        return done

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: every window, every micro-batch, one update."""
        step, settings = self.progress.step, self.settings
        self.watchdog.beat("taking a step")
        gate = settings.compression.gate_at(step)
        with self._interval.waiting(), held_back():
            step_batches = [next(batches) for _ in range(settings.train.accumulation)]
        counts = count_step(step_batches, self.pad_id, settings.model)
        lanes_before = self.lane_state
        loss_sum = self._backward(step_batches, gate, counts.targets)
        self.diagnose_if_due(step_batches[0], lanes_before, gate)
        # Filled on the device: a copy from the host would wait.
        votes = (loss_sum.new_full((), v) for v in (self.stop.vote(), self.saver.failed()))
        stepped = self.engine.step(
            settings.optimizer.lr_at(step), torch.stack([loss_sum, *votes]), self.guard.limit()
        )
        self.progress.step += 1
        self.progress.windows += settings.train.accumulation
        self.tokens_seen += counts.tokens.long()
        self._hear(*stepped.sums[1:])
        skipped = self.guard.judge(stepped)
        if skipped:
            skipped = self._skip(skipped, stepped.norm)
        self.ledger.add(
            self.progress.step,
            self.progress.windows,
            counts.targets,
            self.lane_state,
            stepped,
            skipped,
        )
        self._interval.add(stepped.sums[0], counts, stepped.norm, step_batches[-1])
        if self.guard.gives_up():
            self._give_up()

    def _hear(self, asked_to_stop: float, failed_to_save: float) -> None:
        """Take in what the ranks have voted in the step's exchange."""
        self.stop.hear(asked_to_stop)
        if failed_to_save:
            self.saver.wait()  # raises what was wrong, on every rank

    def _skip(self, reason: str, norm: float) -> str:
        """Undo what a skipped step did to the lanes, and roll back where it is one too many.

        Returns:
            What the ledger says of the step.
        """
        collectives.say(f"step {self.progress.step} is skipped: {reason} (norm {norm:.4g})")
        if reason == NOT_FINITE:
            self.lane_state = self.lane_state.finite()
        to = self.roll_back() if self.guard.rolls_back() else None
        return reason if to is None else f"{reason}, rolled back to step {to}"

    def roll_back(self) -> int | None:
        """Take weights and optimizer of the newest checkpoint that the guard allows.

        Data and lanes go on where they are, the lanes with no history: what they hold came of the
        weights that are given up. Where there is no such checkpoint nothing is changed.

        Returns:
            The checkpoint's step.
        """
        self.watchdog.beat("rolling back")
        self.saver.wait()
        state, now = self.guard.state, self.progress.step
        allowed = partial(state.may_roll_back_to, now=now)
        found = checkpoint.newest_whole(self.saver.folder, self.job, allowed)
        if found is None:
            return None
        if found.refused:
            collectives.say(found.line())
        past = checkpoint.read_state(found.path)
        collectives.together(lambda: self._load(found.path, past))
        self.lane_state = self._empty_lanes()
        collectives.say(
            f"{state.bad} bad steps in a row: weights and optimizer are those of step {past.step} "
            f"again, and training goes on behind step {now}"
        )
        self.guard.rolled_back(now, past.step, past.taken)
        return past.step

    def _give_up(self) -> NoReturn:
        """End a run whose steps are not finite; raises `UserError`."""
        self.ledger.flush()
        guard, allowed = self.guard.state, self.settings.guard.rollbacks
        tried = len(guard.rolled_back_to)
        none_left = ", and no checkpoint from before them is left to try" * (tried < allowed)
        raise UserError(
            f"loss or gradient was not finite in {guard.bad} steps in a row, up to step "
            f"{self.progress.step}, so the run stops (guard.bad_steps), rolled back {tried} of "
            f"{allowed} times (guard.rollbacks){none_left}; to continue behind such steps, raise "
            "guard.bad_steps; if all steps are so, start over with --fresh and a lower optimizer.lr"
        )

    def _backward(self, step_batches: list[Batch], gate: float, targets: Tensor) -> Tensor:
        """Add up the step's gradient and move the lanes on. Returns this rank's loss sum."""
        loss_sum = torch.zeros((), device=self.engine.device)
        gate_value = torch.tensor(gate, device=self.engine.device)
        for batch in step_batches:
            states = []
            for start in range(0, len(self.lanes), self.micro_batch):
                rows = (start, start + self.micro_batch)
                tokens, wanted, depth = batch.rows(*rows)
                state = self.lane_state.rows(*rows)
                losses, state = self.engine(tokens, wanted, depth, state, gate_value)
                self.engine.backward(losses.sum(), targets)
                loss_sum += losses.detach().sum()
                states.append(state)
            self.lane_state = LaneState.concatenate(states)
        return loss_sum

    def diagnose_if_due(self, batch: Batch, state: LaneState, gate: float) -> None:
        """Look into the model at the interval, with the weights that the step's gradient is of."""
        step, every = self.progress.step + 1, self.settings.log.diagnose_every
        if not every or (step % every and step != self.settings.train.steps):
            return
        # Waits for backward, which is training; what follows is not.
        norm = self.engine.gradient_norm_of("compressor.")
        if self.job.rank == 0:
            with self._interval.stopped_clock():
                self._diagnose(step, batch.rows(0, DIAGNOSED_LANES), state, gate, norm)

    def _diagnose(
        self, step: int, batch: Batch, state: LaneState, gate: float, norm: float
    ) -> None:
        """Look, log, track and print; `norm` is the compressor's gradient norm."""
        state = state.rows(0, len(batch.tokens))
        gate_value = torch.tensor(gate, device=self.engine.device)
        found = diagnose(self.engine.model, *batch, state, gate_value)
        figures = {**found.to_dict(), "compressor_gradient_norm": norm}
        self.diagnostics_log.append(step, figures)
        self.tracker.send()
        print(diagnosis_line(step, self.settings.train.steps, figures), flush=True)

    def report_if_due(self) -> None:
        """Print, log and track what happened since the last report."""
        if not self._due(self.settings.log.every):
            return
        step = self.progress.step
        if self.job.rank == 0:
            figures = self._interval.figures(
                step, self.settings, int(self.tokens_seen), self.guard.state.skipped
            )
            self.metrics_log.append(step, measure(figures))
            self.tracker.send()
            print(report_line(figures), flush=True)
        self.ledger.flush()
        self._interval.restart()

    def validate_if_due(self) -> None:
        """Validate at the interval, outside the clock of training."""
        if self._due(self.settings.validate_.every):
            with self._interval.stopped_clock():
                self.validate()

    def checkpoint_if_due(self) -> None:
        """Save at the interval, outside the clock of training."""
        if self._due(self.settings.checkpoint.every):
            with self._interval.stopped_clock():
                self.save()

    @cached_property
    def held_out(self) -> HeldOut:
        """The fixed validation subset."""
        settings = self.settings
        return self.corpus.valid.held_out(settings.model.history_chunks, settings.validate_.chunks)

    def validate(self) -> None:
        """Loss on the fixed validation subset, which the ranks share out."""
        self.watchdog.beat("validating")
        settings, step = self.settings, self.progress.step
        result = evaluate(
            self.engine.model,
            self.held_out,
            self.corpus.tokenizer.token_bytes(),
            self.micro_batch,
            settings.train.window_chunks,
            self.job.rank,
            self.job.world_size,
            progress_bar,
        )
        if self.job.rank == 0:
            self.validation_log.append(step, validation_metrics(result))
            self.tracker.send()
            print(validation_line(step, settings.train.steps, result), flush=True)
            trained_with_history = step > 0 and settings.compression.gate_at(step - 1) == 1.0
            if trained_with_history and (warning := history_warning(result)):
                print(warning, flush=True)

    def save(self) -> None:
        """Begin a checkpoint that the run can continue from, bit for bit, unless there is one."""
        if self.progress.step == self.saver.step:
            return
        self.watchdog.beat("saving")
        self.ledger.sync()
        state = RunState(
            step=self.progress.step,
            windows=self.progress.windows,
            tokens_seen=int(self.tokens_seen),
            settings=self.settings.to_dict(),
            data=self.corpus.fingerprint,
            engine=self.engine.numeric,
            guard=self.guard.state,
        )
        self.saver.begin(state, self.engine.snapshot, (self.lanes, self.lane_state))

    def resume(self, path: Path, state: RunState) -> None:
        """Take up the run where checkpoint `path`, which is whole, left it."""
        collectives.together(lambda: self._load(path, state))
        collectives.together(lambda: self._load_lanes(path))
        self.guard = Guard(self.settings.guard, state.guard)
        self.progress = Progress(state.step, state.windows)
        self.saver.step = state.step
        self.ledger.resume(state.step, self.lane_state)
        self.tokens_seen.fill_(state.tokens_seen)
        collectives.say(f"continued from step {state.step}")

    def _load(self, path: Path, state: RunState) -> None:
        """Take weights and optimizer of a checkpoint; raises `UserError` where some are missing."""
        saved = checkpoint.OptimizerReader(path)
        saved.check({name: p.numel() for name, p in self.engine.model.named_parameters()})
        self.engine.load(saved, state.taken)

    def _load_lanes(self, path: Path) -> None:
        """Take this rank's lanes of a checkpoint; raises `UserError` where some are missing."""
        self.lane_state = checkpoint.read_lanes(path, self.lanes, self.lane_state)

    def export(self) -> None:
        """Write plain weights."""
        self.watchdog.beat("writing the weights")
        run, model, step = self.settings.run.path, self.engine.model, self.progress.step
        collectives.together(
            lambda: export_weights(run, model, step) if self.job.rank == 0 else None
        )

    def plot(self) -> None:
        """Plot the run so far, and hand the plots to the tracker.

        Nothing in here can fail the run: everything that matters is written by now.
        """
        if self.job.rank == 0:
            plotting = threading.Thread(target=self._plot, name="plots", daemon=True)
            plotting.start()
            plotting.join(PLOT_SECONDS)
            if plotting.is_alive():
                print(f"warning: no plots: they take over {PLOT_SECONDS} s", flush=True)

    def _plot(self) -> None:
        with warned("no plots"):
            from i3dist.tracking import plots  # with matplotlib, for which other ranks have no use

            for plot in plots.plot_run(self.settings.run.path):
                self.tracker.artifact(plot, "plots")

    def _batches(self) -> Generator[Batch, None, None]:
        """This rank's lanes, from the next window to the last of the run."""
        settings, train = self.settings.train, self.corpus.train
        data = self.settings.data
        dataset = LaneWindows(
            train.folder, train.manifest, self.schedule, self.lanes, data.on_damage
        )
        stop = self.progress.windows + settings.accumulation * (settings.steps - self.progress.step)
        yield from windows(dataset, self.progress.windows, stop, data.workers, self.engine.device)

    def _lanes_at_once(self) -> int:
        """Lanes of a micro-batch: as set, or the most that fit on every rank's GPU."""
        wanted = self.settings.train.micro_batch
        if wanted != "auto":
            return wanted
        for rows in reversed(divisors(len(self.lanes))):
            if all(collectives.gather_objects(self.engine.fits(*self._sample(rows)))):
                collectives.say(
                    f"train.micro_batch=auto: {rows} of a rank's {len(self.lanes)} lanes at once"
                )
                return rows
        raise UserError(
            "one lane's window does not fit on the GPU: start over with a lower "
            "train.window_chunks or model.d_model (another run.path, or --fresh)"
        )

    def _sample(self, rows: int) -> tuple[Tensor, Tensor, LaneState, Tensor]:
        """Tokens, depth, state and gate of a micro-batch of so many lanes."""
        model, device = self.settings.model, self.engine.device
        shape = (rows, self.settings.train.window_chunks, model.chunk_length)
        tokens = torch.full(shape, self.pad_id, device=device)
        depth = torch.zeros(shape[:2], dtype=torch.long, device=device)
        return tokens, depth, self.lane_state.rows(0, rows), torch.ones((), device=device)

    def _empty_lanes(self) -> LaneState:
        model, engine = self.settings.model, self.engine
        return LaneState.empty(len(self.lanes), model, engine.device, engine.dtype)

    def _due(self, every: int) -> bool:
        """Whether an interval ends here, or the run does."""
        step = self.progress.step
        return step == self.settings.train.steps or (every > 0 and step % every == 0)


def check_micro_batch(settings: Settings, job: Job) -> None:
    """See that lanes are divisible by ranks, and a rank's lanes by train.micro_batch.

    Raises:
        UserError: they are not.
    """
    lanes = len(lanes_of_rank(settings.train.lane_count, job.rank, job.world_size))
    wanted = settings.train.micro_batch
    if wanted != "auto" and lanes % wanted:
        raise UserError(
            f"train.micro_batch={wanted} does not divide the {lanes} lanes of a rank; "
            f"legal: {', '.join(map(str, divisors(lanes)))}, auto"
        )
