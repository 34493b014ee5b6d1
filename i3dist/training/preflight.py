"""What a rank makes of its input before the ranks meet: facts for the preflight."""

import argparse
import json
from dataclasses import replace

from i3dist.checkpoint import store
from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.distributed.job import Job
from i3dist.engine import setup
from i3dist.errors import UserError
from i3dist.optim.optimizers import OPTIMIZERS
from i3dist.preflight.facts import Given
from i3dist.training.micro_batch import check_micro_batch
from i3dist.training.startup import check_attempt, check_data, resolve
from i3dist.training.summary import count_parameters


def wanted(arguments: argparse.Namespace, job: Job) -> bool:
    """Whether a run begins with a preflight: on several hosts, unless the user skips it."""
    return not arguments.no_preflight and job.local_world_size < job.world_size


def read_input(arguments: argparse.Namespace, settings: Settings, job: Job) -> Given:
    """What this rank makes of its input; whatever is wrong with it becomes `fault`."""
    typed = {name: str(value) for name, value in settings.flat().items()}
    typed["--fresh"] = str(arguments.fresh)
    given = Given(settings.run.path, typed, arguments.deepspeed)
    try:
        fresh = check_attempt(settings, arguments.fresh)
        corpus = Corpus.open(settings.data.path, settings.model, data=settings.data)
        engine = setup.read_engine_config(arguments.deepspeed)
        start = resolve(settings, engine, corpus, job.world_size, fresh)
        check_micro_batch(start.settings, job)
        check_data(corpus, settings.data.on_damage, job)
    except UserError as error:
        return replace(given, fault=str(error))
    kept = store.steps(settings.run.path / store.CHECKPOINTS) if start.checkpoint else []
    return replace(
        given,
        engine=json.dumps(engine, sort_keys=True),
        data=corpus.fingerprint,
        step=start.state.step if start.state else 0,
        checkpoint_bytes=checkpoint_bytes(start.settings),
        checkpoints_to_come=max(1, 2 - len(kept)),
    )


def checkpoint_bytes(settings: Settings) -> float:
    """Size of a checkpoint: weights and the optimizer's tensors in fp32; lanes take little."""
    states = len(OPTIMIZERS.of(settings.optimizer.kind).states)
    return 4.0 * (1 + states) * sum(count_parameters(settings).values())
