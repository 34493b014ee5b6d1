"""Exchanges between ranks, without a process group and with ranks that fail."""

import pytest
import torch

from i3dist.distributed import collectives
from i3dist.distributed.console import print_rank_0


def test_alone_the_collectives_do_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.tensor([2.0])
    assert collectives.all_sum(tensor) is tensor and tensor.item() == 2.0
    collectives.barrier()
    monkeypatch.delenv("RANK", raising=False)
    print_rank_0("step", 1)
    monkeypatch.setenv("RANK", "1")
    print_rank_0("unheard")
    assert capsys.readouterr().out == "step 1\n"
