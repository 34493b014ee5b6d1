"""One rank of a run, from its settings to its end: what `i3dist train` does."""

import argparse
import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from i3dist import garbage
from i3dist.aside import aside
from i3dist.checkpoint.weights import WEIGHTS
from i3dist.cli.extend import LOADED
from i3dist.cli.program import call_on_failure, keep_tracebacks_in, tell_others_by
from i3dist.config import ModelSettings, Settings
from i3dist.data.corpus import Corpus
from i3dist.data.schedule import lanes_of_rank
from i3dist.distributed import collectives, devices, host
from i3dist.distributed.attempt import REQUEUE, ask_for_requeue, ask_for_successor
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.hang_report import keep_records_in
from i3dist.distributed.job import Job
from i3dist.distributed.patience import START, UNKNOWN_SECONDS
from i3dist.distributed.peers import Peers
from i3dist.distributed.rendezvous import read_timeout
from i3dist.distributed.signals import StopRequest
from i3dist.distributed.watchdog import MARGIN_SECONDS, Watchdog
from i3dist.engine import compile_cache, setup
from i3dist.engine.compile_cache import CompileCache
from i3dist.engine.toolchain import COMPILER, import_aside, set_up_compiler
from i3dist.errors import warned
from i3dist.model.compressor_kinds import COMPRESSORS
from i3dist.model.layer_kinds import Stack
from i3dist.model.lm import I3LM, Unfilled, WithGenerator
from i3dist.ops import compiled
from i3dist.optim.optimizers import OPTIMIZERS
from i3dist.preflight.run import check
from i3dist.tracking.notify import Notifier
from i3dist.training.micro_batch import check_micro_batch
from i3dist.training.orders import STOP
from i3dist.training.precompile import Step, compile_aside
from i3dist.training.preflight import read_input, wanted
from i3dist.training.record import begin_record, log_model, print_charts, recorded
from i3dist.training.start_times import StartTimes
from i3dist.training.startup import (
    Start,
    agree,
    check_attempt,
    check_data,
    foresee,
    resolve,
    verify_checkpoint,
)
from i3dist.training.summary import print_tables, refuse_large
from i3dist.training.trainer import Trainer


def dry_run(settings: Settings, job: Job, fresh: bool = False) -> None:
    """Print what the run would be, memory and speed included; without data, as far as known."""
    path, corpus, tokens = settings.data.path, None, None
    if isinstance(path, str) or path.exists():
        corpus = Corpus.open(path, settings.model, data=settings.data)
        tokens = corpus.train.manifest.tokens
    settings = foresee(settings, corpus, job.world_size, fresh)
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
    await_compiled = precompile(cache, start, engine_config, job, corpus)
    collectives.on_all_ranks(partial(check_data, corpus, settings.data.on_damage, job))
    await_verified = verify_checkpoint(start, job)
    times.end("checks")
    model, await_weights = build_model(start, job, corpus)
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
        await_compiled()
        times.end("compilation")
        trainer = Trainer(settings, job, corpus, engine, tracker, stop, times, watchdog, cache)
        if start.checkpoint is not None and start.state is not None:
            trainer.checkpointer.restore(start.checkpoint, start.state)
            times.end("checkpoint")
        elif await_weights is not None:
            engine.set_weights(await_weights())
            times.end("weights")
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
    cache, await_unpacked = compile_cache.enter(settings, job)
    # An extension may call code that the folder's name says nothing of.
    compiled.keep_in(None if cache is None or LOADED else cache.functions)
    await_imports = import_aside(*COMPILER)

    def wait() -> None:
        await_imports()
        await_unpacked()

    return cache, wait


def precompile(
    cache: CompileCache | None,
    start: Start,
    engine_config: dict[str, Any],
    job: Job,
    corpus: Corpus,
) -> Callable[[], None]:
    """Have other processes compile the training step, if this is the first with such a step.

    Returns:
        What waits for them. If there is an archive of compiled code, they begin only then, by which
        time it must have been unpacked.
    """
    settings, train = start.settings, start.settings.train
    if cache is None or LOADED or train.engine != "zero2":
        return lambda: None
    lanes = len(lanes_of_rank(train.lane_count, job.rank, job.world_size))
    step = Step(
        model=settings.to_dict()["model"],
        optimizer=settings.to_dict()["optimizer"],
        ranks=job.world_size,
        window_chunks=train.window_chunks,
        lanes=lanes if train.micro_batch == "auto" else train.micro_batch,
        joins=settings.compression.joins,
        dtype="bfloat16" if engine_config.get("bf16", {}).get("enabled") else "float32",
        device=str(devices.device(job)),
        bos_id=corpus.tokenizer.bos_id,
        pad_id=corpus.train.manifest.pad_id,
    )
    work = partial(compile_aside, step, cache.functions, host.cores_of_rank(job))
    return work if cache.archive.exists() else aside(work, "compilation")


def build_model(
    start: Start, job: Job, corpus: Corpus
) -> tuple[I3LM, Callable[[], I3LM | None] | None]:
    """The model on this rank's device.

    Returns:
        The model; and None if it has its first weights or if those of a checkpoint follow, which
        may be zeros until then. Else what waits for a model on the CPU that has its first weights:
        rank 0 initializes them in a thread, while this one's shape is all that is needed. Other
        ranks get None there, as they would round otherwise with other threads or another CPU.
    """
    settings, bos_id = start.settings.model, corpus.tokenizer.bos_id
    seed, device = start.settings.train.seed, devices.device(job)
    torch.manual_seed(seed)
    # Extensions may sample buffers, which checkpoints do not hold: let them sample the same again.
    with nullcontext() if LOADED else Unfilled() as unfilled:
        model = I3LM(settings, bos_id)
    if unfilled is not None:
        unfilled.fill(device)
    await_weights = None
    if start.weights is not None:
        collectives.on_all_ranks(partial(start.weights.load_into, model))
    elif start.checkpoint is None and not LOADED:
        first = job.rank == 0
        await_weights = initialize_aside(settings, bos_id, seed) if first else lambda: None
    return model.to(device), await_weights


def initialize_aside(settings: ModelSettings, bos_id: int, seed: int) -> Callable[[], I3LM]:
    """Build a model with the first weights of a seed in a thread; returns what waits for it."""
    threads = torch.get_num_threads()

    def initialize() -> I3LM:
        torch.set_num_threads(threads)  # of this thread: rounding may depend on their number
        with WithGenerator(torch.Generator().manual_seed(seed)):
            return I3LM(settings, bos_id)

    return aside(initialize, "weights")


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
    set_up_compiler(host.cores_of_rank(job))
    garbage.keep()
    times.end("imports")
    times.wanted = arguments.verbose and job.rank == 0
    stop = StopRequest(job)
    if arguments.dry_run:
        ranks = max(job.world_size, arguments.gpus)  # those of --gpus are not started for this
        dry_run(settings, replace(job, world_size=ranks), arguments.fresh)
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
        notifier.start(lambda: trainer.progress.step)
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
