"""The tables of a start: its parts sum to the whole, and every graph has the name of its code."""

import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from torch import Tensor

from i3dist.config import Settings
from i3dist.distributed.job import Job
from i3dist.distributed.patience import START
from i3dist.distributed.peers import Peers
from i3dist.distributed.signals import StopRequest
from i3dist.distributed.watchdog import Watchdog
from i3dist.ops.compiled import Prepared
from i3dist.tracking.notify import Notifier
from i3dist.training import run, start_times
from i3dist.training.run import join, watch_start
from i3dist.training.start_times import StartTimes, compilations
from tests.start_table import start_parts


def double(x: Tensor) -> Tensor:
    return x * 2


@pytest.fixture
def compiled() -> Iterator[None]:
    """A graph with a backward pass, compiled twice because of a second shape."""
    torch._dynamo.utils.clear_compilation_metrics()
    torch._dynamo.reset()
    call = torch.compile(double, backend="aot_eager", dynamic=False)
    for size in (2, 3):
        call(torch.ones(size, requires_grad=True)).sum().backward()
    yield
    torch._dynamo.reset()


def test_the_parts_of_a_start_sum_to_the_time_since_the_command(
    compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a table of graphs follows, and where a part is entered several times."""
    times = StartTimes()
    times.wanted = True
    for part in ("imports", "data", "imports"):
        time.sleep(0.11)
        times.end(part)
    assert times.end_all() and not times.end_all()
    since = time.time() - psutil.Process().create_time()
    parts = start_parts(capsys.readouterr().out)
    assert set(parts) - {"launcher"} == {"imports", "data", "first step", "all"}
    assert parts["all"] - parts.get("launcher", 0.0) == pytest.approx(since, abs=0.5)


def test_a_start_that_hangs_ends_later_than_ranks_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of it is watched anew; after the first step only the trainer says what it does."""
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "60")
    beats: list[str] = []
    monkeypatch.setattr(Watchdog, "beat", lambda _, doing: beats.append(doing))
    settings, job = Settings.load(None, [f"run.path={tmp_path}"]), Job.detect({})
    stop, notifier, times = StopRequest(job), Notifier(tmp_path, None), StartTimes()
    watchdog = watch_start(settings, job, stop, times, notifier)
    assert watchdog.patience.limit(START) == 2 * 3600 + 60
    for part in ("data", "model"):
        times.end(part)
    times.end_all()
    times.end("validation")
    assert beats == [START] * 3
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "10")
    watchdog = watch_start(settings, job, stop, times, notifier)
    assert watchdog.patience.limit(START) == 1800


def test_a_rank_hears_of_a_hang_as_soon_as_it_has_joined_the_job_and_tells_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also during the preflight, and long before there is a trainer."""
    settings = Settings.load(None, [f"run.path={tmp_path}", "guard.hang_seconds=0"])
    job = Job.detect({})
    stop, notifier = StopRequest(job), Notifier(tmp_path, None, False)
    watchdog = watch_start(settings, job, stop, StartTimes(), notifier)
    peers = mock.Mock(spec=Peers)
    monkeypatch.setattr(run.setup, "start", lambda *_: peers)
    for name in ("keep_records_in", "tell_others_by"):
        monkeypatch.setattr(run, name, mock.Mock())
    join(settings, job, stop, notifier, watchdog)
    peers.on_hang()
    assert watchdog._told.is_set()
    watchdog.on_end("it hangs")
    peers.hang.assert_called_once_with()


def test_functions_that_are_kept_have_rows_of_their_own(
    compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that torch compiles as usual have their graphs' rows."""
    rows = [Prepared(double.__code__, how, 1.0) for how in ("loaded", "compiled", "traced")]
    monkeypatch.setattr(start_times.compiled, "prepared", rows)
    table = compilations()
    assert table is not None
    function, what, seconds = (list(column.cells) for column in table.columns[:3])
    assert function == 6 * ["test_start_times.double"] + ["all"]
    assert what[:2] == ["loaded", "compiled"] and seconds[:2] == ["1.0", "1.0"]
    assert float(str(seconds[-1])) >= 2


def test_a_graph_has_the_name_of_its_function_in_both_passes(compiled: None) -> None:
    table = compilations()
    assert table is not None
    function, passes, seconds = (list(column.cells) for column in table.columns[:3])
    assert function == 4 * ["test_start_times.double"] + ["all"]
    assert sorted(passes[:4]) == ["backward", "backward", "forward", "forward"]
    each, whole = [float(str(cell)) for cell in seconds[:4]], float(str(seconds[4]))
    assert whole == pytest.approx(sum(each), abs=0.05 * len(seconds) + 1e-6)
