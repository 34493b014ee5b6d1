"""What ranks agree on in the exchange that ends a step: to stop, orders, and a failed save."""

from dataclasses import dataclass

import torch
from torch import Tensor

from i3dist.checkpoint.async_saver import AsyncSaver
from i3dist.distributed import collectives
from i3dist.distributed.signals import StopRequest
from i3dist.training.orders import Orders


@dataclass
class Votes:
    """This rank's votes, and what the job has decided by the sums of all ranks' votes."""

    stop: StopRequest
    saver: AsyncSaver
    orders: Orders

    @property
    def to_stop(self) -> bool:
        """Whether the ranks have agreed to save and stop, on a signal or an order."""
        return self.stop.agreed() or self.orders.stop

    def own(self) -> tuple[float, ...]:
        """To stop, that the last checkpoint failed, to save, to stop by order: 0 or 1 each."""
        return self.stop.vote(), self.saver.failed(), *self.orders.votes()

    def append_to(self, figure: Tensor) -> Tensor:
        """A scalar and this rank's votes, [5] on its device, to be summed over ranks."""
        # `new_full` fills on the device; a copy from the host would wait.
        return torch.stack([figure, *(figure.new_full((), vote) for vote in self.own())])

    def count(self, stop: float, failed: float, *orders: float) -> None:
        """Take in the sums of all ranks' votes.

        Raises:
            UserError: on every rank, if the last checkpoint of any was not written.
        """
        self.stop.count(stop)
        self.orders.count(*orders)
        if failed:
            self.saver.wait()  # raises the reason

    def exchange(self, device: torch.device) -> None:
        """Vote outside of a step; every rank calls this."""
        self.count(*collectives.all_sum(torch.tensor(self.own(), device=device)).tolist())
