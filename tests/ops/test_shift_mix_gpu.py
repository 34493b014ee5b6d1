"""The CUDA kernels of norm_shift_mix against the equations in fp64. About a minute on one GPU."""

import pytest
import torch
from torch import Tensor

from i3dist.ops import shift_mix as shift_mix_module
from tests.ops.shift_mix_cases import (
    MixCase,
    add_outside,
    assert_equal_run,
    assert_same_run,
    make_case,
    norm_shift_mix,
    norm_shift_mix_naive,
    overwrite_before,
    run,
    since,
    split_form,
)
from tests.ops.wkv_cases import TOLERANCE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# rows, length, channels, padding, mixes; the third has more tokens than a kernel has programs
SHAPES = [
    (4, 512, 1180, 4, 3),
    (4, 512, 1180, 4, 2),
    (32, 133, 1180, 4, 3),
    (1, 1, 1, 15, 1),
    (7, 1, 1180, 4, 3),
    (1, 77, 16, 0, 2),
    (3, 65, 33, 15, 2),
    (5, 300, 256, 0, 4),
    (2, 40, 2047, 1, 1),
]


def cuda_case(*shape: int, dtype: torch.dtype, **options) -> MixCase:
    case = make_case(*shape, dtype=dtype, seed=shape[1], **options)
    return MixCase(*(x.cuda() if isinstance(x, Tensor) else x for x in case))


def test_triton_is_there() -> None:
    assert shift_mix_module._TRITON


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("branch", [False, True])
def test_values_and_gradients_are_the_equations(
    shape: tuple[int, ...], dtype: torch.dtype, branch: bool
) -> None:
    case = cuda_case(*shape, dtype=dtype, branch=branch)
    got, want = run(norm_shift_mix, case), run(norm_shift_mix_naive, case.map(Tensor.double))
    assert_same_run(got, want, TOLERANCE[dtype])
    assert all(y.dtype == dtype and y.is_contiguous() for y in got.results)
    assert not any(x[..., case.channels :].any() for x in got.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_is_added_first(dtype: torch.dtype) -> None:
    case = cuda_case(3, 65, 60, 4, 2, dtype=dtype, branch=True)
    got, want = run(norm_shift_mix, case), run(add_outside(norm_shift_mix), case)
    assert torch.equal(got.results[-1], want.results[-1])
    assert_same_run(got, want, TOLERANCE[dtype])


def test_without_a_branch_x_is_the_total() -> None:
    case = cuda_case(2, 5, 28, 4, 3, dtype=torch.bfloat16)
    assert norm_shift_mix(*case)[2].data_ptr() == case.x.data_ptr()


@pytest.mark.parametrize("branch", [False, True])
def test_a_total_that_ends_has_no_gradient(branch: bool) -> None:
    case = cuda_case(3, 65, 60, 4, 2, dtype=torch.float32, branch=branch)

    def ends(*inputs):
        return norm_shift_mix(*inputs, goes_on=False)

    def forgotten(*inputs):
        mixed, last, total = norm_shift_mix(*inputs)
        return mixed, last, total.detach()

    assert_equal_run(run(ends, case), run(forgotten, case))


@pytest.mark.parametrize("restarts", [0.0, 0.5, 1.0])
def test_any_number_of_restarts(restarts: float) -> None:
    case = cuda_case(3, 200, 60, 4, 3, dtype=torch.float32, restarts=restarts)
    want = run(norm_shift_mix_naive, case.map(Tensor.double))
    assert_same_run(run(norm_shift_mix, case), want, 1e-4)


def test_parameters_of_another_dtype() -> None:
    case = cuda_case(3, 50, 60, 4, 3, dtype=torch.bfloat16, parameters=torch.float32)
    got = run(norm_shift_mix, case)
    assert_same_run(got, run(norm_shift_mix_naive, case.map(Tensor.double)), 1e-2)
    assert [g.dtype for g in got.gradients] == [x.dtype for x in case.floats()]


def test_wide_tensors_take_the_naive_form() -> None:
    case = cuda_case(2, 9, 14, 2, 3, dtype=torch.float64)
    assert_equal_run(run(norm_shift_mix, case), run(norm_shift_mix_naive, case))


@pytest.mark.parametrize("at", [1, 16, 50, 99])
def test_split_run_is_the_whole_run(at: int) -> None:
    case = cuda_case(8, 100, 60, 4, 3, dtype=torch.float32, branch=True)
    split = run(split_form(norm_shift_mix, at), case)
    assert_same_run(split, run(norm_shift_mix, case), 1e-4)


@pytest.mark.parametrize("at", [0, 7, 16, 63])
@pytest.mark.parametrize("value", [1e3, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("branch", [False, True])
def test_nothing_before_a_restart_touches_what_follows(at: int, value: float, branch: bool) -> None:
    case = cuda_case(40, 64, 60, 4, 3, dtype=torch.float32, branch=branch)
    case.restart[:, at] = True
    plain, changed = (
        since(norm_shift_mix, one, at) for one in (case, overwrite_before(case, at, value))
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, changed, strict=True))


def test_two_runs_are_equal() -> None:
    case = cuda_case(16, 512, 1180, 4, 3, dtype=torch.bfloat16, branch=True)
    assert_equal_run(run(norm_shift_mix, case), run(norm_shift_mix, case))


def test_inputs_of_any_layout() -> None:
    case = cuda_case(3, 40, 28, 4, 2, dtype=torch.float32, branch=True)
    strided = case._replace(
        x=case.x.transpose(0, 2).contiguous().transpose(0, 2),
        mixes=case.mixes.t().contiguous().t(),
        restart=case.restart.t().contiguous().t(),
        branch=case.branch.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert_equal_run(run(norm_shift_mix, strided), run(norm_shift_mix, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch", [False, True])
def test_compile_holds_it_whole(dtype: torch.dtype, branch: bool) -> None:
    case = cuda_case(2, 64, 28, 4, 3, dtype=dtype, branch=branch)
    compiled = torch.compile(lambda *x: norm_shift_mix(*x), fullgraph=True)
    assert_same_run(run(compiled, case), run(norm_shift_mix, case), 1e-6)


@pytest.mark.parametrize("branch", [False, True])
def test_registration_is_sound(branch: bool) -> None:
    case = cuda_case(2, 33, 28, 4, 3, dtype=torch.bfloat16, branch=branch)
    torch.library.opcheck(shift_mix_module._norm_shift_mix, tuple(case))


@pytest.mark.parametrize("branch", [False, True])
def test_only_results_are_allocated(branch: bool) -> None:
    case = cuda_case(32, 512, 1180, 4, 3, dtype=torch.bfloat16, branch=branch)
    norm_shift_mix(*case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # Requested bytes: allocated ones are rounded up to 2 MiB a tensor.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = norm_shift_mix(*case)
    used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert len(results[0]) == 3
    assert used < (3.1 + branch) * case.x.numel() * 2
