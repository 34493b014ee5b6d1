"""The training step of plain data parallelism: PyTorch's DistributedDataParallel around the model.

Every rank holds all weights, gradients and optimizer states. Gradients are averaged in buckets
while backward still runs.
"""

from typing import Any

import torch
import torch.distributed as torch_dist
from bare_loop import BareLoop
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from i3dist.config import OptimizerSettings
from i3dist.model.lm import I3LM


class DataParallelLoop(BareLoop):
    """`BareLoop` on every rank, with the gradient of all ranks."""

    def __init__(self, model: I3LM, settings: OptimizerSettings, clip: float, wire: str):
        """Take over the model; `wire` is what gradients are summed in, bf16 or fp32."""
        super().__init__(model, settings, clip)
        self._ranks = torch_dist.get_world_size()
        if self._ranks > 1:
            parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
            if wire == "fp32":
                parallel.register_comm_hook(None, average_in_fp32)
            self.model = parallel

    def backward(self, loss_sum: Tensor, targets: Tensor) -> None:
        """See `BareLoop.backward`; the average over ranks is undone."""
        super().backward(loss_sum * self._ranks, targets)


def average_in_fp32(_: None, bucket: torch_dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of bf16 gradients over ranks in fp32."""
    gradients = bucket.buffer()
    wide = gradients.float() / torch_dist.get_world_size()
    summed = torch_dist.all_reduce(wide, async_op=True).get_future()

    def narrowed(done: Any) -> Tensor:
        return gradients.copy_(done.value()[0])

    return summed.then(narrowed)
