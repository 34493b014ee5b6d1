"""LayerNorm, token shift and mixes against a loop over tokens. Run time about 4 s."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.shift_mix_cases import (
    MixCase,
    add_outside,
    assert_equal_run,
    assert_same_run,
    loss_of,
    make_case,
    norm_shift_mix,
    overwrite_before,
    results_of,
    run,
    since,
    split_form,
)
from tests.ops.wkv_cases import TOLERANCE


@st.composite
def cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), padding: int = 3
) -> MixCase:
    return make_case(
        rows=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 8)),
        channels=draw(st.integers(2, 6)),
        padding=draw(st.integers(0, padding)),
        mixes=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(dtypes)),
        restarts=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**31)),
        branch=draw(st.booleans()),
    )


def loop_over_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    restart: Tensor,
    shift: Tensor,
    channels: int,
    eps: float,
    branch: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """One token of one row after another, by the definitions."""
    rows, length, width = x.shape
    if branch is not None:
        x = (x + branch) * (torch.arange(width) < channels)
    mixed = [x.new_zeros(x.shape) for _ in mixes]
    last = x.new_zeros(rows, width)
    for n in range(rows):
        before = shift[n, :channels]
        for t in range(length):
            token = x[n, t, :channels]
            centered = token - token.sum() / channels
            variance = centered.pow(2).sum() / channels
            normed = centered / (variance + eps).sqrt() * weight[:channels] + bias[:channels]
            if restart[n, t]:
                before = torch.zeros_like(normed)
            for y, mix in zip(mixed, mixes[:, :channels], strict=True):
                y[n, t, :channels] = mix * normed + (1.0 - mix) * before
            before = normed
        last[n, :channels] = before
    return tuple(mixed), last, x


@settings(max_examples=80, deadline=None)
@given(cases())
def test_values_and_gradients_are_the_definitions(case: MixCase) -> None:
    assert_same_run(run(norm_shift_mix, case), run(loop_over_tokens, case), 1e-10)


@settings(max_examples=40, deadline=None)
@given(cases(tuple(TOLERANCE), padding=0))
def test_a_branch_is_added_first(case: MixCase) -> None:
    if case.branch is None:
        case = case._replace(branch=case.x.flip(1))
    assert_equal_run(run(norm_shift_mix, case), run(add_outside(norm_shift_mix), case))


def test_without_a_branch_x_is_the_total() -> None:
    case = make_case(2, 5, 6, 2, 3, torch.bfloat16)
    assert norm_shift_mix(*case)[2].data_ptr() == case.x.data_ptr()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch", [False, True])
def test_narrow_dtypes(dtype: torch.dtype, parameters: torch.dtype, branch: bool) -> None:
    case = make_case(3, 20, 60, 4, 3, dtype, parameters=parameters, branch=branch)
    got, want = run(norm_shift_mix, case), run(loop_over_tokens, case.map(Tensor.double))
    # Doubled: on the CPU every intermediate is rounded.
    assert_same_run(got, want, 2.0 * max(TOLERANCE[dtype], TOLERANCE[parameters]))
    assert all(y.dtype == dtype for y in got.results)
    assert [g.dtype for g in got.gradients] == [x.dtype for x in case.floats()]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("branch", [False, True])
def test_gradients_are_finite_differences(length: int, branch: bool) -> None:
    case = make_case(2, length, 4, 2, 2, torch.float64, restarts=0.3, branch=branch)

    def function(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return loss_of(results_of(norm_shift_mix, case.map(lambda _: next(given))))

    leaves = [x.requires_grad_() for x in case.floats()]
    assert torch.autograd.gradcheck(function, leaves)


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_split_run_is_the_whole_run(case: MixCase, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, case.x.shape[1]))
    split = run(split_form(norm_shift_mix, at), case)
    assert_same_run(split, run(norm_shift_mix, case), 1e-10)


@settings(max_examples=40, deadline=None)
@given(cases(padding=0), st.integers(1, 5))
def test_padded_run_is_the_plain_run(case: MixCase, padding: int) -> None:
    def padded(*tensors_and_rest):
        wide = MixCase(*tensors_and_rest).map(lambda x: torch.nn.functional.pad(x, (0, padding)))
        mixed, *rest = norm_shift_mix(*wide)
        return tuple(y[..., : case.channels] for y in mixed), *(
            y[..., : case.channels] for y in rest
        )

    assert_same_run(run(padded, case), run(norm_shift_mix, case), 1e-12)


@settings(max_examples=40, deadline=None)
@given(cases(tuple(TOLERANCE)))
def test_padding_stays_zero(case: MixCase) -> None:
    """Even where a gradient arrives in it."""
    assert not any(x[..., case.channels :].any() for x in run(norm_shift_mix, case).tensors())


@settings(max_examples=60, deadline=None)
@given(
    cases((torch.float32, torch.bfloat16)),
    st.sampled_from([1e3, 3e38, float("inf"), float("nan")]),
    st.data(),
)
def test_nothing_before_a_restart_touches_what_follows(
    case: MixCase, value: float, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, case.x.shape[1] - 1))
    case.restart[:, at] = True
    plain, changed = (
        since(norm_shift_mix, one, at) for one in (case, overwrite_before(case, at, value))
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, changed, strict=True))


@settings(max_examples=40, deadline=None)
@given(cases((torch.float32, torch.bfloat16)), st.data())
def test_no_gradient_crosses_a_restart(case: MixCase, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, case.x.shape[1] - 1))
    case.restart[:, at] = True
    leaves = case.map(lambda x: x.requires_grad_())
    later = [y[:, at:] if y.ndim == 3 else y for y in results_of(norm_shift_mix, leaves)]
    loss = loss_of(later)
    grad_x, grad_shift = torch.autograd.grad(loss, (leaves.x, leaves.shift))
    assert not grad_x[:, :at].any() and not grad_shift.any()


@pytest.mark.parametrize("branch", [False, True])
def test_compile_holds_it_whole(branch: bool) -> None:
    case = make_case(2, 5, 6, 2, 3, torch.bfloat16, branch=branch)
    compiled = torch.compile(lambda *x: norm_shift_mix(*x), backend="aot_eager", fullgraph=True)
    assert_equal_run(run(compiled, case), run(norm_shift_mix, case))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2, 0, 5)}, "T >= 1"),
        ({"weight": torch.zeros(4)}, "weight must be"),
        ({"bias": torch.zeros(1, 5)}, "bias must be"),
        ({"mixes": torch.zeros(0, 5)}, "M >= 1"),
        ({"mixes": torch.zeros(3, 4)}, "mixes must be"),
        ({"restart": torch.zeros(2, 4)}, "be bool"),
        ({"restart": torch.zeros(2, 3, dtype=torch.bool)}, "restart must be"),
        ({"shift": torch.zeros(5)}, "shift must be"),
        ({"shift": torch.zeros(2, 5, dtype=torch.bfloat16)}, "share a dtype"),
        ({"branch": torch.zeros(2, 4, 4)}, "branch must be"),
        ({"branch": torch.zeros(2, 4, 5, dtype=torch.bfloat16)}, "share a dtype"),
        ({"channels": 6}, "1 to 5"),
        ({"channels": 0}, "1 to 5"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], says: str) -> None:
    case = make_case(2, 4, 3, 2, 3, torch.float32)
    with pytest.raises(ValueError, match=says):
        norm_shift_mix(*case._replace(**change))
