"""Optimizers by name, and Lion against its paper."""

import pytest
import torch
from torch import Tensor

from i3dist.config import OptimizerSettings
from i3dist.errors import UserError
from i3dist.optim import lion
from i3dist.optim.flat import fresh_state
from i3dist.optim.optimizers import OPTIMIZERS


def test_lion_is_the_papers() -> None:
    """Algorithm 2 of arXiv:2302.06675, element by element, with a divided gradient."""
    weight, mean = 0.5, 0.0
    ours = torch.tensor([weight], dtype=torch.float64)
    state = fresh_state(ours, lion.STATES)
    for gradient, lr in ((2.0, 0.1), (-0.5, 0.1), (-3.0, 0.05)):
        g = gradient / 4.0
        direction = 0.9 * mean + 0.1 * g
        weight -= lr * ((direction > 0) - (direction < 0) + 0.1 * weight)
        mean = 0.98 * mean + 0.02 * g
        scalars = (torch.tensor(x, dtype=torch.float64) for x in (lr, 4.0, 0.0))
        given = torch.tensor([gradient], dtype=torch.float64)
        lion.update(
            ours,
            given,
            state["exp_avg"],
            state["step"],
            *scalars,
            betas=(0.9, 0.98),
            weight_decay=0.1,
        )
    assert float(ours) == pytest.approx(weight, rel=1e-12)
    assert float(state["exp_avg"]) == pytest.approx(mean, rel=1e-12)
    assert float(state["step"]) == 3


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_every_kind_divides_skips_and_keeps_the_states_that_it_names(name: str) -> None:
    kind = OPTIMIZERS.of(name)
    settings = OptimizerSettings()

    def run(gradients: list[Tensor], scale: float, skip: int | None = None) -> dict[str, Tensor]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 64))
        optimizer = kind.build([{"params": [weight], "weight_decay": 0.1}], settings, False)
        for index, gradient in enumerate(gradients):
            weight.grad = gradient.clone()
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.found_inf = torch.tensor(float(index == skip))
            optimizer.step()
        return {"weight": weight.detach(), **optimizer.state[weight]}

    gradients = [torch.linspace(-2, 3, 64), torch.full((64,), torch.nan), torch.linspace(1, -1, 64)]
    plain = run([gradients[0], gradients[2]], 1.0)
    assert set(plain) == {"weight", "step", *kind.states}
    skipping = run([4 * gradient for gradient in gradients], 4.0, skip=1)
    assert all(skipping[key].equal(value) for key, value in plain.items())


def test_an_unknown_kind_is_one_line() -> None:
    with pytest.raises(UserError, match=r"unknown optimizer.kind 'sgd': use adamw, lion"):
        OPTIMIZERS.of("sgd")
