import json
import math
import os
import time as timing
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.errors import UserError
from i3dist.tracking import metrics_log
from i3dist.tracking.metrics_log import MetricsLog, read_metrics

NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name not in ("step", "time"))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
METRICS = st.dictionaries(NAMES, NUMBERS, max_size=5)
STEPS = st.integers(0, 2**40)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@given(lines=st.lists(st.tuples(STEPS, METRICS), max_size=8))
def test_reads_back_by_step_and_the_last_of_a_step_counts(lines, tmp_path_factory):
    log = MetricsLog(tmp_path_factory.mktemp("log") / "metrics.jsonl")
    before = timing.time()
    for step, metrics in lines:
        log.append(step, metrics)
    expected = {step: {"step": step, **metrics} for step, metrics in lines}
    read = read_metrics(log.path)
    times = [line.pop("time") for line in read]
    assert read == [expected[step] for step in sorted(expected)]
    assert all(before - 0.001 <= time <= timing.time() + 0.001 for time in times)


@given(lines=st.lists(METRICS, min_size=1, max_size=5), data=st.data())
def test_a_file_torn_anywhere_loses_only_the_torn_line(lines, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    log = MetricsLog(path)
    ends = []
    with mock.patch.object(metrics_log, "time", SimpleNamespace(time=lambda: 1.5)):
        for step, metrics in enumerate(lines):
            log.append(step, metrics)
            ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    whole = sum(end - 1 <= cut for end in ends)  # without its newline a line is whole, too
    assert len(read_metrics(path)) == whole
    log.append(99, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(path)] == [*range(whole), 99]


def test_lines_are_json_with_null_for_what_is_not_finite(tmp_path):
    log = MetricsLog(tmp_path / "validation.jsonl")
    log.append(3, {"loss": math.nan, "by_chunk": [{"index": 0, "loss": math.inf}], "ok": 1})
    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert isinstance(line.pop("time"), float)
    assert line == {"step": 3, "loss": None, "by_chunk": [{"index": 0, "loss": None}], "ok": 1}
    assert next(iter(line)) == "step"


def test_appends_to_what_an_earlier_process_wrote(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(1, {"loss": 2.0})
    before = path.read_bytes()
    MetricsLog(path).append(2, {"loss": 1.0})
    assert path.read_bytes().startswith(before)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_lines_that_are_no_metrics_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\n\n[1]\n{"loss": 1}\n{"step": 5, "loss": 1}\n')
    assert read_metrics(path) == [{"step": 5, "loss": 1}]


def test_no_file_reads_as_no_lines_and_no_folder_is_one_clear_line(tmp_path):
    path = tmp_path / "missing" / "metrics.jsonl"
    assert read_metrics(path) == []
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No such file"):
        MetricsLog(path).append(0, {})
