"""Run by each of three ranks: the engine's gradients against those of one plain model.

torchrun --nproc-per-node 3 tests/distributed/gradients.py
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from i3dist.config import ModelSettings, OptimizerSettings, TrainSettings  # noqa: E402
from i3dist.distributed import collectives  # noqa: E402
from i3dist.distributed.job import Job  # noqa: E402
from i3dist.engine import setup  # noqa: E402
from i3dist.engine.zero2 import Zero2Engine  # noqa: E402
from i3dist.model.lm import I3LM  # noqa: E402
from i3dist.model.state import LaneState  # noqa: E402
from i3dist.training.precompile import part_size  # noqa: E402
from tests.model.conftest import BOS, SMALL  # noqa: E402
from tests.model.streams import depth_of, stream  # noqa: E402

LANES, MICRO_BATCHES = 12, 2
SIZES = ModelSettings.model_validate(SMALL)


def build() -> I3LM:
    torch.manual_seed(0)
    return I3LM(SIZES, BOS)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and depth of all lanes."""
    rows = [stream(i, 4, SIZES.chunk_length, SIZES.vocab_size, 30) for i in range(LANES)]
    tokens = torch.cat(rows)
    return tokens, tokens.roll(-1, -1), depth_of(tokens)


def losses(model: Any, parts: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    state = LaneState.empty(len(parts[0]), SIZES, torch.device("cpu"), dtype)
    return model(*parts, state, torch.tensor(1.0))[0]


def plain_norm(dtype: torch.dtype) -> float:
    """Norm of the mean loss's gradient, over all lanes at once."""
    model = build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    tokens, *rest = batch()
    (losses(model, (tokens, *rest), dtype).sum() / tokens.numel()).backward()
    return float(torch.stack([p.grad.float().norm() for p in model.parameters()]).norm())


def engine_norms(job: Job, dtype: torch.dtype, bucket: int) -> list[float]:
    """Norms of two steps in which nothing is updated, in micro-batches of this rank's lanes.

    Two kinds: of the whole, and made up of the norms of the model's parts.
    """
    config = setup.read_engine_config(ROOT / "configs" / "zero2.json")
    config["zero_optimization"]["reduce_bucket_size"] = bucket
    if dtype == torch.float32:
        config["bf16"] = {"enabled": False}
    train = TrainSettings(clip=1e9)
    trained = setup.build(build(), config, OptimizerSettings(), train)
    assert isinstance(trained, Zero2Engine)
    sizes = [part_size(flat.parameter.numel(), job.world_size) for flat in trained._flat.flats]
    assert trained._zero.partition_sizes == sizes, "what is compiled ahead would not fit"
    trained.accumulate(MICRO_BATCHES)
    lanes = torch.arange(LANES).tensor_split(job.world_size)[job.rank]
    whole = batch()
    norms = []
    for _ in range(2):
        for rows in lanes.tensor_split(MICRO_BATCHES):
            part = losses(trained, tuple(x[rows] for x in whole), dtype)
            trained.backward(part.sum(), torch.tensor(whole[0].numel()))
        tops = sorted({name.split(".")[0] for name, _ in trained.model.named_parameters()})
        parts = [trained.gradient_norm_of(f"{top}.") for top in tops]
        norms.append(float(torch.tensor(parts).norm()))
        norms.append(trained.step(0.0).norm)
    return norms


def main() -> None:
    job = Job.detect()
    torch.set_num_threads(1)
    setup.start(job)
    # 7 elements in parts of 3: the last rank's part ends in padding.
    part = collectives.sum_parts(torch.arange(7.0) * (job.rank + 1), 3, torch.float32)
    want = torch.tensor([*(6.0 * torch.arange(7.0)), 0.0, 0.0])
    assert part.equal(want[3 * job.rank :][:3]), part
    for dtype, bucket in itertools.product((torch.bfloat16, torch.float32), (10**6, 5000)):
        plain, norms = plain_norm(dtype), engine_norms(job, dtype, bucket)
        close = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert all(abs(norm - plain) <= close * plain for norm in norms), (dtype, norms, plain)
    collectives.leave_group()
    print(f"rank {job.rank} agrees")


if __name__ == "__main__":
    main()
