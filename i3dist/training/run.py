"""One rank of a run, from its settings to its end: what `i3dist train` does."""

import argparse
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from i3dist import garbage
from i3dist.checkpoint.weights import WEIGHTS
from i3dist.cli.extend import LOADED
from i3dist.cli.program import call_on_failure, keep_tracebacks_in, tell_others_by
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.distributed import collectives, devices, host
from i3dist.distributed.attempt import REQUEUE, TIME, Attempt, ask_for_requeue, ask_for_successor
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.hang_report import keep_records_in
from i3dist.distributed.job import Job, host_name
from i3dist.distributed.patience import START, UNKNOWN_SECONDS
from i3dist.distributed.peers import Peers
from i3dist.distributed.rendezvous import read_timeout
from i3dist.distributed.signals import StopRequest
from i3dist.distributed.watchdog import MARGIN_SECONDS, Watchdog
from i3dist.engine import compile_cache, setup
from i3dist.engine.compile_cache import CompileCache
from i3dist.engine.toolchain import COMPILER, import_aside, share_compile_workers
from i3dist.errors import UserError, reason, warned
from i3dist.model.compressor_kinds import COMPRESSORS
from i3dist.model.layer_kinds import Stack
from i3dist.model.lm import I3LM, Unfilled
from i3dist.optim.optimizers import OPTIMIZERS
from i3dist.preflight.run import check
from i3dist.tracking import tracker as tracking
from i3dist.tracking.metrics_log import STARTS, MetricsLog
from i3dist.tracking.mlflow_store import FinalModel
from i3dist.tracking.notify import Notifier
from i3dist.tracking.origin import describe, device_name
from i3dist.tracking.tracker import NoTracker, Tracker
from i3dist.training.continuing import further
from i3dist.training.init_from import history_is_off, joined_otherwise
from i3dist.training.micro_batch import check_micro_batch
from i3dist.training.orders import STOP
from i3dist.training.preflight import read_input, wanted
from i3dist.training.run_folder import lay_out
from i3dist.training.start_times import StartTimes
from i3dist.training.startup import (
    Start,
    agree,
    check_attempt,
    check_data,
    decide,
    foresee,
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


def dry_run(settings: Settings, job: Job, fresh: bool = False) -> None:
    """Print what the run would be, memory and speed included; without data, the card's."""
    path, tokens = settings.data.path, None
    if isinstance(path, str) or path.exists():
        corpus = Corpus.open(path, settings.model, data=settings.data)
        tokens = corpus.train.manifest.tokens
        settings = foresee(settings, corpus, job.world_size, fresh)
    else:
        settings = decide(settings, job.world_size, settings.model.vocab)
    if job.rank == 0:
        print_tables(settings, job.world_size, tokens)


def join(
    settings: Settings,
    job: Job,
    stop: StopRequest,
    notifier: Notifier | None = None,
    watchdog: Watchdog | None = None,
) -> Peers:
    """Join the job's process group, unless the preflight has; ranks then hear of others' ends."""
    if stop.peers is not None:
        return stop.peers
    keep_records_in(settings.run.path)
    host.allow_many_files()
    peers = stop.peers = setup.start(job, str(settings.run.path))
    if watchdog is not None:  # the rest of the start is watched, too
        peers.on_hang = watchdog.other_hangs
    if notifier is not None:
        peers.on_end = notifier.leave
    tell_others_by(peers.fail)
    if settings.slurm.successor:
        peers.on_lost = ask_for_successor
    return peers


def preflight(
    arguments: argparse.Namespace, settings: Settings, job: Job, enter: Callable[[], Peers]
) -> Peers:
    """Join the job by `enter`, and check that its hosts fit together.

    Every rank calls this. A rank whose input is wrong joins too, so that all hear of it.

    Raises:
        UserError: on every rank, if something is wrong on any; on one rank, if it cannot join.
    """
    setup.choose_device(settings.train.device)
    given = read_input(arguments, settings, job)
    peers = enter()
    check(given, job)
    return peers


def settle(
    engine_file: Path, settings: Settings, job: Job, corpus: Corpus, fresh: bool
) -> tuple[Start, dict[str, Any]]:
    """Decide the settings, and find whatever is wrong with them before ranks wait for each other.

    Args:
        engine_file: the engine's settings.
        settings: the run's, as the user gave them.
        job: this rank's place.
        corpus: the data.
        fresh: start over, whatever is in the run's folder.

    Returns:
        What the run starts from, and the engine's settings.
    """
    fell_back_to_cpu = setup.choose_device(settings.train.device)
    engine_config = setup.read_engine_config(engine_file)
    start = resolve(settings, engine_config, corpus, job.world_size, fresh)
    check_micro_batch(start.settings, job)
    if fell_back_to_cpu:
        refuse_large(start.settings)
    host.share_threads(job)
    if not devices.uses_cuda():
        host.keep_freed_memory()
    return start, engine_config


def build(
    start: Start,
    engine_config: dict[str, Any],
    job: Job,
    corpus: Corpus,
    stop: StopRequest,
    times: StartTimes,
    watchdog: Watchdog,
) -> Trainer:
    """Build model, engine, tracker and trainer; every rank calls this, and has joined the job."""
    settings = start.settings
    agree(start)
    cache, await_compiler = prepare_compiler(settings, job)
    collectives.on_all_ranks(partial(check_data, corpus, settings.data.on_damage, job))
    await_verified = verify_checkpoint(start, job)
    times.end("checks")
    model = build_model(start, job, corpus)
    times.end("model")
    if await_compiler is not None:
        await_compiler()
        garbage.keep()
        model.compile_blocks()
        print_rank_0("compiling the model: minutes the first time, seconds from then on")
        times.end("imports of the compiler")
    engine = setup.build(model, engine_config, settings.optimizer, settings.train)
    times.end("engine")
    start = await_verified()  # before the run's folder is touched
    times.end("checks")
    tracker = begin_record(start, job, corpus, verbose=times.wanted)
    times.end("run's folder, MLflow")
    with recorded(tracker, stop.peers):
        trainer = Trainer(settings, job, corpus, engine, tracker, stop, times, watchdog, cache)
        if start.checkpoint is not None and start.state is not None:
            trainer.checkpointer.restore(start.checkpoint, start.state)
            times.end("checkpoint")
    return trainer


def prepare_compiler(
    settings: Settings, job: Job
) -> tuple[CompileCache | None, Callable[[], None] | None]:
    """If the model is to be compiled, begin to import the compiler.

    Every rank calls this.

    Returns:
        Where compiled code is kept, and what waits until the compiler can be used: every rank calls
        it. Until then the caller may import nothing of torch's.
    """
    wanted = settings.train.compile
    if not (devices.uses_cuda() if wanted == "auto" else wanted):
        return None, None
    share_compile_workers(host.cores_of_rank(job))
    cache, await_unpacked = compile_cache.enter(settings, job)
    await_imports = import_aside(*COMPILER)

    def wait() -> None:
        await_imports()
        await_unpacked()

    return cache, wait


def build_model(start: Start, job: Job, corpus: Corpus) -> I3LM:
    """The model with its first weights, on this rank's device.

    Where a checkpoint follows, the weights may be zeros until then.
    """
    torch.manual_seed(start.settings.train.seed)
    # Extensions may draw buffers, which checkpoints do not hold: let them draw the same again.
    unfilled = start.checkpoint is not None and not LOADED
    with Unfilled() if unfilled else nullcontext():
        model = I3LM(start.settings.model, corpus.tokenizer.bos_id)
    if start.weights is not None:
        collectives.on_all_ranks(partial(start.weights.load_into, model))
    return model.to(devices.device(job))


def watch_start(
    settings: Settings, job: Job, stop: StopRequest, times: StartTimes, notifier: Notifier
) -> Watchdog:
    """Watch each part of the start; the trainer then says what else is to be watched."""
    watchdog = Watchdog(settings.guard.hang_seconds, job, settings.run.path)
    # By then ranks have said who did not come: each tries twice to reach rank 0.
    late = 2 * read_timeout().total_seconds() + MARGIN_SECONDS
    watchdog.patience.start_seconds = max(UNKNOWN_SECONDS, late)
    watchdog.on_end = partial(let_go, stop, notifier)
    times.on_end = partial(watchdog.beat, START)
    watchdog.beat(START)
    return watchdog


def let_go(stop: StopRequest, notifier: Notifier, why: str) -> None:
    """Before the watchdog ends this rank: have the others report and end as well."""
    if stop.peers is not None:
        stop.peers.hang()
    # In threads, because a file system that hangs would block them.
    for tell in (ask_for_requeue, partial(notifier.leave, why, True)):
        threading.Thread(target=tell, daemon=True).start()


def tell_of_waits(watchdog: Watchdog, peers: Peers, notifier: Notifier) -> None:
    """Have ranks that wait for data tell the others, and rank 0 tell people."""

    def say(seconds: float, what: str) -> None:
        notifier.waits(seconds, what)
        peers.say_wait(seconds, what)

    def hear(seconds: float, what: str) -> None:
        notifier.waits(seconds, what)
        watchdog.other_waits(seconds)

    watchdog.on_wait, peers.on_wait = say, hear


@contextmanager
def recorded(tracker: Tracker | NoTracker, peers: Peers | None) -> Iterator[None]:
    """Record a failure inside in the tracker, and explain it if possible.

    Raises:
        UserError: in place of the error of a lost rank or of a GPU without memory.
    """
    try:
        yield
    except BaseException as error:
        lost = collectives.lost_peer(error)
        if lost and peers is not None:
            peers.await_verdict()
        with warned("tracking"):
            tracker.finish("FAILED")
        if lost:
            raise UserError(
                "another rank of the job ended early; its message says why, and if there is none: "
                f"{reason(error)}"
            ) from None
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
    hosts = list(dict.fromkeys(collectives.gather_objects(host_name())))
    if job.rank != 0:
        return NoTracker()
    attempt = Attempt.detect()
    place = f"on {', '.join(hosts)} ({device_name()})"
    print_topic("started", f"{time.strftime(TIME)}{attempt}, {place}")
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
    facts = {"job": attempt.job, "restarts": attempt.restarts, "hosts": hosts}
    MetricsLog(settings.run.path / STARTS).append(taken, origin.facts | facts)
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
        if start.weights is not None:
            yield history_is_off(settings)
            yield joined_otherwise(settings, start.weights)
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
    job = detect_job(settings)
    preflight(arguments, settings, job, partial(join, settings, job, StopRequest(job))).close()
    collectives.leave_group()


def leave_early(
    settings: Settings, trainer: Trainer, stop: StopRequest, notifier: Notifier
) -> NoReturn:
    """Say that a run was told to stop, and has saved; exit with the status that fits."""
    step, ordered = trainer.progress.step, trainer.orders.stop
    why = f"as {settings.run.path / STOP} asked" if ordered else "on request"
    longer = (settings.run.path / WEIGHTS).exists()  # than when it ended before
    older = f" ({WEIGHTS} is of an earlier step until it ends)" if longer else ""
    print_rank_0(f"stopped {why} at step {step}: run the same command to continue{older}")
    notifier.stop("end" if ordered else "requeue", stop.reason or f"stopped {why}")
    stop.exit(0 if ordered else REQUEUE)


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Train, or say what the run would be.

    Args:
        arguments: options of `programs/train.py`: deepspeed, fresh, verbose, dry_run.
        settings: as the user gave them.

    Raises:
        UserError: whatever a user can get wrong.
    """
    times = StartTimes()
    job = detect_job(settings)
    garbage.keep()
    times.end("imports")
    times.wanted = arguments.verbose and job.rank == 0
    stop = StopRequest(job)
    if arguments.dry_run:
        dry_run(settings, job, arguments.fresh)
        return
    notifier = Notifier(settings.run.path, settings.tracking.notify, job.rank == 0)
    call_on_failure(partial(notifier.stop, "failure"))
    with watch_start(settings, job, stop, times, notifier) as watchdog:
        enter = partial(join, settings, job, stop, notifier, watchdog)
        if wanted(arguments, job):
            preflight(arguments, settings, job, enter)
        fresh = check_attempt(settings, arguments.fresh)
        corpus = Corpus.open(settings.data.path, settings.model, data=settings.data)
        times.end("data")
        start, engine_config = settle(arguments.deepspeed, settings, job, corpus, fresh)
        times.end("settings")
        peers = enter()
        tell_of_waits(watchdog, peers, notifier)
        times.end("process group")
        trainer = build(start, engine_config, job, corpus, stop, times, watchdog)
        notifier.start(trainer.progress.step)
        with recorded(trainer.log.tracker, stop.peers):
            done = trainer.fit()
    with warned("tracking"):
        trainer.log.tracker.finish("FINISHED" if done else "KILLED")
    if not done:
        leave_early(settings, trainer, stop, notifier)
    with warned("after training"):
        print_rank_0(f"done: {settings.run.path}")
        print_charts(trainer.log.tracker)
    with warned("tracking"):
        log_model(trainer, stop)
    notifier.stop("end")
    with warned("after training"):
        collectives.leave_group()
