"""A picture shows the numbers of the logs, each under its own name."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from i3dist.tracking import plots

LOSSES = ("loss", "loss_without_history", "loss_other_history")
# Drawing takes long, so nobody looks for the smallest picture that is wrong.
DRAWING = settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.generate))
# What is not given, or is not a number, leaves a gap.
FIGURE = st.none() | st.floats(0.25, 20)


def points(line: Line2D) -> list[tuple[float, float]]:
    """The points of a curve that are not gaps."""
    both = zip(line.get_xdata(), line.get_ydata(), strict=True)
    return [(float(x), float(y)) for x, y in both if math.isfinite(y)]


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The labelled curves, by label."""
    return {
        str(line.get_label()): points(line)
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


@st.composite
def logged(draw: st.DrawFn, names: tuple[str, ...], most: int = 6) -> list[dict[str, Any]]:
    """Lines of a log with these figures, by step."""
    steps = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=most)))
    return [{"step": step, **{name: draw(FIGURE) for name in names}} for step in steps]


def column(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, figure) of the lines that have it."""
    return [(line["step"], line[name]) for line in lines if line[name] is not None]


@DRAWING
@given(metrics=logged(("loss",)), held_out=logged(("loss",)))
def test_losses_are_drawn_at_their_steps(
    metrics: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> None:
    figure = plots._loss(metrics, held_out)
    wanted = {"training": column(metrics, "loss"), "validation": column(held_out, "loss")}
    wanted = {label: curve for label, curve in wanted.items() if curve}
    if figure is None:
        assert not wanted
        return
    axes = figure.axes[0]
    assert curves(axes) == wanted
    left, right = axes.get_xlim()
    steps = [line["step"] for line in (*metrics, *held_out)]
    assert left < min(steps) and max(steps) < right
    assert axes.get_xscale() == ("log" if max(steps) > 10 * min(steps) else "linear")


def test_many_losses_are_drawn_with_their_running_mean() -> None:
    """The mean of point n is over the n // 10 points on either side, fewer near the end."""
    values = np.random.default_rng(0).uniform(2, 4, 100)
    lines = [{"step": n + 1, "loss": value} for n, value in enumerate(values.tolist())]
    lines[50]["loss"] = None
    drawn = curves(plots._loss(lines, []).axes[0])
    assert drawn["training"] == column(lines, "loss")
    known = np.delete(values, 50)
    wanted = []
    for n in range(99):
        reach = min(n // 10, 98 - n)
        wanted.append(known[n - reach : n + reach + 1].mean())
    mean = drawn["training, running mean"]
    assert [x for x, _ in mean] == [n + 1 for n in range(100) if n != 50]
    assert [y for _, y in mean] == pytest.approx(wanted)
    assert "training, running mean" not in curves(plots._loss(lines[:9], []).axes[0])


@pytest.mark.parametrize(("off", "ramp"), [(2, 3), (0, 3), (2, 0), (10, 0), (0, 10), (3, 20)])
def test_shades_are_where_the_gate_is_closed_and_where_it_opens(off: int, ramp: int) -> None:
    """From its first line to the line behind its last, or the picture's edge."""
    gates = [min(1.0, max(0.0, (n - off + 1) / max(1, ramp))) for n in range(10)]
    lines = [{"step": 100 + n, "loss": 1.0, "gate": g} for n, g in enumerate(gates)]
    axes = plots._loss(lines, []).axes[0]
    handles, labels = axes.get_legend_handles_labels()
    shades = {
        label: handle.get_extents().transformed(axes.transData.inverted())
        for label, handle in zip(labels, handles, strict=True)
        if label.startswith("history")
    }
    left, right = axes.get_xlim()
    inside = {
        "history off": [g == 0 for g in gates],
        "history ramps in": [0 < g < 1 for g in gates],
    }
    assert set(shades) == {label for label, mask in inside.items() if any(mask)}
    for label, box in shades.items():
        first, last = np.flatnonzero(inside[label])[[0, -1]]
        start = 100 + first if first else left
        end = 100 + last + 1 if last < 9 else right
        assert (box.x0, box.x1) == pytest.approx((start, end))


def test_tokens_on_top_stand_above_the_steps_that_had_seen_them() -> None:
    """A run whose later steps are larger: the axis is not even."""
    lines = [
        {"step": step, "loss": 1.0, "tokens_seen": 1000 * step + 500 * max(0, step - 20)}
        for step in range(11, 31)
    ]
    _, top = plots._loss(lines, []).axes
    ticks = zip(top.get_xticks(), top.get_xticklabels(), strict=True)
    places = {label.get_text(): float(x) for x, label in ticks}
    assert len(places) > 2
    for text, x in places.items():
        tokens = 1000 * float(text.removesuffix("k"))
        assert x == pytest.approx(tokens / 1000 if tokens <= 20_000 else (tokens + 10_000) / 1500)


CHUNKS = st.dictionaries(
    st.integers(0, 30),
    st.fixed_dictionaries(dict.fromkeys(LOSSES, FIGURE)),
    min_size=1,
    max_size=4,
)


@DRAWING
@given(validations=st.lists(CHUNKS, min_size=1, max_size=3))
def test_history_is_drawn_by_chunk_and_its_gain_by_step(
    validations: list[dict[int, dict[str, float | None]]],
) -> None:
    lines = [
        {"step": 100 * n, "by_chunk": [{"index": i, **chunk} for i, chunk in chunks.items()]}
        for n, chunks in enumerate(validations, start=1)
    ]
    left, right, *_ = plots._history(lines).axes
    labels = dict(
        zip(LOSSES, ("with history", "history withheld", "another document's history"), strict=True)
    )
    drawn = curves(left)
    for name, label in labels.items():
        last = sorted(validations[-1].items())
        wanted = [(float(i), chunk[name]) for i, chunk in last if chunk[name] is not None]
        assert drawn.get(label, []) == wanted
    assert left.get_title() == f"validation at step {100 * len(lines):,}"
    gains: dict[int, list[tuple[float, float]]] = {}
    for line, chunks in zip(lines, validations, strict=True):
        for index, chunk in chunks.items():
            with_history, without = chunk["loss"], chunk["loss_without_history"]
            if with_history is not None and without is not None:
                gains.setdefault(index, []).append((line["step"], without - with_history))
    found = [points(line) for line in right.lines if line.get_marker() == "."]
    assert found == [gains[index] for index in sorted(gains)]


def test_the_larger_the_index_the_darker_its_gain() -> None:
    chunk = dict.fromkeys(LOSSES, 2.0)
    line = {"step": 5, "by_chunk": [{"index": i, **chunk} for i in (3, 0, 7)]}
    right = plots._history([line]).axes[1]
    shades = [sum(line.get_color()[:3]) for line in right.lines if line.get_marker() == "."]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == 3


def test_what_is_inside_is_drawn_figure_by_figure() -> None:
    """Ages in order, however many; a figure that is missing leaves a gap."""
    lines = [
        {
            "step": step,
            **{f"attention_age_{age:02d}": step / 100 + age / 1000 for age in (1, 2, 12)},
            "effective_rank": None if step == 2 else 10.0 + step,
            "compressor_gradient_norm": 0.5 * step,
        }
        for step in (1, 2, 3)
    ]
    attention, rank, norm, *_ = plots._diagnostics(lines).axes
    assert [points(line) for line in attention.lines] == [
        [(step, step / 100 + age / 1000) for step in (1, 2, 3)] for age in (1, 2, 12)
    ]
    shades = [sum(line.get_color()[:3]) for line in attention.lines]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == 3
    assert points(rank.lines[0]) == [(1, 11.0), (3, 13.0)]
    assert points(norm.lines[0]) == [(1, 0.5), (2, 1.0), (3, 1.5)]
    titles = [axes.get_title() for axes in (attention, rank, norm)]
    assert "attention" in titles[0] and "rank" in titles[1] and "gradient norm" in titles[2]
    assert {axes.get_xlabel() for axes in (attention, rank, norm)} == {"step"}


def test_each_picture_is_of_its_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is drawn in a size that can be read."""
    chunk = {"index": 1, "tokens": 5, **dict.fromkeys(LOSSES, 2.0)}
    logs = {
        "metrics": {"step": 7, "loss": 3.25},
        "validation": {"step": 8, "loss": 3.5, "by_chunk": [chunk]},
        "diagnostics": {"step": 9, "effective_rank": 4.5},
    }
    for name, line in logs.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    saved: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: saved.update({path.name: self}))
    assert [path.name for path in plots.plot_run(tmp_path)] == list(saved)
    assert curves(saved["loss.png"].axes[0]) == {"training": [(7, 3.25)], "validation": [(8, 3.5)]}
    assert saved["history.png"].axes[0].get_title() == "validation at step 8"
    assert points(saved["diagnostics.png"].axes[1].lines[0]) == [(9, 4.5)]
    assert all(figure.get_size_inches().min() > 3 for figure in saved.values())
