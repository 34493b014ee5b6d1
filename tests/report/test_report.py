"""launch/report.py: the page has every point of its runs, and stands alone."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.report import charts
from i3dist.report.charts import MOST_POINTS, Curve, families, grouped, overlaid
from i3dist.report.page import page
from i3dist.report.run import Run, differing, names
from i3dist.tracking.metrics_log import MetricsLog
from tests.conftest import ROOT, STEPS, error_line, program
from tests.html_page import Page
from tests.launch.conftest import load, typed

EVIL = "<script>alert(1)</script>\x00\x1b&"
NUMBER = st.none() | st.floats(1e-3, 1e3)
METRIC = st.fixed_dictionaries(
    {"loss": NUMBER, "gradient_norm": NUMBER},
    optional=dict.fromkeys(["learning_rate", "gate", "joined", "tokens_per_second", "mfu"], NUMBER),
)
VALID = st.fixed_dictionaries({"loss": NUMBER}, optional={"other_history_gain": NUMBER})
AGES = st.dictionaries(st.sampled_from(["attention_age_01", "attention_age_02"]), NUMBER)


def folder_of(folder: Path, logs: dict[str, Sequence[dict[str, Any]]], **changes: Any) -> Path:
    """A run's folder with these logs, a step a line, and settings."""
    folder.mkdir(parents=True)
    changed = {"train.lanes": 4, "train.steps": 100} | changes
    (folder / "settings.yaml").write_text(Settings().with_values(**changed).to_yaml())
    for name, lines in logs.items():
        for step, line in enumerate(lines, start=1):
            MetricsLog(folder / f"{name}.jsonl").append(step, line)
    return folder


def ledger(steps: int, skipped: dict[int, str]) -> list[dict[str, Any]]:
    """Lines of a ledger without their times; a skipped step's norm is not finite."""
    return [
        {
            "step": step,
            "samples": "s",
            "lanes": "l",
            "loss": 5.0,
            "gradient_norm": None if step in skipped else 1.0 + step / 100,
            "skipped": skipped.get(step),
        }
        for step in range(1, steps + 1)
    ]


