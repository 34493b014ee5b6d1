import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgba

from i3dist.errors import reason
from i3dist.tracking import plots
from i3dist.tracking.metrics_log import MetricsLog
from i3dist.tracking.series import running_mean
from i3dist.tracking.tracker import NoTracker
from i3dist.training import run_log

NUMBER = st.none() | st.floats(0, 20)
TRAIN_LINE = st.fixed_dictionaries(
    {"step": st.integers(0, 10**6)},
    optional={"loss": NUMBER, "gate": st.floats(0, 1), "tokens_seen": st.integers(0, 10**12)},
)
CHUNK = st.fixed_dictionaries(
    {"index": st.integers(0, 40)},
    optional={
        "loss": NUMBER,
        "loss_without_history": NUMBER,
        "loss_other_history": NUMBER,
    },
)
DIAGNOSTICS_LINE = st.fixed_dictionaries(
    {"step": st.integers(0, 10**6)},
    optional={
        "attention_age_01": NUMBER,
        "attention_age_12": NUMBER,
        "effective_rank": NUMBER,
        "compressor_gradient_norm": NUMBER,
    },
)
VALID_LINE = st.fixed_dictionaries(
    {"step": st.integers(0, 10**6)},
    optional={"loss": NUMBER, "by_chunk": st.lists(CHUNK, max_size=3)},
)


def training(last, every=10):
    """Lines as the trainer writes them: gate off to step 100, open from 150 on."""
    return [
        {
            "step": step,
            "loss": 3 + 7 / step,
            "gate": min(1.0, max(0.0, (step - 100) / 50)),
            "tokens_seen": 16_384 * step,
        }
        for step in range(every, last + 1, every)
    ]


def validation(steps, chunks=3):
    return [
        {
            "step": step,
            "loss": 3.5,
            "by_chunk": [
                {"index": i, "tokens": 5, "loss": 3.0, "loss_without_history": 3.0 + i * step}
                for i in range(chunks)
            ],
        }
        for step in steps
    ]


def diagnostics(steps, ages=3):
    return [
        {
            "step": step,
            **{f"attention_age_{i:02d}": step / 1000 / i for i in range(1, ages + 1)},
            "effective_rank": 5.0 + step,
            "compressor_gradient_norm": 0.5,
        }
        for step in steps
    ]


def write(path, lines):
    log = MetricsLog(path)
    for line in lines:
        log.append(line["step"], {key: value for key, value in line.items() if key != "step"})


def labelled(axes):
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def test_a_whole_run_gives_all_pictures(tmp_path):
    write(tmp_path / "metrics.jsonl", training(400))
    write(tmp_path / "validation.jsonl", validation([200, 400]))
    write(tmp_path / "diagnostics.jsonl", diagnostics([200, 400]))
    written = plots.plot_run(tmp_path)
    names = ("loss.png", "history.png", "diagnostics.png")
    assert written == [tmp_path / "plots" / name for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize(
    ("name", "lines", "drawn"),
    [
        ("metrics.jsonl", training(10), ["loss.png"]),
        ("metrics.jsonl", [{"step": 1, "loss": math.nan}], []),
        ("validation.jsonl", validation([5]), ["loss.png", "history.png"]),
        ("validation.jsonl", [{"step": 5, "loss": 3.0}], ["loss.png"]),
        ("validation.jsonl", [], []),
        ("diagnostics.jsonl", diagnostics([5]), ["diagnostics.png"]),
        ("diagnostics.jsonl", [{"step": 5, "effective_rank": None}], []),
        ("diagnostics.jsonl", [{"step": 5, "effective_rank": 2.0}], ["diagnostics.png"]),
    ],
)
def test_what_is_missing_leaves_only_its_picture_out(tmp_path, name, lines, drawn):
    write(tmp_path / name, lines)
    assert [path.name for path in plots.plot_run(tmp_path)] == drawn


# Drawing a figure takes tenths of a second; the pictures are laid out but not encoded.
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(TRAIN_LINE, max_size=4),
    st.lists(VALID_LINE, max_size=3),
    st.lists(DIAGNOSTICS_LINE, max_size=3),
)
def test_no_lines_break_a_picture(metrics, held_out, inside):
    def in_order(lines):
        return sorted({line["step"]: line for line in lines}.values(), key=lambda x: x["step"])

    for figure in (
        plots._loss(in_order(metrics), in_order(held_out)),
        plots._history(in_order(held_out)),
        plots._diagnostics(in_order(inside)),
    ):
        if figure is not None:
            figure.draw_without_rendering()


def test_the_loss_picture_shows_both_losses_tokens_and_the_gate():
    figure = plots._loss(training(400), validation([200, 400]))
    axes, top = figure.axes
    parts = labelled(axes)
    assert {"validation", "history off", "history ramps in"} < set(parts)
    assert axes.get_title() == "training and validation loss"
    assert list(parts["validation"].get_xdata()) == [200, 400]
    ramp = parts["history ramps in"].get_extents().transformed(axes.transData.inverted())
    assert (ramp.x0, ramp.x1) == pytest.approx((110, 150))
    assert (axes.get_xlabel(), top.get_xlabel()) == ("step", "tokens seen")
    assert "nats" in axes.get_ylabel()
    positions = {
        label.get_text(): x
        for x, label in zip(top.get_xticks(), top.get_xticklabels(), strict=True)
    }
    assert positions["1M"] == pytest.approx(1e6 / 16_384)
    assert top.get_xlim() == axes.get_xlim()


