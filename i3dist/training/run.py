"""One rank of a run, from its settings to its end: what `i3dist train` does."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from i3dist.cli.program import call_on_failure, keep_tracebacks_in
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.distributed import collectives, devices, host
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.job import Job
from i3dist.distributed.rendezvous import read_timeout
from i3dist.distributed.signals import StopRequest
from i3dist.engine import setup
from i3dist.errors import UserError, warned
from i3dist.model.compressor_kinds import COMPRESSORS
from i3dist.model.layer_kinds import Stack
from i3dist.model.lm import I3LM
from i3dist.optim.optimizers import OPTIMIZERS
from i3dist.tracking import tracker as tracking
from i3dist.tracking.metrics_log import STARTS, MetricsLog
from i3dist.tracking.mlflow_store import FinalModel
from i3dist.tracking.notify import Notifier
from i3dist.tracking.origin import describe
from i3dist.tracking.tracker import NoTracker, Tracker
from i3dist.training.continuing import further
from i3dist.training.init_from import history_is_off
from i3dist.training.micro_batch import check_micro_batch
from i3dist.training.preflight import preflight, wanted
from i3dist.training.run_folder import lay_out
from i3dist.training.startup import (
    Start,
    agree,
    check_data,
    decide,
    idle_lanes,
    resolve,
    verify_checkpoint,
)
from i3dist.training.summary import (
    count_parameters,
    print_overview,
    print_tables,
    print_topic,
    refuse_large,
)
from i3dist.training.trainer import Trainer


def dry_run(settings: Settings, job: Job) -> None:
    """Print what the run would be, memory and speed included; without data, the card's."""
    vocab_size, tokens = settings.model.vocab, None
    path = settings.data.path
    if isinstance(path, str) or path.exists():
        corpus = Corpus.open(path, settings.model, data=settings.data)
        vocab_size, tokens = corpus.tokenizer.vocab_size, corpus.train.manifest.tokens
    if job.rank == 0:
        settings = decide(settings, job.world_size, vocab_size)
        print_tables(settings, job.world_size, tokens)


def build(
    arguments: argparse.Namespace, settings: Settings, job: Job, corpus: Corpus, stop: StopRequest
) -> Trainer:
    """Decide the settings, join the job, and build model, engine, tracker and trainer."""
    # Find whatever is wrong with the input before the ranks wait for each other.
    fell_back_to_cpu = setup.choose_device(settings.train.device)
    engine_config = setup.read_engine_config(arguments.deepspeed)
    start = resolve(settings, engine_config, corpus, job.world_size, arguments.fresh)
    settings = start.settings
    check_micro_batch(settings, job)
    if fell_back_to_cpu:
        refuse_large(settings)
    host.share_threads(job)
    if not devices.uses_cuda():
        host.keep_freed_memory()
    setup.start(job, str(settings.run.path))
    agree(start)
    collectives.on_all_ranks(partial(check_data, corpus, settings.data.on_damage, job))
    start = verify_checkpoint(start, job)
    torch.manual_seed(settings.train.seed)
    model = I3LM(settings.model, corpus.tokenizer.bos_id)
    if start.weights is not None:
        collectives.on_all_ranks(partial(start.weights.load_into, model))
    if settings.train.compile is True or (settings.train.compile == "auto" and devices.uses_cuda()):
        model.compile_blocks()
        print_rank_0("compiling the model: minutes the first time, seconds from then on")
    engine = setup.build(model, engine_config, settings.optimizer, settings.train)
    tracker = begin_record(start, job, corpus, arguments.verbose)
    with recorded(tracker):
        trainer = Trainer(settings, job, corpus, engine, tracker, stop)
        if start.checkpoint is not None and start.state is not None:
            trainer.checkpointer.restore(start.checkpoint, start.state)
    return trainer


@contextmanager
def recorded(tracker: Tracker | NoTracker) -> Iterator[None]:
    """Record a failure inside in the tracker, and explain it if possible."""
    try:
        yield
    except BaseException as error:
        with warned("tracking"):
            tracker.finish("FAILED")
        if collectives.lost_peer(error):
            raise UserError("another rank of the job ended early; its message says why") from None
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                "the GPU's memory is full: set train.micro_batch=auto or a smaller number, or "
                "start over with a lower train.window_chunks (another run.path, or --fresh)"
            ) from None
        raise


