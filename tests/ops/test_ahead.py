"""Kernels that are compiled before they are called: once each, with tensors that hold nothing."""

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from i3dist.ops import ahead


class Inputs(NamedTuple):
    x: Tensor
    also: Tensor | None
    size: float


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    yield
    assert not ahead._begun


def traced(rows: int, device: str = "cuda") -> Inputs:
    """What an operator gets while it is traced."""
    with FakeTensorMode():
        return Inputs(torch.empty(rows, 3, dtype=torch.bfloat16, device=device), None, 0.5)


def test_a_kernel_is_compiled_once_while_the_caller_goes_on() -> None:
    go_on, given = threading.Event(), []

    def form(*inputs: Any) -> None:
        assert go_on.wait(10)
        given.append(inputs)

    for rows in (2, 2, 4):
        ahead.compile_ahead(form, [], traced(rows), 7)
    ahead.compile_ahead(form, traced(2, "cpu"))
    assert not given
    go_on.set()
    ahead.wait_for(form)
    assert sorted(inputs[1].x.shape[0] for inputs in given) == [2, 4]
    for nothing, inputs, number in given:
        assert (nothing, inputs.also, inputs.size, number) == ([], None, 0.5, 7)
        assert inputs.x.is_meta and inputs.x.dtype == torch.bfloat16


def test_what_goes_wrong_is_left_to_the_call() -> None:
    def form(inputs: Inputs) -> None:
        raise RuntimeError

    ahead.compile_ahead(form, traced(2))
    ahead.wait_for(form)
