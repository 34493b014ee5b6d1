"""The record of a run, which rank 0 keeps: its folder and MLflow, from the start to the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from i3dist.checkpoint import store
from i3dist.checkpoint.format import TOKENIZER
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.distributed import collectives
from i3dist.distributed.attempt import TIME, Attempt
from i3dist.distributed.console import print_rank_0
from i3dist.distributed.job import Job, host_name
from i3dist.distributed.peers import Peers
from i3dist.distributed.rendezvous import read_timeout
from i3dist.distributed.signals import StopRequest
from i3dist.errors import UserError, reason, warned
from i3dist.tracking import tracker as tracking
from i3dist.tracking.metrics_log import STARTS, MetricsLog
from i3dist.tracking.mlflow_store import FinalModel
from i3dist.tracking.origin import describe, device_name
from i3dist.tracking.tracker import NoTracker, Tracker
from i3dist.training.continuing import further
from i3dist.training.init_from import history_is_off, joined_otherwise
from i3dist.training.run_folder import lay_out
from i3dist.training.startup import Start, idle_lanes
from i3dist.training.summary import count_parameters, print_overview, print_tables, print_topic
from i3dist.training.trainer import Trainer


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
    for name in (store.SETTINGS, TOKENIZER):
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
