"""What is asked of CUDA's driver before torch is imported."""

import ctypes
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from i3dist.distributed import cuda_driver


def begun(wanted: str, environ: dict[str, str], load: Callable[[str], object]) -> mock.Mock:
    """What `start_driver` gives to `aside`, once it has run."""
    started = mock.Mock(side_effect=lambda work, name: work())
    with (
        mock.patch.object(cuda_driver, "aside", started),
        mock.patch.object(ctypes, "CDLL", load),
    ):
        cuda_driver.start_driver(wanted, environ)
    return started


@pytest.mark.parametrize(
    ("wanted", "environ", "starts"),
    [
        ("auto", {}, True),
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("auto", {"DS_ACCELERATOR": "cpu"}, False),
        ("cuda", {"DS_ACCELERATOR": "cuda"}, True),
    ],
)
@pytest.mark.parametrize("status", [0, 100], ids=["a GPU", "no GPU"])
def test_it_starts_where_a_gpu_may_be_used(
    wanted: str, environ: dict[str, str], starts: bool, status: int
) -> None:
    driver = mock.Mock()
    driver.cuInit.return_value = status
    begun(wanted, environ, mock.Mock(return_value=driver))
    assert driver.cuInit.call_args_list == [mock.call(0)] * starts
    assert driver.cuDevicePrimaryCtxRetain.called == (starts and status == 0)


def test_without_a_driver_nothing_happens() -> None:
    assert begun("auto", {}, mock.Mock(side_effect=OSError)).called


@pytest.mark.parametrize(("status", "count"), [(0, 3), (100, 0)], ids=["GPUs", "no GPU"])
def test_gpus_are_counted(status: int, count: int) -> None:
    def fill(place: Any) -> None:
        place._obj.value = 3

    driver = mock.Mock()
    driver.cuInit.return_value, driver.cuDeviceGetCount.side_effect = status, fill
    with mock.patch.object(ctypes, "CDLL", return_value=driver):
        assert cuda_driver.count_gpus() == count
    with mock.patch.object(ctypes, "CDLL", side_effect=OSError):
        assert cuda_driver.count_gpus() == 0


def test_torch_counts_as_many() -> None:
    assert cuda_driver.count_gpus() == torch.cuda.device_count()
