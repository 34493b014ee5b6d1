"""A run's logs as series of numbers, for plots and reports."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Lines = Sequence[dict[str, Any]]

AGE = "attention_age_"  # columns of diagnostics.jsonl, one an age
SMOOTH_FROM = 10  # lines of metrics from which on a running mean is plotted


def column(lines: Lines, name: str) -> np.ndarray:
    """One number a line, [lines] fp64; NaN where a line lacks it or has null."""
    return np.array([np.nan if line.get(name) is None else line[name] for line in lines], float)


def smooth_loss(metrics: Lines) -> np.ndarray:
    """Running mean of the training loss in nats a token, [lines]; NaN where it is unknown."""
    loss, mean = column(metrics, "loss"), column(metrics, "mean_loss")
    mean = np.where(np.isfinite(mean), mean, loss)  # runs of earlier versions have no mean
    known = np.isfinite(mean)
    mean[known] = running_mean(mean[known])
    return mean


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a fifth of the points so far, so that the steep start stays steep:
    [points] -> the same."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(index // 10, len(values) - 1 - index)
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def step_scale(steps: np.ndarray) -> dict[str, Any]:
    """The scale of an axis of steps [points], as arguments of matplotlib's `set_xscale`.

    Log, as the loss falls mostly early; linear from 0 to the next step, or if all are near.
    """
    later = steps[steps > 0]
    if not len(later) or later.max() <= 10 * later.min():
        return {"value": "linear"}
    if len(later) == len(steps):
        return {"value": "log"}
    return {"value": "symlog", "linthresh": later.min(), "linscale": 0.3}


def gains(chunks: Lines, loss: str = "loss") -> np.ndarray:
    """What history gains in nats a token, [lines]; `loss` names what it is compared with."""
    return column(chunks, "loss_without_history") - column(chunks, loss)


def mean_gain(chunks: Lines) -> float:
    """Mean over tokens of chunks that may have history; NaN if unknown."""
    gained, tokens = gains(chunks), column(chunks, "tokens")
    known = np.isfinite(gained) & (tokens > 0) & (column(chunks, "index") > 0)
    return float(np.average(gained[known], weights=tokens[known])) if known.any() else np.nan