def test_a_validation_at_step_0_stands_at_0_and_tokens_above_their_steps():
    """On an axis that is linear up to the first step logged, and logarithmic from there."""
    axes, top = plots._loss(training(400), validation([0, 200, 400])).axes
    assert list(labelled(axes)["validation"].get_xdata()) == [0, 200, 400]
    assert axes.get_xlim()[0] < 0 < 400 < axes.get_xlim()[1]
    assert axes.get_xscale() == "symlog" and 0 in axes.get_xticks()
    assert {0, 10, 20, 50, 100, 200} <= set(axes.get_xticks())
    for tick, label in zip(top.get_xticks(), top.get_xticklabels(), strict=True):
        tokens = float(label.get_text().replace("k", "e3").replace("M", "e6"))
        across = axes.transData.transform((tokens / 16_384, 3))[0]
        assert top.transData.transform((tick, 3))[0] == pytest.approx(across)


def test_the_running_mean_is_of_all_steps_where_the_log_has_them():
    lines = [{**line, "mean_loss": 1.0} for line in training(400)]
    parts = labelled(plots._loss(lines, []).axes[0])
    assert set(parts["training, running mean"].get_ydata()) == {1.0}
    assert parts["training"].get_ydata()[0] == pytest.approx(3.7)


def test_the_history_picture_shows_the_last_validation_and_gains_over_steps():
    left, right, last, _, bars = plots._history(validation([200, 400])).axes
    gain = labelled(last)
    assert list(gain["own history"].get_ydata()) == [0, 400, 800]
    assert gain["mean over tokens +600.0000"].get_ydata()[0] == 600
    assert [bar.get_height() for bar in bars.patches] == [5, 5, 5]
    assert list(labelled(right)["mean over tokens of chunks 1, 2, ..."].get_ydata()) == [300, 600]
    parts = labelled(left)
    assert list(parts["history withheld"].get_ydata()) == [3.0, 403.0, 803.0]
    assert list(parts["with history"].get_ydata()) == [3.0, 3.0, 3.0]
    curves = [line for line in right.lines if line.get_marker() == "."]
    assert [list(line.get_ydata()) for line in curves] == [[0, 0], [200, 400], [400, 800]]
    assert len({to_hex(to_rgba(line.get_color())) for line in curves}) == 3


def test_the_history_picture_shows_another_documents_history_where_it_was_measured():
    lines = validation([200])
    assert "another document's history" not in labelled(plots._history(lines).axes[0])
    for chunk in lines[-1]["by_chunk"]:
        chunk["loss_other_history"] = 3.5 + chunk["index"]
    parts = labelled(plots._history(lines).axes[0])
    assert list(parts["another document's history"].get_ydata()) == [3.5, 4.5, 5.5]


def test_the_diagnostics_picture_shows_each_figure_against_step():
    attention, rank, norm, bar = plots._diagnostics(diagnostics([100, 200])).axes
    found = [list(line.get_ydata()) for line in attention.lines]
    assert found == [pytest.approx([0.1 / i, 0.2 / i]) for i in (1, 2, 3)]
    assert len({to_hex(to_rgba(line.get_color())) for line in attention.lines}) == 3
    assert list(rank.lines[0].get_xdata()) == [100, 200]
    assert list(rank.lines[0].get_ydata()) == [105, 205]
    assert list(norm.lines[0].get_ydata()) == [0.5, 0.5]
    assert bar.get_ylabel() == "age (chunks)"


@given(st.integers(1, 200), st.floats(-5, 5), st.floats(-5, 5))
def test_the_running_mean_keeps_lines_straight(count, slope, start):
    line = start + slope * np.arange(count)
    np.testing.assert_allclose(running_mean(line), line, atol=1e-9)


def test_the_running_mean_smooths():
    noise = np.random.default_rng(0).normal(size=1000)
    assert running_mean(noise)[500:900].std() < 0.25


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "qtagg", "none"])
def test_a_notebooks_environment_changes_no_picture(tmp_path, backend):
    """Matplotlib refuses to be imported where MPLBACKEND names a backend that is not there."""
    write(tmp_path / "metrics.jsonl", training(10))
    program = (
        "import os, sys, pathlib; from i3dist.tracking import plots\n"
        "print(*plots.plot_run(pathlib.Path(sys.argv[1])), os.environ['MPLBACKEND'])"
    )
    root = Path(plots.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=root,
        env=os.environ | {"MPLBACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path}/plots/loss.png {backend}\n", done.stderr


@pytest.mark.parametrize(
    "error", [ValueError("corrupt"), MemoryError(), OSError(28, "full"), ImportError("no font")]
)
def test_whatever_fails_in_plots_costs_a_line(monkeypatch, capsys, tmp_path, error):
    def fail(folder):
        raise error

    monkeypatch.setattr(plots, "plot_run", fail)
    plot(tmp_path)
    assert capsys.readouterr().out == f"warning: no plots: {reason(error)}\n"


def test_lines_of_a_log_that_are_no_numbers_cost_a_line(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "x"}\n{"step": 2, "loss": [1]}\n')
    plot(tmp_path)
    assert capsys.readouterr().out.startswith("warning: no plots: ")


def test_plots_that_never_end_do_not_hold_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plots, "plot_run", lambda folder: threading.Event().wait(5))
    monkeypatch.setattr(run_log, "PLOT_SECONDS", 0.1)
    plot(tmp_path)
    assert "warning: no plots: they take over" in capsys.readouterr().out


def plot(folder):
    """What a run does when it has trained."""
    run_log.RunLog(folder, NoTracker(), rank=0).plot()


def test_drawing_needs_neither_torch_nor_a_display():
    program = (
        "import sys, i3dist.tracking.plots; "
        "print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    root = Path(plots.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
