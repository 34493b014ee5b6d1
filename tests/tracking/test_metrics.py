"""A registered metric is computed of every interval, logged, and cannot harm a run."""

import logging
from dataclasses import replace

import pytest
import torch

from i3dist.config import Settings
from i3dist.data.lanes import Batch, StepCounts
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.tracking import interval, mfu
from i3dist.tracking.interval import Figures, Interval
from i3dist.tracking.metrics import METRICS, measure
from i3dist.tracking.mfu import peak_flops, per_token
from i3dist.training.startup import decide
from tests.model.conftest import build
from tests.model.streams import stream

ONE = torch.tensor(1.0)


@pytest.fixture
def figures() -> Figures:
    counted = Interval()
    counted.add(3.0, StepCounts(ONE, ONE, ONE, ONE), 1.0)
    settings = decide(Settings(), 1, 32_000)
    return counted.figures(7, settings, 1, 0)


@pytest.fixture
def own() -> list[str]:
    """Names of metrics of a user's own, which are forgotten afterwards."""
    names = ["twice_the_loss", "failing", "unknown"]
    yield names
    for name in names:
        METRICS.pop(name, None)


def test_a_metric_of_ones_own_is_measured_and_one_that_fails_costs_one_warning(
    figures: Figures, own: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    METRICS.register("twice_the_loss")(lambda figures: torch.tensor(2 * figures.mean_loss))
    METRICS.register("failing")(lambda figures: figures.tokens / 0)
    METRICS.register("unknown")(lambda figures: None)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = measure(figures)
    assert found["twice_the_loss"] == 6.0 and isinstance(found["twice_the_loss"], float)
    assert not {"failing", "unknown"} & set(found)
    (warning,) = caplog.records
    assert "metric failing is left out" in warning.getMessage()
    for name in ("loss", "step", "time"):  # step and time are in every line
        with pytest.raises(UserError, match=f"there already is a metric '{name}'"):
            METRICS.register(name)(lambda figures: 0.0)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_gpu_that_is_named(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else pytest.approx(1e12 * tflops))


def test_mfu_is_measured_on_known_gpus_only(
    monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    """Of the last batch, by the formula; the peak is that of all ranks' GPUs."""
    assert figures.mfu is None and "mfu" not in measure(figures)
    model: I3LM = build()
    tokens = stream(0, 6, model.settings.chunk_length, model.settings.vocab_size, 40.0)
    batch = Batch(tokens, tokens, torch.zeros(tokens.shape[:2], dtype=torch.long))
    monkeypatch.setattr(mfu, "uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    counted = Interval(model, world_size=4)
    counted.add(3.0, StepCounts(ONE, 1000 * ONE, ONE, ONE), 1.0, batch)
    settings = decide(Settings(), 1, 32_000)
    measured = replace(counted.figures(7, settings, 1, 0), seconds=2.0)
    wanted = per_token(model, batch).flops * 500 / (4 * 989.4e12)
    assert measure(measured)["mfu"] == pytest.approx(wanted)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert interval.Interval(model)._peak_flops is None
