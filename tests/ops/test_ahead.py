"""Kernels that are compiled before they are called: once each, with tensors that hold nothing."""

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from i3dist.ops import ahead
from i3dist.ops import wkv as wkv_module
from i3dist.ops.wkv import WkvInputs, compile_wkv, wkv


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


def test_a_prompt_waits_for_the_kernel_that_was_begun_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, called = threading.Event(), []

    class Form:
        @staticmethod
        def forward(inputs: WkvInputs) -> tuple[Tensor, Tensor | None, None]:
            assert not inputs.k.is_meta or go_on.wait(10)
            called.append((inputs.k.is_meta, [part.shape for part in inputs if part is not None]))
            return inputs.k, inputs.state, None

    monkeypatch.setattr(wkv_module, "_form", lambda kind: Form)
    with FakeTensorMode():
        compile_wkv(5, 16, torch.bfloat16, torch.device("cuda"))
    threading.Timer(0.2, go_on.set).start()
    k, curve = torch.zeros(1, 5, 16), torch.zeros(16)
    with torch.no_grad():
        wkv(WkvInputs(curve, curve, k, k, torch.zeros(1, 5, dtype=torch.bool), None, k))
    (ahead_of, shapes), (itself, same) = called
    assert ahead_of and not itself and shapes == same
