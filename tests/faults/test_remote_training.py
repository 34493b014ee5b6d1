"""Training from an HTTP server gives the run that local files give, to the bit."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import QUICK, SAVING, STEPS, differences, error_line, program, run_ranks
from tests.http_server import KINDS, Behavior, serving


@pytest.fixture
def server(data: Path, tmp_path: Path) -> Iterator[Behavior]:
    shutil.copytree(data, tmp_path / "served")
    with serving(tmp_path / "served") as behavior:
        yield behavior


def words(server: Behavior, tmp_path: Path, shards: int = 1000) -> list[str]:
    """Settings of the run in tmp_path / "run"; its cache has room for so many shards."""
    size = (tmp_path / "served" / "train" / "shard-000000.tar").stat().st_size
    places = [f"data.path={server.url}", f"run.path={tmp_path / 'run'}"]
    cache = [f"data.cache={tmp_path / 'cache'}", f"data.cache_gb={shards * size / 1e9}"]
    return [*QUICK, *SAVING, *places, *cache]


def test_two_ranks_train_from_a_plain_server(server: Behavior, whole: Path, tmp_path: Path) -> None:
    result = run_ranks(*words(server, tmp_path))
    assert result.returncode == 0, result.stderr
    assert differences(tmp_path / "run", whole) == []


def test_a_run_that_is_cut_trains_from_a_slow_server_that_fails(
    server: Behavior, whole: Path, tmp_path: Path
) -> None:
    """Each shard's first two requests fail, some with status 503; the cache evicts most shards."""
    server.delay, server.failures_first = 0.05, 2
    server.kinds = KINDS
    small = words(server, tmp_path, shards=6)
    for steps in (7, STEPS):
        result = run_ranks(*small, f"train.steps={steps}", "data.workers=2")
        assert result.returncode == 0, result.stderr
    assert differences(tmp_path / "run", whole) == []
    cached = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.shard"))
    size = (tmp_path / "served" / "train" / "shard-000000.tar").stat().st_size
    assert 0 < cached <= 6 * size


def test_a_run_continues_with_the_same_data_wherever_they_lie(
    server: Behavior, data: Path, whole: Path, tmp_path: Path
) -> None:
    """Begun with local files, then at a URL; other data there are refused."""
    remote = words(server, tmp_path)
    result = run_ranks(*remote, f"data.path={data}", "train.steps=7")
    assert result.returncode == 0, result.stderr
    path = tmp_path / "served" / "train" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    assert "was trained on other data" in error_line(run_ranks(*remote))
    path.write_text(text)
    result = run_ranks(*remote)
    assert result.returncode == 0, result.stderr
    assert differences(tmp_path / "run", whole) == []


def test_a_server_without_the_data_ends_the_run_in_one_line(
    server: Behavior, tmp_path: Path
) -> None:
    server.always["manifest.json"] = 404
    line = error_line(run_ranks(*words(server, tmp_path)))
    assert f"{server.url}/train/manifest.json cannot be fetched (HTTP 404 Not Found" in line
    assert not (tmp_path / "run").exists()


def test_a_shard_that_goes_ends_every_rank(server: Behavior, tmp_path: Path) -> None:
    for path in (tmp_path / "served" / "train").glob("*.tar"):
        server.always[path.name] = 403
    result = run_ranks(*words(server, tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert ".tar cannot be fetched (HTTP 403 Forbidden; not tried again)" in result.stderr


def test_programs_take_a_url(
    server: Behavior, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    result = program("launch/train.py", *words(server, tmp_path), "--dry-run")
    assert result.returncode == 0 and "512" in result.stdout, result.stderr
    found = []
    for place in (data, server.url):
        out = tmp_path / "results.json"
        options = ["--checkpoint", whole, "--data", place, "--json", out, "--device", "cpu"]
        result = program("launch/evaluate.py", *options)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(out.read_text()))
        result = program("launch/ledger.py", whole, "--data", place)
        assert result.returncode == 0, result.stderr
    assert found[0] == found[1]
    assert list((tmp_path / "home" / "i3dist").glob("*.shard"))