def finite(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    values = (line.get(name) for line in lines)
    return [value for value in values if value is not None]


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(st.lists(st.tuples(*map(st.lists, (METRIC, VALID, AGES))), min_size=1, max_size=3))
def test_every_point_of_every_run_is_in_a_curve(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    kinds = ("metrics", "validation", "diagnostics")
    logs = [dict(zip(kinds, run, strict=True)) for run in drawn]
    runs = [Run.read(folder_of(folder / f"{n}", run)) for n, run in enumerate(logs)]
    made = [*overlaid(runs), *(c for n, run in enumerate(runs) for c in families(n, run))]
    curves = {curve.name: curve.points() for chart in made for curve in chart.curves}
    for n, run in enumerate(logs):
        for log, column, curve in (
            ("metrics", "loss", "loss"),
            ("metrics", "learning_rate", "learning-rate"),
            ("metrics", "gate", "gate"),
            ("metrics", "joined", "joined"),
            ("metrics", "tokens_per_second", "tokens-per-second"),
            ("metrics", "mfu", "mfu"),
            ("metrics", "gradient_norm", "gradient-norm"),
            ("validation", "loss", "held-out"),
            ("validation", "other_history_gain", "other-history"),
        ):
            assert curves[f"{curve}-{n}"].y.tolist() == finite(run[log], column)
        for age in (1, 2):
            values = finite(run["diagnostics"], f"attention_age_{age:02d}")
            assert not values or curves[f"age-{n}-{age}"].y.tolist() == values


SETTING = st.sampled_from(
    [
        ("optimizer.lr", (1e-3, 2e-3)),
        ("train.steps", (5, 6)),
        ("model.compressor", ("records", "literal")),
        ("tracking.run_name", (None, "b")),
        ("train.clip", (1.0, 2.0)),
    ]
)


@given(st.lists(st.dictionaries(SETTING, st.booleans(), max_size=4), min_size=2, max_size=3))
def test_the_settings_that_differ_are_those_that_do(
    whole: Path, choices: list[dict[tuple[str, tuple[Any, Any]], bool]]
) -> None:
    run = Run.read(whole)
    base = Settings().with_values(**{"train.steps": 7})
    trees = [base.with_values(**{k: v[second] for (k, v), second in c.items()}) for c in choices]
    found = differing([replace(run, settings=tree) for tree in trees])
    flat = [tree.flat() for tree in trees]
    assert found == {k: [f[k] for f in flat] for k in flat[0] if len({f[k] for f in flat}) > 1}
    alone = differing([replace(run, settings=trees[0])])
    default = Settings().flat()
    assert alone == {k: [v, default[k]] for k, v in flat[0].items() if v != default[k]}


@given(st.sets(st.integers(1, 300), min_size=1))
def test_a_group_has_each_of_its_columns_once(numbers: set[int]) -> None:
    groups = grouped({n: np.array([float(n), np.nan]) for n in numbers})
    members = []
    for label, values in groups.items():
        first, _, last = label.partition("-")
        inside = [n for n in numbers if int(first) <= n <= int(last or first)]
        assert values[0] == pytest.approx(np.mean(inside)) and math.isnan(values[1])
        members += inside
    assert sorted(members) == sorted(numbers)
    assert len(groups) == len(numbers) if len(numbers) <= 8 else len(groups) <= 10


@given(st.integers(1, 5 * MOST_POINTS), st.integers(0, 5 * MOST_POINTS - 1))
def test_a_long_curve_has_fewer_points_and_keeps_its_spikes(length: int, spike: int) -> None:
    y = np.ones(length)
    y[spike % length] = 100.0
    x = np.arange(length)
    shown = Curve("a", x, y, "", summary=np.max).points()
    assert len(shown.x) == min(length, MOST_POINTS)
    assert shown.y.max() == 100 and (np.diff(shown.x) > 0).all()


def drawn_points(text: str) -> dict[str, np.ndarray]:
    """The points of each curve of a page by its id, as the browser draws them: [n, 2] pixels."""
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
            if not re.fullmatch(r"[a-z-]+-\d+(-\d+)*", name := group.get("id", "")):
                continue
            paths = [p for p in group if p.tag.endswith("}path")]
            points = re.findall(r"[ML] (\S+) (\S+)", paths[0].get("d", "")) if paths else []
            if not points:
                uses = [use for use in group.iter() if use.tag.endswith("}use")]
                points = [(use.get("x"), use.get("y")) for use in uses]
            found[name] = np.array(points, float)
    return found


@pytest.fixture(scope="module")
def text(whole: Path) -> str:
    return page([Run.read(whole)])


def test_the_page_of_a_run_has_all_its_points(whole: Path, text: str) -> None:
    run = Run.read(whole)
    assert not run.missing and run.finished
    drawn = drawn_points(text)
    for name, lines, column in (
        ("loss-0", run.metrics, "loss"),
        ("mean-loss-0", run.metrics, "mean_loss"),
        ("held-out-0", run.validation, "loss"),
        ("learning-rate-0", run.metrics, "learning_rate"),
        ("gate-0", run.metrics, "gate"),
        ("tokens-per-second-0", run.metrics, "tokens_per_second"),
        ("gradient-norm-0", [entry.model_dump() for entry in run.ledger], "gradient_norm"),
        ("age-0-1", run.diagnostics, "attention_age_01"),
    ):
        assert len(drawn[name]) == len(finite(lines, column)) > 0, name
    assert len(run.metrics) == len(run.ledger) == STEPS
    # Lower in the picture, and further right, as values and tokens are.
    rates = finite(run.metrics, "learning_rate")
    pixels = drawn["learning-rate-0"]
    for values, places, sign in ((rates, pixels[:, 1], -1), (run.metrics, pixels[:, 0], 1)):
        if sign == 1:
            values = finite(run.metrics, "tokens_seen")
        slope, start = np.polyfit(values, places, 1)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(slope * np.array(values) + start, places, atol=0.01)


def test_the_page_says_what_the_run_is(whole: Path, text: str) -> None:
    run = Run.read(whole)
    start = json.loads((whole / "starts.jsonl").read_text())
    assert (start["step"], start["ranks"], start["device"]) == (0, "2", "CPU")
    flat = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    assert f"finished, {STEPS} steps" in flat and "CPU, 2 ranks" in flat
    assert f"held-out loss {run.validation[-1]['loss']:.4f}" in flat
    assert start["git_commit"][:12] in flat and start["data_source"] in flat
    assert "optimizer.warmup_steps 2 100" in flat and "No step was skipped" in flat
    assert [line["step"] for line in run.samples] == [STEPS]
    assert text.count("<article>") == len(run.samples[0]["samples"]) > 0


def test_the_page_stands_alone(text: str, whole: Path) -> None:
    assert page([Run.read(whole)]) == text, "not the same twice"
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == [] and parsed.seen["svg"] == 9
    assert not parsed.seen["script"] and all(link.startswith("#") for link in parsed.links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not re.search("#0[47ac]0[5d8b]", text), "a stand-in is left"


def test_text_cannot_break_the_page(tmp_path: Path) -> None:
    logs: dict[str, Any] = {
        "samples": [{"samples": [{"prompt": EVIL, "text": EVIL}]}],
        "starts": [{"device": EVIL, "git_commit": EVIL, "data_tokens": "1", "data_source": EVIL}],
        "metrics": [{"loss": 1.0}] * 2,
    }
    name = "<b>\udcff"
    folder = folder_of(tmp_path / name, logs, **{"tracking.experiment": "<script>$x$"})
    shutil.copytree(folder, tmp_path / "<script>")
    text = page([Run.read(folder), Run.read(tmp_path / "<script>")])
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == [] and parsed.seen["article"] == 2 == parsed.seen["details"]
    assert "<script" not in text and "<b>?" not in text
    assert "\x00" not in text and "\x1b" not in text
    text.encode()


def test_what_a_run_lacks_is_left_out_and_said(tmp_path: Path) -> None:
    run = Run.read(folder_of(tmp_path / "new", {}))
    text = page([run])
    assert "<svg" not in text and "at step 0 of 100" in text
    assert text.count('class="soft"') == 1 and all(name in text for name in run.missing)
    assert run.missing == [
        *("metrics.jsonl", "validation.jsonl", "diagnostics.jsonl"),
        *("ledger.jsonl", "samples.jsonl", "starts.jsonl"),
    ]


@pytest.mark.parametrize("logs", [{}, {"metrics": [{"loss": 1.0}, {"loss": 2.0}]}])
def test_each_heading_has_something_beneath(tmp_path: Path, logs: dict[str, Any]) -> None:
    """Also where runs have no charts, or the same settings."""
    runs = [Run.read(folder_of(tmp_path / name, logs)) for name in "ab"]
    for some in (runs[:1], runs):
        parts = re.split(r"<h[23]>.*?</h[23]>", page(some))[1:]
        assert all(re.search(r"[^\s>]\s*<|<svg", part) for part in parts), parts
    assert "Settings that differ</h2>\n<p>None.</p>" in page(runs)


def test_a_run_that_goes_on_has_the_steps_so_far(whole: Path, tmp_path: Path) -> None:
    """Its last lines are torn, and its last validation is of a step that metrics lack."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "settings.yaml", run)
    for name in ("metrics", "ledger", "samples"):
        lines = (whole / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (run / f"{name}.jsonl").write_text("".join(lines[:7])[:-5])
    shutil.copy(whole / "validation.jsonl", run)
    read = Run.read(run)
    assert (len(read.metrics), len(read.ledger), read.step) == (6, 6, STEPS)
    seen = finite(read.metrics, "tokens_seen")
    assert read.tokens(range(1, 7)).tolist() == seen
    per_step = 4 * 2 * read.settings.model.chunk_length
    assert read.tokens([STEPS]) == seen[-1] + (STEPS - 6) * per_step
    (run / "validation.jsonl").unlink()
    assert f"at step 6 of {STEPS}" in page([Run.read(run)])
    (run / "metrics.jsonl").unlink()  # stopped before `log.every` steps
    assert f"at step 6 of {STEPS}" in page([Run.read(run)])


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Without tokens, times, starts and sums of gains; tokens are those of its lanes."""
    chunk = {"index": 1, "tokens": 5, "loss": 3.0, "loss_without_history": 3.5}
    logs = {
        "metrics": [{"loss": 5.0, "gradient_norm": 1.0}] * 3,
        "validation": [{"loss": 3.0, "by_chunk": [chunk]}],
    }
    folder = folder_of(tmp_path / "old", logs)
    (folder / "metrics.jsonl").write_text(
        re.sub(r', "time": [^}]*', "", (folder / "metrics.jsonl").read_text())
    )
    run = Run.read(folder)
    assert run.tokens([0, 3]).tolist() == [0, 3 * 4 * 8 * 512]
    assert run.seconds is None and [start.step for start in run.starts] == [0]
    drawn = drawn_points(page([run]))
    assert len(drawn["history-0"]) == 1 and len(drawn["gradient-norm-0"]) == 3


def test_restarts_and_skipped_steps_are_listed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", {})
    log = MetricsLog(folder / "metrics.jsonl")
    for step, elapsed in ((5, 10.0), (10, 20.0), (9, 4.0), (12, 6.0), (14, 1.0)):
        log.append(step, {"loss": 2.0, "elapsed": elapsed, "tokens_seen": 100 * step})
    skipped = {3: "spike", 7: "not finite", 8: "not finite, rolled back to step 4"}
    lines = "\n".join(map(json.dumps, ledger(14, skipped)))
    (folder / "ledger.jsonl").write_text(lines + "\n")
    run = Run.read(folder)
    assert [start.step for start in run.starts] == [0, 10, 12]
    assert run.seconds == 20 + 6 + 1
    text = page([run])
    for step, reason in skipped.items():
        assert f"<td>{step}</td><td>{reason}</td><td>not finite</td>" in text
    assert "1 spike, 2 not finite" in text and "27 s" in text
    drawn = drawn_points(text)
    assert len(drawn["skipped-0"]) == 3 and len(drawn["gradient-norm-0"]) == 11


@pytest.mark.parametrize("value", [0.0, 0.02, 1.0])
def test_an_axis_of_shares_has_no_ticks_that_no_share_can_be(tmp_path: Path, value: float) -> None:
    """Also where a curve is flat, around which an axis would reach as far down as up."""
    logs = {
        "metrics": [{"loss": 1.0, "gate": value, "joined": value, "mfu": value}] * 2,
        "diagnostics": [{"attention_age_01": value}] * 2,
    }
    run = Run.read(folder_of(tmp_path / "run", logs))
    made = {chart.title: chart for chart in [*overlaid([run]), *families(0, run)]}
    for title in ("Gate of history", "Share joined", "MFU", "Attention to history by age"):
        drawn = made[title].svg()
        assert drawn is not None
        ticks = re.findall(r">([\u2212-]?[\d.]+)%?</text>", drawn)
        assert not [tick for tick in ticks if tick[0] in "-\u2212"], title
        if title in ("Gate of history", "Share joined"):
            assert "1.0" not in ticks and {"0", "1"} <= set(ticks), title
            assert max(float(tick) for tick in ticks if float(tick) < 2) == 1, title


def test_runs_have_names_and_colors_of_their_own(tmp_path: Path, whole: Path) -> None:
    logs = {"metrics": [{"loss": 1.0}, {"loss": 2.0}]}
    folders = [folder_of(tmp_path / name, logs) for name in ("a/run", "b/run", "c/other")]
    runs = [Run.read(folder) for folder in folders]
    assert names(runs) == ["a/run", "b/run", "c/other"]
    assert names(runs[1:]) == ["run", "other"]
    loss, *_ = overlaid(runs * 3)
    styles = {(c.color, c.style) for c in loss.curves if c.name.startswith("held-out")}
    assert len(styles) == charts.SERIES
    lines = {(c.color, c.style) for c in list(overlaid(runs * 3))[2].curves}
    assert len(lines) == 9


def test_the_program_writes_the_page(whole: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    result = program("launch/report.py", whole, "--out", out)
    assert (result.returncode, result.stdout) == (0, f"written: {out}\n"), result.stderr
    assert out.read_text() == text
    assert error_line(program("launch/report.py", whole, "--out", tmp_path)) == (
        f"error: argument --out: {tmp_path} cannot be written: Is a directory; "
        "name another file (see --help)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_the_page_on_standard_output_is_whole_and_alone(
    whole: Path, text: str, tmp_path: Path
) -> None:
    with (tmp_path / "a.html").open("wb") as out:
        words = [sys.executable, "launch/report.py", str(whole), "--out", "/dev/stdout"]
        done = subprocess.run(words, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"written: /dev/stdout\n")
    assert (tmp_path / "a.html").read_text() == text


def test_bad_input_is_one_line(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out = load("report"), tmp_path / "a.html"
    for words, says in (
        ([tmp_path / "none"], "none is no folder: name a run's"),
        ([tmp_path], "holds no run: name a run's, with settings.yaml in it"),
        ([whole, whole], "a run is named twice"),
    ):
        typed(monkeypatch, *words, "--out", out)
        with pytest.raises(UserError, match=says):
            module.main()
    assert not out.exists()
