"""Functions that are kept whole: the same bits without tracing, for what they were compiled for."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i3dist.config import Settings
from i3dist.model.block import Place
from i3dist.model.layers import Channels, LayerNorm
from i3dist.model.rwkv import RwkvBlock
from i3dist.ops import compiled
from i3dist.ops.compiled import Compiled

SIZE = 3
ONES = torch.ones(2)


def scaled(x: Tensor, norm: nn.Module, times: float = 2.0) -> Tensor:
    return norm(x) * times * SIZE


def broken(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x + 1


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    compiled.keep_in(tmp_path / "functions")
    compiled.prepared.clear()
    yield tmp_path / "functions"
    compiled.keep_in(None)
    compiled.prepared.clear()


def how() -> list[str]:
    """What became of each function since the last call."""
    found = [one.how for one in compiled.prepared]
    compiled.prepared.clear()
    return found


def run(call: Any, *inputs: Any, module: nn.Module) -> list[Tensor]:
    """The result, and its gradients in the module's parameters."""
    y = call(*inputs)
    y = y if isinstance(y, Tensor) else y[0]
    return [y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_block_that_is_loaded_computes_the_same_bits() -> None:
    width = Channels(32)
    torch.manual_seed(0)
    block = RwkvBlock(Place(Settings().model, width, 0, 2))
    x = torch.randn(2, 8, 32)
    restart = torch.rand(2, 8) < 0.2
    inputs = (block, x, restart, block.empty_state(2, 32, x))
    first = run(Compiled(RwkvBlock.forward), *inputs, module=block)
    assert how() == ["compiled"]
    torch._dynamo.reset()
    again = run(Compiled(RwkvBlock.forward), *inputs, module=block)
    assert how() == ["loaded"]
    assert same(first, again)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1)
    loaded = Compiled(RwkvBlock.forward)
    assert torch.allclose(loaded(*inputs)[0], block(x, restart, inputs[3])[0], atol=1e-5)
    assert how() == ["loaded"], "values are no part of what it was compiled for"


def test_each_form_has_a_function_of_its_own(folder: Path) -> None:
    norm = LayerNorm(Channels(16))
    x = torch.randn(4, 16)
    for _ in range(2):
        call = Compiled(scaled)
        for given in ((x, norm), (x[:2], norm), (x, norm, 3.0)):
            assert torch.allclose(call(*given), scaled(*given))
            call(*given)
        with torch.no_grad():
            assert not call(x, norm).requires_grad
        done = how()
    assert done == ["loaded"] * 4 and len(list(folder.iterdir())) == 4


def added(x: Tensor, y: Tensor) -> Tensor:
    return 2 * x + y


def test_one_tensor_named_twice_has_a_function_of_its_own() -> None:
    """Torch makes one input of them."""
    x, y = torch.ones(4), torch.zeros(4)
    for call in (Compiled(added), Compiled(added)):
        assert call(x, x).equal(added(x, x))
        assert call(x, y).equal(added(x, y)) and call(x, y=x).equal(added(x, x))
    assert how() == ["compiled"] * 3 + ["loaded"] * 3


def test_gpus_of_two_kinds_keep_functions_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would replace the other's, and an archive would hold those of one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = set()
    for name in ("H100", "H200"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found.add(repr(compiled._settings()))
    assert len(found) == 2


def test_a_damaged_function_is_compiled_anew(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    norm, x = LayerNorm(Channels(16)), torch.randn(4, 16)
    want = Compiled(scaled)(x, norm)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    with caplog.at_level(logging.INFO, "i3dist"):
        for damage in (b"", whole[: len(whole) // 2], b"no pickle"):
            file.write_bytes(damage)
            how()
            assert torch.equal(Compiled(scaled)(x, norm), want)
            assert how() == ["compiled"]
    assert [
        one.message.partition(":")[0] for one in caplog.records if one.name == compiled.__name__
    ] == 3 * ["compiled anew, as what was kept cannot be used"]
    Compiled(scaled)(x, norm)
    assert how() == ["loaded"]


def test_what_cannot_be_kept_is_compiled_as_usual(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph that breaks, and a folder that cannot be written."""
    with caplog.at_level(logging.INFO, "i3dist"):
        assert torch.equal(Compiled(broken)(torch.ones(2)), torch.full((2,), 2.0))
    assert how() == ["traced"] and not folder.exists()
    assert "broken is compiled at every start: " in caplog.text
    folder.parent.joinpath("file").touch()
    compiled.keep_in(folder.parent / "file" / "functions")
    norm, x = LayerNorm(Channels(16)), torch.randn(4, 16)
    assert torch.allclose(Compiled(scaled)(x, norm), scaled(x, norm))
    assert how() == ["compiled"]


def test_nothing_is_kept_without_a_folder_or_where_eager_code_is_wanted(folder: Path) -> None:
    norm, x = LayerNorm(Channels(16)), torch.randn(4, 16)
    with torch.compiler.set_stance("force_eager"):
        Compiled(scaled)(x, norm)
    compiled.keep_in(None)
    Compiled(scaled)(x, norm)
    assert how() == [] and not folder.exists()


def closure(size: Tensor, number: int = 1) -> Any:
    return lambda x: x + size * number


def module(**changed: Any) -> nn.Module:
    norm = LayerNorm(Channels(16))
    for name, value in changed.items():
        setattr(norm, name, value)
    return norm


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2, 3), torch.ones(3, 2).T),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.ones(2, requires_grad=True)),
        (torch.ones(2), torch.ones(2, device="meta")),
        (torch.ones(2), None),
        ([ONES, ONES], [ONES, torch.ones(2)]),
        ((torch.ones(2), 1), (torch.ones(2), 2)),
        ((1, 1), [1, 1]),
        ({"a": 1}, {"b": 1}),
        (range(2), range(3)),
        (closure(torch.ones(2)), closure(torch.ones(3))),
        (closure(torch.ones(2)), closure(torch.ones(2), 2)),
        (lambda x: x + 1, lambda x: x * 1),
        (lambda x, y=1: x + y, lambda x, y=2: x + y),
        (partial(max, 1), partial(max, 2)),
        (partial(max, 1), partial(min, 1)),
        (module().forward, module(eps=1e-3).forward),
        (module(), module(eps=1e-3)),
        (module(), module(channels=Channels(16, heads=2))),
        (module(), module().requires_grad_(False)),
        (module(), module().double()),
        (module(), nn.LayerNorm(16)),
    ],
)
def test_what_code_depends_on_is_described(one: Any, other: Any) -> None:
    assert compiled._form(one) != compiled._form(other)


def test_a_description_is_the_same_in_every_process() -> None:
    """No address of an object is in it, and values are not, nor the parameters themselves."""
    descriptions = [
        repr(compiled._form((module(), closure(torch.randn(2)), {"x": None}))) for _ in range(2)
    ]
    assert descriptions[0] == descriptions[1] and " at 0x" not in descriptions[0]
    norm = module()
    before = compiled._form(norm)
    norm._parameters["weight"] = nn.Parameter(torch.ones(16).double())
    assert compiled._form(norm) != before, "as `functional_call` puts other tensors there"
