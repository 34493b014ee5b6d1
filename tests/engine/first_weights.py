"""Run by each of two ranks: all have the first weights that rank 0 initializes, to the last bit."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from i3dist.config import Settings
from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.engine import setup
from i3dist.model.lm import I3LM
from i3dist.training.run import build_model
from i3dist.training.startup import Start
from tests.engine.agreement import whole_state
from tests.engine.steps import ENGINES, ZERO2, backward, batch
from tests.model.streams import BOS

THREADS = (1, 2)  # of each rank
# With less width the compressor's orthogonal matrices do not depend on the number of threads.
MODEL = {"model.d_model": 256, "model.layers": "1xrwkv,1xattention", "model.chunk_length": 12}
MODEL |= {"model.vocab_size": 40, "model.latents": 3, "model.sub_latents": 2}
MODEL |= {"model.history_chunks": 3}


def initialized(settings: Settings) -> I3LM:
    """The model of the seed, as the main thread initializes it."""
    torch.manual_seed(settings.train.seed)
    return I3LM(settings.model, BOS)


def check(kind: str, job: Job) -> None:
    settings = Settings().with_values(**MODEL, **{"train.engine": kind})
    corpus = cast("Any", SimpleNamespace(tokenizer=SimpleNamespace(bos_id=BOS)))
    torch.set_num_threads(THREADS[job.rank])
    model, await_weights = build_model(Start(settings), job, corpus)
    config = setup.read_engine_config(ZERO2)
    engine = setup.build(model, config, settings.optimizer, settings.train)
    assert type(engine) is ENGINES[kind] and await_weights is not None
    engine.set_weights(await_weights())
    torch.set_num_threads(THREADS[0])
    wanted = {
        name: parameter.detach().to(engine.dtype)
        for name, parameter in initialized(settings).named_parameters()
    }
    wrong = [name for name in wanted if not engine.model.get_parameter(name).equal(wanted[name])]
    loss = backward(engine, batch(1), 1)
    losses = collectives.gather_objects(loss.item())
    engine.step(0.0)  # changes no weight, and makes the state that a snapshot has
    state = whole_state(engine)
    wrong += [
        name for name in wanted if not state[name]["weight"].equal(wanted[name].float().flatten())
    ]
    assert not wrong and len(set(losses)) == 1, (kind, job.rank, wrong, losses)


def main() -> None:
    job = Job.detect()
    setup.start(job)
    for kind in ENGINES:
        check(kind, job)
    collectives.leave_group()
    print(f"rank {job.rank} agrees", flush=True)


if __name__ == "__main__":
    main()
