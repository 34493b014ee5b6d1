"""The training loop. Notation: B lanes of this rank, K chunks of a window, T tokens.

One optimizer step reads `train.accumulation` windows of every lane, each in micro-batches of
lanes, and trains on the mean loss over all targets of the whole job's step.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from i3dist import garbage
from i3dist.checkpoint import store
from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.data.lanes import Batch, LaneWindows, windows
from i3dist.data.schedule import lanes_of_rank
from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.distributed.patience import DATA, STEP
from i3dist.distributed.signals import StopRequest
from i3dist.distributed.watchdog import Watchdog
from i3dist.engine.compile_cache import CompileCache
from i3dist.engine.interface import Engine
from i3dist.model.state import LaneState
from i3dist.tracking.interval import Interval
from i3dist.tracking.metrics import measure
from i3dist.tracking.metrics_log import METRICS
from i3dist.tracking.report import report_line, straggler_line
from i3dist.tracking.stragglers import Stragglers
from i3dist.tracking.tracker import NoTracker, Tracker
from i3dist.training.checkpointer import Checkpointer
from i3dist.training.counts import count_step
from i3dist.training.diagnoser import Diagnoser
from i3dist.training.guard import Guard
from i3dist.training.ledger_writer import LedgerWriter
from i3dist.training.micro_batch import choose_micro_batch, dummy_batch
from i3dist.training.orders import Orders
from i3dist.training.progress import Progress
from i3dist.training.recovery import Recovery
from i3dist.training.run_log import RunLog
from i3dist.training.start_times import StartTimes
from i3dist.training.validator import Validator
from i3dist.training.votes import Votes


class Trainer:
    """One rank of a run, from step 0 on."""

    def __init__(
        self,
        settings: Settings,
        job: Job,
        corpus: Corpus,
        engine: Engine,
        tracker: Tracker | NoTracker,
        stop: StopRequest,
        times: StartTimes,
        watchdog: Watchdog,
        compile_cache: CompileCache | None = None,
    ):
        """Put the parts together; every rank calls this.

        `settings` has no "auto" left that a run decides (see `startup.decide`). The
        `watchdog` may watch already.
        """
        self.settings, self.engine, self.stop = settings, engine, stop
        self.start_times = times
        self.compile_cache = compile_cache if job.rank == 0 else None  # one rank writes it
        train, folder = settings.train, settings.run.path
        checkpoints, tokenizer = folder / store.CHECKPOINTS, corpus.tokenizer.data
        self.watchdog = watchdog
        saver = AsyncSaver(checkpoints, job, settings.checkpoint, tokenizer, watchdog.saving)
        guard = self.guard = Guard(settings.guard)
        lanes, device = lanes_of_rank(train.lane_count, job.rank, job.world_size), engine.device
        empty_lanes = partial(LaneState.empty, len(lanes), settings.model, device, engine.dtype)
        tokens_seen = torch.zeros((), dtype=torch.int64, device=device)
        progress = self.progress = Progress(train.steps, empty_lanes(), tokens_seen)

        if settings.compression.joins:  # before the model is compiled and recorded
            engine.model.join_softmaxes(settings.compression.joined_at(0))
        manifest = corpus.train.manifest
        rows = choose_micro_batch(settings, engine, progress.lane_state, manifest.pad_id)
        self.micro_batch = rows  # lanes computed at once
        engine.accumulate(train.accumulation * len(lanes) // rows)
        example = dummy_batch(settings, progress.lane_state.rows(0, rows), manifest.pad_id)
        engine.prepare(*example)  # before data readers start threads
        times.end("micro-batch, compilation")

        schedule = corpus.train.schedule(
            train.lane_count, train.window_chunks, train.seed, train.schedule_version
        )
        self.data = LaneWindows(
            corpus.train.folder, manifest, schedule, lanes, settings.data.on_damage
        )
        watchdog.reads = self.data.shards.being_read
        log = self.log = RunLog(folder, tracker, job.rank)
        self.orders = Orders(folder, looks=job.rank == 0)
        self.votes = Votes(stop, saver, self.orders)
        ledger = self.ledger = LedgerWriter(folder, schedule, train.accumulation, lanes)
        stragglers = self.stragglers = Stragglers(job)
        interval = self.interval = Interval(engine.model, job.world_size, stragglers)
        self.checkpointer = Checkpointer(
            settings, corpus.fingerprint, lanes, engine, progress, guard, ledger, watchdog, saver
        )
        self.recovery = Recovery(guard, progress, self.checkpointer, empty_lanes)
        self.validator = Validator(settings, job, corpus, engine, rows, progress, watchdog, log)
        self.diagnoser = Diagnoser(settings, engine, progress, interval, watchdog, log)

    def fit(self) -> bool:
        """Train to `train.steps`; the last step is always reported, validated and saved.

        Returns:
            True when the run is done; False if the job was asked to stop earlier, and has saved.
        """
        progress = self.progress
        # After an error the watchdog closes first: the error may take long to be reported.
        with self.checkpointer.saver, self.watchdog:
            self.begin()
            garbage.resume()  # before data readers are forked
            with closing(self.batches()) as batches:
                while not (progress.done or self.votes.to_stop):
                    self.train_step(batches)
                    self.do_what_is_due()
            self.keep_the_result()
        self.stop.saved()
        self.log.plot()
        return progress.done

    def begin(self) -> None:
        """Validate the first weights, and hear what was asked while the run was set up."""
        collectives.barrier()  # the limits of what follows allow for no rank that still starts
        if self.progress.step == 0 and self.settings.validate_.every:
            self.validator.validate()
            self.start_times.end("validation")
        self.votes.exchange(self.engine.device)
        self.interval.restart()

    def do_what_is_due(self) -> None:
        """After a step: report, validate and save, each if it is time to."""
        settings, progress = self.settings, self.progress
        if self.start_times.end_all() and self.compile_cache is not None:
            self.compile_cache.save()
        if progress.due(settings.log.every):
            self.report()
        with self.interval.stopped_clock():
            if progress.due(settings.validate_.every):
                self.validator.validate()
            if progress.due(settings.checkpoint.every) or self.orders.save:
                self.checkpointer.save()
                self.orders.done()

    def keep_the_result(self) -> None:
        """Write the final weights, or else a checkpoint, and wait until all files are written."""
        if self.progress.done:
            self.checkpointer.export()
        else:
            self.checkpointer.save()
        self.checkpointer.saver.wait()
        self.orders.done()
        if self.compile_cache is not None:
            self.compile_cache.wait()

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: every window, every micro-batch, one update.

        Raises:
            UserError: on every rank, if the guard gives up or the last checkpoint was not written.
        """
        settings, progress = self.settings, self.progress
        gate = settings.compression.gate_at(progress.step)
        lr = settings.optimizer.lr_at(progress.step)
        if settings.compression.joins:
            self.engine.model.join_softmaxes(settings.compression.joined_at(progress.step))
        self.watchdog.beat(DATA)
        with self.interval.waiting():
            step_batches = [next(batches) for _ in range(settings.train.accumulation)]
        self.watchdog.beat(STEP)
        counts = count_step(step_batches, self.data.manifest.pad_id, settings.model)
        lanes_before = progress.lane_state
        loss_sum = self.forward_backward(step_batches, gate, counts.targets)
        self.diagnoser.diagnose_if_due(step_batches[0], lanes_before, gate)
        sums = self.votes.append_to(loss_sum)
        shares = self.stragglers.share(sums)
        stepped = self.engine.step(lr, torch.cat([sums, shares]), self.guard.limit())
        progress.step += 1
        progress.windows += settings.train.accumulation
        progress.tokens_seen += counts.tokens.long()
        self.votes.count(*stepped.sums[1 : len(sums)])
        self.stragglers.add(stepped.sums[len(sums) :], self.engine.compute_seconds)
        skipped = self.recovery.after(stepped)
        self.ledger.add(progress, counts.targets, stepped, skipped)
        self.interval.add(stepped.sums[0], counts, stepped.norm, step_batches[-1])
        if self.guard.gives_up():
            self.ledger.flush()
            raise self.recovery.failure()

    def forward_backward(self, step_batches: list[Batch], gate: float, targets: Tensor) -> Tensor:
        """Accumulate the step's gradient and advance the lanes.

        Args:
            step_batches: the step's windows.
            gate: in [0, 1], of attention to history.
            targets: scalar, number of targets in the whole job's step.

        Returns:
            Scalar fp32: the sum of this rank's losses.
        """
        progress, rows = self.progress, self.micro_batch
        loss_sum = torch.zeros((), device=self.engine.device)
        gate_value = torch.tensor(gate, device=self.engine.device)
        for batch in step_batches:
            states = []
            for start in range(0, len(batch.tokens), rows):
                tokens, wanted, depth = batch.rows(start, start + rows)
                state = progress.lane_state.rows(start, start + rows)
                losses, state = self.engine(tokens, wanted, depth, state, gate_value)
                self.engine.backward(losses.sum(), targets)
                loss_sum += losses.detach().sum()
                states.append(state)
            progress.lane_state = LaneState.concatenate(states)
        return loss_sum

    def report(self) -> None:
        """Write the ledger, and log, track and print the metrics."""
        progress = self.progress
        figures = None
        if self.log.active:  # other ranks need not wait for the device
            figures = self.interval.figures(
                progress.step, self.settings, int(progress.tokens_seen), self.guard.state.skipped
            )
        self.ledger.flush()
        self.interval.restart()
        if figures is not None:
            lines = filter(None, (report_line(figures), straggler_line(figures)))
            self.log.log(METRICS, progress.step, measure(figures), "\n".join(lines))

    def batches(self) -> Generator[Batch, None, None]:
        """Batches of this rank's lanes, from the next window to the last of the run."""
        progress, settings = self.progress, self.settings
        left = settings.train.accumulation * (progress.last_step - progress.step)
        start = progress.windows
        yield from windows(
            self.data, start, start + left, settings.data.workers, self.engine.device
        )