def begin_record(
    start: Start, job: Job, corpus: Corpus, verbose: bool = False
) -> Tracker | NoTracker:
    """On rank 0: prepare the run's folder, print what the run is, and open it in MLflow.

    Every rank calls this. If the folder cannot be prepared, it fails on every rank.
    """
    settings = start.settings
    collectives.on_rank_0(lambda: lay_out(start, corpus))
    if job.rank != 0:
        return NoTracker()
    if verbose:
        print_tables(settings, job.world_size, corpus.train.manifest.tokens)
    print_overview(settings, corpus, job.world_size)
    if start.weights is not None:
        print_topic("weights", f"those of {start.weights.path}")
    for note in filter(None, notes(start, corpus)):
        print_rank_0(note)
    parameters = sum(count_parameters(settings).values())
    weights = start.weights.path if start.weights is not None else None
    origin = describe(settings, corpus, parameters, job.world_size, weights)
    taken = 0 if start.state is None else start.state.step
    MetricsLog(settings.run.path / STARTS).append(taken, origin.facts)
    tracker = tracking.start(settings, origin, fresh=start.checkpoint is None)
    for name in ("settings.yaml", "tokenizer.json"):
        tracker.artifact(settings.run.path / name)
    print_charts(tracker)
    return tracker


def notes(start: Start, corpus: Corpus) -> Iterator[str | None]:
    """What the user should know of a run before it trains, if anything."""
    settings, state = start.settings, start.state
    if start.checkpoint is None:  # later these settings stay
        yield idle_lanes(settings, corpus)
        yield None if start.weights is None else history_is_off(settings)
    elif state is not None:
        yield further(settings, Settings.build(state.settings).of_saved_run(), state.step)


def print_charts(tracker: Tracker | NoTracker) -> None:
    """Print how to see the charts of the run in MLflow."""
    for topic, text in zip(("charts", ""), tracker.where(), strict=False):
        print_topic(topic, text)


def log_model(trainer: Trainer, stop: StopRequest) -> None:
    """Log the model of a run that is done, unless the user does not want it in MLflow."""
    settings = trainer.settings
    if settings.tracking.log_model:
        name = settings.tracking.registered_model
        model = FinalModel(settings.run.path, trainer.progress.step, name)
        patience = read_timeout().total_seconds() / 2  # the other ranks wait for this one
        trainer.log.tracker.log_model(model, patience, lambda: stop.reason is not None)


def detect_job(settings: Settings) -> Job:
    """This rank's place, once its log and settings are in order.

    Raises:
        UserError: unknown kinds, layers that cannot be built, or no such place.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Before ranks meet.
    OPTIMIZERS.of(settings.optimizer.kind, settings.place_of("optimizer.kind"))
    Stack.of(settings.model, settings.place_of("model.layers"))
    COMPRESSORS.of(settings.model.compressor, settings.place_of("model.compressor"))
    keep_tracebacks_in(settings.run.path)
    job = Job.detect()
    logging.getLogger("i3dist").setLevel(logging.INFO if job.rank == 0 else logging.ERROR)
    return job


def only_preflight(arguments: argparse.Namespace, settings: Settings) -> None:
    """Check that the job's hosts fit together, and stop: what `i3dist preflight` does.

    Raises:
        UserError: on every rank, if they do not.
    """
    preflight(arguments, settings, detect_job(settings))
    collectives.leave_group()


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Train, or say what the run would be.

    Args:
        arguments: options of `programs/train.py`: deepspeed, fresh, verbose, dry_run.
        settings: as the user gave them.

    Raises:
        UserError: whatever a user can get wrong.
    """
    job = detect_job(settings)
    stop = StopRequest(job)
    if arguments.dry_run:
        dry_run(settings, job)
        return
    notifier = Notifier(settings.run.path, settings.tracking.notify, job.rank == 0)
    call_on_failure(partial(notifier.stop, "failure"))
    if wanted(arguments, job):
        preflight(arguments, settings, job)
    corpus = Corpus.open(settings.data.path, settings.model, data=settings.data)
    trainer = build(arguments, settings, job, corpus, stop)
    notifier.start(trainer.progress.step)
    with recorded(trainer.log.tracker):
        done = trainer.fit()
    with warned("tracking"):
        trainer.log.tracker.finish("FINISHED" if done else "KILLED")
    if not done:
        print_rank_0(
            f"stopped on request at step {trainer.progress.step}: run the same command to continue"
        )
        notifier.stop("requeue", stop.reason or "another rank was asked to stop")
        stop.exit_to_requeue()
    with warned("after training"):
        print_rank_0(f"done: {settings.run.path}")
        print_charts(trainer.log.tracker)
    with warned("tracking"):
        log_model(trainer, stop)
    notifier.stop("end")
    with warned("after training"):
        collectives.leave_group()
