"""The CUDA kernels of WKV against the equations in fp64. Run time about a minute on one GPU."""

import pytest
import torch
from torch import Tensor

from i3dist.ops import wkv as wkv_module
from tests.ops.wkv_cases import (
    TOLERANCE,
    WkvCase,
    assert_close,
    assert_same_run,
    exact,
    gate_outside,
    gradients,
    loss_of,
    make_case,
    wkv,
    wkv_naive,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def cuda_case(
    rows: int,
    length: int,
    channels: int,
    dtype: torch.dtype,
    scale: float = 1.0,
    gated: bool = False,
) -> WkvCase:
    case = make_case(rows, length, channels, dtype, scale, seed=length, gated=gated)
    return case.map(Tensor.cuda)._replace(restart=case.restart.cuda())


def test_triton_is_there() -> None:
    assert wkv_module._form("cuda").__name__.endswith("wkv_triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "length", "channels"),
    [(4, 512, 1180), (1, 1, 1), (3, 1, 33), (2, 15, 32), (2, 16, 31), (3, 17, 65), (5, 133, 1180)],
)
@pytest.mark.parametrize("gated", [False, True])
def test_values_and_gradients_are_the_equations(
    rows: int, length: int, channels: int, dtype: torch.dtype, gated: bool
) -> None:
    case = cuda_case(rows, length, channels, dtype, gated=gated)
    got, want = gradients(wkv, case), gradients(wkv_naive, exact(case))
    assert got[0].dtype == dtype
    assert_same_run(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 17, 64])
def test_gate_is_the_sigmoid_of_receptance(length: int) -> None:
    case = cuda_case(3, length, 40, torch.float32, gated=True)
    assert_same_run(gradients(wkv, case), gradients(gate_outside(wkv), case), 1e-5)


@pytest.mark.parametrize("size", [1e2, 1e4, 3e38])
def test_gate_opens_and_closes(size: float) -> None:
    case = cuda_case(2, 33, 40, torch.float32, gated=True)
    sign = case.receptance.sign()
    y, _, (*_, grad) = gradients(wkv, case._replace(receptance=size * sign))
    assert_close(y, wkv(*case[:6])[0].where(sign > 0, 0.0), 1e-6)
    assert not grad.any()


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_large_keys(scale: float) -> None:
    case = cuda_case(3, 200, 65, torch.float32, scale)
    assert_same_run(gradients(wkv, case), gradients(wkv_naive, exact(case)), 1e-4)


@pytest.mark.parametrize("at", [1, 16, 50, 99])
def test_split_run_is_the_whole_run(at: int) -> None:
    def split(decay, bonus, k, v, restart, state, r):
        first, state = wkv(decay, bonus, k[:, :at], v[:, :at], restart[:, :at], state, r[:, :at])
        second, state = wkv(decay, bonus, k[:, at:], v[:, at:], restart[:, at:], state, r[:, at:])
        return torch.cat([first, second], dim=1), state

    case = cuda_case(2, 100, 40, torch.float32, gated=True)
    assert_same_run(gradients(split, case), gradients(wkv, case), 1e-4)


@pytest.mark.parametrize("at", [0, 7, 16, 63])
@pytest.mark.parametrize("huge", [1e3, 1e30, 3e38])
@pytest.mark.parametrize("gated", [False, True])
def test_nothing_before_a_restart_touches_what_follows(at: int, huge: float, gated: bool) -> None:
    case = cuda_case(2, 64, 40, torch.float32, gated=gated)
    case.restart[:, at] = True

    def later(k: Tensor, v: Tensor, state: Tensor) -> list[Tensor]:
        k, v = k.clone().requires_grad_(), v.clone().requires_grad_()
        y, final = wkv(case.decay, case.bonus, k, v, case.restart, state, case.receptance)
        grads = torch.autograd.grad(loss_of(y[:, at:], final), (k, v))
        return [y[:, at:], final, *(grad[:, at:] for grad in grads)]

    before = torch.arange(64, device="cuda")[None, :, None] < at
    other = [torch.where(before, torch.randn_like(x).sign() * huge, x) for x in (case.k, case.v)]
    plain = later(case.k, case.v, case.state)
    changed = later(*other, torch.full_like(case.state, huge))
    assert all(torch.equal(one, two) for one, two in zip(plain, changed, strict=True))


@pytest.mark.parametrize("decay", [-1e-4, -0.3, -50.0, -1e4])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e10, 1e30, 3e38])
def test_any_finite_key_gives_a_mean_of_values(decay: float, size: float) -> None:
    case = cuda_case(2, 130, 6, torch.float32)
    k = size * (2.0 * torch.rand_like(case.k) - 1.0)
    k[:, 0, :2], k[:, 1:, :2], k[..., 2:4] = size, -size, size
    restart = torch.zeros_like(case.restart)
    leaves = [
        x.requires_grad_() for x in (torch.full_like(case.decay, decay), case.bonus, k, case.v)
    ]
    y, final = wkv(*leaves, restart)
    v = case.v.detach()
    slack = 1e-5 * v.abs().max()
    assert (y <= v.cummax(1).values + slack).all()
    assert (y >= v.cummin(1).values - slack).all()
    grads = torch.autograd.grad(y.sum() + final[:, :2].sum(), leaves)
    assert all(x.isfinite().all() for x in (final, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_compile_holds_it_whole(dtype: torch.dtype, gated: bool) -> None:
    case = cuda_case(2, 64, 40, dtype, gated=gated)
    compiled = torch.compile(lambda *x: wkv(*x), fullgraph=True)
    assert_same_run(gradients(compiled, case), gradients(wkv, case), 1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_registration_is_sound(gated: bool) -> None:
    case = cuda_case(2, 33, 40, torch.bfloat16, gated=gated)
    torch.library.opcheck(wkv_module._wkv, tuple(case.map(Tensor.requires_grad_)))


@pytest.mark.parametrize("gated", [False, True])
def test_no_wide_copy_of_the_output(gated: bool) -> None:
    """Beyond its results a bf16 call allocates only states: no [B, T, C] in fp32."""
    case = cuda_case(8, 512, 1180, torch.bfloat16, gated=gated)
    wkv(*case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = wkv(*case)
    used = torch.cuda.max_memory_allocated() - before
    assert results[0].dtype == torch.bfloat16
    assert used < 1.6 * case.k.numel() * 2
