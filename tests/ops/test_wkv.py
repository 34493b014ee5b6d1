"""WKV against its equations. Run time about 8 s."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3dist.ops import wkv as wkv_module
from i3dist.ops.wkv import empty_state
from tests.ops.wkv_cases import (
    TOLERANCE,
    Form,
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


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> WkvCase:
    return make_case(
        rows=draw(st.integers(1, 3)),
        length=draw(st.one_of(st.integers(1, 5), st.integers(6, 80))),
        channels=draw(st.integers(1, 6)),
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.sampled_from([1.0, 30.0, 1000.0])),
        restarts=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**31)),
        gated=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(cases(tuple(TOLERANCE)))
def test_values_and_gradients_are_the_equations(case: WkvCase) -> None:
    want = gradients(wkv_naive, exact(case))
    assert_same_run(gradients(wkv, case), want, TOLERANCE[case.k.dtype])


@pytest.mark.parametrize("form", [wkv, wkv_naive])
@pytest.mark.parametrize("length", [1, 31, 40])
def test_gate_is_the_sigmoid_of_receptance(form: Form, length: int) -> None:
    case = make_case(2, length, 3, torch.float64, gated=True)
    assert_same_run(gradients(form, case), gradients(gate_outside(form), case), 1e-12)


def test_padded_channels_stay_zero() -> None:
    case = make_case(2, 40, 5, torch.float32, gated=True)
    case = case.map(lambda x: torch.nn.functional.pad(x, (0, 3)))
    state = empty_state(2, 8)
    state[..., :5] = case.state[..., :5]
    y, _, (*_, grad_receptance) = gradients(wkv, case._replace(state=state))
    assert not y[..., 5:].any() and not grad_receptance[..., 5:].any()


@pytest.mark.parametrize("form", [wkv, wkv_naive])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, 7, 35])
def test_gradients_are_finite_differences(form: Form, gated: bool, length: int) -> None:
    case = make_case(2, length, 2, torch.float64, restarts=0.1, gated=gated)

    def function(
        decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, ab: Tensor, *receptance: Tensor
    ) -> Tensor:
        start = torch.cat([ab, case.state[:, 2:]], dim=1)
        return loss_of(*form(decay, bonus, k, v, case.restart, start, *receptance))

    inputs = (*case[:4], case.state[:, :2], *([] if case.receptance is None else case[6:]))
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(cases((torch.float64, torch.float32)), st.data())
def test_split_run_is_the_whole_run(case: WkvCase, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, case.k.shape[1]))

    def split(decay, bonus, k, v, restart, state, receptance):
        pieces = []
        for part in (slice(None, at), slice(at, None)):
            if k[:, part].shape[1]:
                r = None if receptance is None else receptance[:, part]
                y, state = wkv(decay, bonus, k[:, part], v[:, part], restart[:, part], state, r)
                pieces.append(y)
        return torch.cat(pieces, dim=1), state

    assert_same_run(gradients(split, case), gradients(wkv, case), TOLERANCE[case.k.dtype])


@settings(max_examples=40, deadline=None)
@given(cases((torch.float32, torch.bfloat16)), st.sampled_from([1e3, 1e30, 3e38]), st.data())
def test_nothing_before_a_restart_touches_what_follows(
    case: WkvCase, huge: float, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, case.k.shape[1] - 1))
    case.restart[:, at] = True

    def later(k: Tensor, v: Tensor, state: Tensor) -> list[Tensor]:
        k, v = k.clone().requires_grad_(), v.clone().requires_grad_()
        y, final = wkv(case.decay, case.bonus, k, v, case.restart, state, case.receptance)
        grads = torch.autograd.grad(loss_of(y[:, at:], final), (k, v))
        return [y[:, at:], final, *(grad[:, at:] for grad in grads)]

    signs = torch.randn(case.k.shape, generator=torch.Generator().manual_seed(0)).sign()
    before = torch.arange(case.k.shape[1])[None, :, None] < at
    other = [torch.where(before, (signs * huge).to(x.dtype), x) for x in (case.k, case.v)]
    other_state = torch.full_like(case.state, huge)
    for one, two in zip(later(case.k, case.v, case.state), later(*other, other_state), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("form", [wkv, wkv_naive])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_sequence_that_restarts_at_once_takes_nothing_of_its_state(
    form: Form, value: float, length: int
) -> None:
    """Not even what is no number, in results or gradients."""
    case = make_case(2, length, 3, torch.float32, gated=True)
    case.restart[:, 0] = True
    spoiled = case._replace(state=torch.full_like(case.state, value))
    y, final, grads = gradients(form, case)
    spoiled_y, spoiled_final, spoiled_grads = gradients(form, spoiled)
    assert torch.equal(spoiled_y, y) and torch.equal(spoiled_final, final)
    assert all(torch.equal(*pair) for pair in zip(spoiled_grads, grads, strict=True))


@settings(max_examples=30, deadline=None)
@given(cases((torch.float32,)), st.data())
def test_no_gradient_crosses_a_restart(case: WkvCase, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, case.k.shape[1] - 1))
    case.restart[:, at] = True
    k, v, state = (x.clone().requires_grad_() for x in (case.k, case.v, case.state))
    y, final = wkv(case.decay, case.bonus, k, v, case.restart, state, case.receptance)
    grad_k, grad_v, grad_state = torch.autograd.grad(loss_of(y[:, at:], final), (k, v, state))
    assert not grad_k[:, :at].any() and not grad_v[:, :at].any() and not grad_state.any()


@pytest.mark.parametrize("form", [wkv, wkv_naive])
@pytest.mark.parametrize("decay", [-1e-4, -0.3, -50.0, -1e4])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e10, 1e30, 3e38])
def test_any_finite_key_gives_a_mean_of_values(form: Form, decay: float, size: float) -> None:
    random = torch.Generator().manual_seed(0)
    k = size * (2.0 * torch.rand(2, 130, 6, generator=random) - 1.0)
    k[:, 0, :2], k[:, 1:, :2] = size, -size  # one key rules for good
    k[..., 2:4] = size
    v = torch.randn(2, 130, 6, generator=random)
    decays, bonus = torch.full((6,), decay), torch.linspace(-2, 2, 6)
    case = WkvCase(decays, bonus, k, v, torch.zeros(2, 130, dtype=torch.bool), empty_state(2, 6))
    leaves = case.map(lambda x: x.clone().requires_grad_())
    y, final = form(*leaves)
    assert torch.equal(y[:, 0], v[:, 0])
    slack = 1e-5 * v.abs().max()
    assert (y <= v.cummax(1).values + slack).all() and (y >= v.cummin(1).values - slack).all()
    grads = torch.autograd.grad(
        y.sum() + final[:, :2].sum(), [x for x in leaves[:6] if x.requires_grad]
    )
    assert all(x.isfinite().all() for x in (final, *grads))


def test_small_decay_survives_large_keys() -> None:
    """At m near 1000 a decay of 1e-4 is about the rounding of m: uncompensated, errors add up."""
    case = make_case(1, 600, 4, torch.float32, restarts=0.0)
    case = case._replace(decay=torch.full((4,), -1e-4), bonus=torch.zeros(4), k=1000.0 + case.k)
    want, _ = wkv_naive(*exact(case))
    for form in (wkv, wkv_naive):
        assert_close(form(*case)[0], want, 1e-5)


def test_no_state_is_the_empty_state() -> None:
    case = make_case(2, 9, 3, torch.float32)
    without = wkv(*case[:5])
    for got, want in zip(without, wkv(*case[:5], empty_state(2, 3)), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(without[0][:, 0], case.v[:, 0])


def test_inputs_of_any_layout() -> None:
    case = make_case(3, 40, 5, torch.float32, gated=True)
    strided = case._replace(
        k=case.k.transpose(0, 2).contiguous().transpose(0, 2),
        v=torch.stack([case.v, case.v], dim=-1)[..., 0],
        restart=case.restart.t().contiguous().t(),
        receptance=case.receptance.transpose(0, 1).contiguous().transpose(0, 1),
    )
    got, want = gradients(wkv, strided), gradients(wkv, case)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(x, y) for x, y in zip(got[2], want[2], strict=True))


@pytest.mark.parametrize("length", [1, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_compile_holds_it_whole(length: int, dtype: torch.dtype, gated: bool) -> None:
    case = make_case(2, length, 3, dtype, gated=gated)
    compiled = torch.compile(lambda *x: wkv(*x), backend="aot_eager", fullgraph=True)
    got, want = gradients(compiled, case), gradients(wkv, case)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(x, y) for x, y in zip(got[2], want[2], strict=True))


@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_registration_is_sound(length: int, dtype: torch.dtype, gated: bool) -> None:
    case = make_case(2, length, 3, dtype, gated=gated)
    torch.library.opcheck(wkv_module._wkv, tuple(case.map(Tensor.requires_grad_)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": torch.zeros(2, 0, 3)}, "T >= 1"),
        ({"v": torch.zeros(2, 4, 5)}, "v must be"),
        ({"v": torch.zeros(2, 4, 3, dtype=torch.bfloat16)}, "share a dtype"),
        ({"restart": torch.zeros(2, 4)}, "be bool"),
        ({"state": torch.zeros(2, 3)}, "state must be"),
        ({"decay": torch.zeros(4)}, "decay must be"),
        ({"receptance": torch.zeros(2, 4)}, "receptance must be"),
        ({"receptance": torch.zeros(2, 4, 3, dtype=torch.bfloat16)}, "share a dtype"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wkv(*make_case(2, 4, 3, torch.float32)._replace(**change))
