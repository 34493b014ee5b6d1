"""Train an i3 model: `deepspeed launch/train.py --deepspeed configs/zero2.json`.

Runs under deepspeed, torchrun, Slurm (see slurm/train.sbatch) or plain python (one rank). Started
again with the same settings, it continues from the newest checkpoint in run.path.

SIGTERM or SIGUSR1 to any rank, or the launcher's end, stops the job after the step at hand: it
saves and leaves with status 75, which means: start me again. Status 1 is an error, in one line.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, keep_tracebacks_in, one_line_errors
from i3dist.config import Settings, setting_lines
from i3dist.data.corpus import Corpus
from i3dist.distributed import collectives, devices, host
from i3dist.distributed.job import Job
from i3dist.distributed.signals import Stop
from i3dist.engine import zero2
from i3dist.errors import UserError, warned
from i3dist.model.lm import I3LM
from i3dist.tracking import tracker as tracking
from i3dist.tracking.origin import describe
from i3dist.tracking.tracker import NoTracker, Tracker
from i3dist.training.startup import (
    Start,
    agree,
    decide,
    idle_lanes,
    lay_out,
    preflight,
    resolve,
    verify,
)
from i3dist.training.summary import (
    count_parameters,
    early_history,
    print_overview,
    print_tables,
    print_topic,
    refuse_large,
)
from i3dist.training.trainer import Trainer, check_micro_batch


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--help` lists every setting."""
    settings = "\n".join(
        f"  {name}={default}\n      {text}" for name, default, text in setting_lines()
    )
    parser = ArgumentParser(
        description=__doc__,
        epilog=f"settings and their defaults:\n{settings}",
    )
    parser.add_argument(
        "--deepspeed",
        type=typed_path,
        metavar="FILE",
        default=Path(__file__).parent.parent / "configs" / "zero2.json",
        help="engine settings (default: configs/zero2.json)",
    )
    parser.add_argument("--config", type=typed_path, metavar="FILE", help="settings as YAML")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run is set aside")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would be, stop")
    parser.add_argument(
        "--verbose", action="store_true", help="print all settings, parameters and memory first"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed appends it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, see below"
    )
    return parser.parse_intermixed_args()  # settings and options in any order


def dry_run(settings: Settings, job: Job) -> None:
    """Print settings, parameters, tokens per step and memory; without data, the card's."""
    vocab_size = settings.model.vocab
    if settings.data.path.exists():
        vocab_size = Corpus.open(settings.data.path, settings.model).tokenizer.vocab_size
    if job.rank == 0:
        settings = decide(settings, job.world_size, vocab_size)
        print_tables(settings, job.world_size)
        if note := early_history(settings):
            collectives.say(note)


def build(
    arguments: argparse.Namespace, settings: Settings, job: Job, corpus: Corpus, stop: Stop
) -> Trainer:
    """Settle the settings, join the job, and put model, engine and tracker together."""
    # All that can be wrong with the input is found before the ranks wait for each other.
    for_want_of_gpu = zero2.choose_device(settings.train.device)
    engine_config = zero2.read_engine_config(arguments.deepspeed)
    start = resolve(settings, engine_config, corpus, job.world_size, arguments.fresh)
    settings = start.settings
    check_micro_batch(settings, job)
    if for_want_of_gpu:
        refuse_large(settings)
    host.share_threads(job)
    if not devices.uses_cuda():
        host.keep_freed_memory()
    zero2.start(job, str(settings.run.path))
    agree(start)
    preflight(corpus, settings.data.on_damage, job)
    start = verify(start, job)
    torch.manual_seed(settings.train.seed)
    model = I3LM(settings.model, corpus.tokenizer.bos_id)
    if settings.train.compile is True or (settings.train.compile == "auto" and devices.uses_cuda()):
        model.compile_blocks()
        collectives.say("compiling the model: minutes the first time, seconds from then on")
    started = zero2.Engine(model, engine_config, settings.optimizer, settings.train)
    tracker = begin_record(start, job, corpus, arguments.verbose)
    with recorded(tracker):
        trainer = Trainer(settings, job, corpus, started, tracker, stop)
        if start.checkpoint is not None and start.state is not None:
            trainer.resume(start.checkpoint, start.state)
    return trainer


@contextmanager
def recorded(tracker: Tracker | NoTracker) -> Iterator[None]:
    """What fails inside is entered in the record, and explained where that can be done."""
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
    """On rank 0: prepare the run's folder, say what the run is, and open it in MLflow.

    Every rank calls this, and where the folder cannot be prepared all say so.
    """
    settings = start.settings
    collectives.together(lambda: lay_out(start, corpus) if job.rank == 0 else None)
    if job.rank != 0:
        return NoTracker()
    if verbose:
        print_tables(settings, job.world_size)
    print_overview(settings, corpus, job.world_size)
    if start.checkpoint is None:  # later these settings stay
        for note in filter(None, (idle_lanes(settings, corpus), early_history(settings))):
            collectives.say(note)
    parameters = sum(count_parameters(settings).values())
    origin = describe(settings, corpus, parameters, job.world_size)
    tracker = tracking.start(settings, origin, fresh=start.checkpoint is None)
    for name in ("settings.yaml", "tokenizer.json"):
        tracker.artifact(settings.run.path / name)
    print_charts(tracker)
    return tracker


def print_charts(tracker: Tracker | NoTracker) -> None:
    """Say how to see the charts of the run in MLflow."""
    for topic, text in zip(("charts", ""), tracker.where(), strict=False):
        print_topic(topic, text)


def main() -> None:
    """Train, or say in one line why not."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = parse_arguments()
    settings = Settings.load(arguments.config, arguments.overrides)
    keep_tracebacks_in(settings.run.path)
    job = Job.detect()
    stop = Stop(job)
    logging.getLogger("i3dist").setLevel(logging.INFO if job.rank == 0 else logging.ERROR)
    if arguments.dry_run:
        dry_run(settings, job)
        return
    corpus = Corpus.open(settings.data.path, settings.model)
    trainer = build(arguments, settings, job, corpus, stop)
    with recorded(trainer.tracker):
        done = trainer.fit()
    with warned("tracking"):
        trainer.tracker.finish("FINISHED" if done else "KILLED")
    if not done:
        collectives.say(
            f"stopped as asked, at step {trainer.progress.step}: the same command goes on"
        )
        stop.leave()
    with warned("after training"):
        collectives.say(f"done: {settings.run.path}")
        print_charts(trainer.tracker)
        collectives.leave()


if __name__ == "__main__":
    with one_line_errors():
        main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # what libraries do as an interpreter ends does not decide the status
