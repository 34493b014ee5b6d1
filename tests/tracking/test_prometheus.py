"""metrics.prom: what a Prometheus server would read of it, at every moment."""

import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.tracking.metrics_log import METRICS, STARTS, VALIDATION, MetricsLog
from i3dist.tracking.prometheus import FILE, PrometheusFile, mark_stopped, write

LINE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)\{run="((?:[^"\\\n]|\\[\\"n])*)"\} (\S+)')


def read(folder: Path) -> dict[str, float]:
    """Every gauge, by the rules of the text format; its comments announce each once."""
    found: dict[str, float] = {}
    typed = []
    text = (folder / FILE).read_bytes().decode()
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        if match := re.fullmatch(r"# TYPE (\S+) gauge", line):
            typed.append(match[1])
        elif not re.fullmatch(r"# HELP \S+ .+", line):
            match = LINE.fullmatch(line)
            assert match is not None, line
            assert match[1] not in found and typed[-1] == match[1]
            found[match[1]] = float(match[3])
    assert typed == list(found)
    return found


def test_the_newest_figures_of_each_log_are_gauges(tmp_path: Path) -> None:
    MetricsLog(tmp_path / STARTS).append(0, {})
    file = PrometheusFile(tmp_path)
    file.update(VALIDATION, 0, {"loss": 6.5, "by_chunk": [1], "text": "x", "none": None})
    file.update(METRICS, 10, {"loss": float("nan"), "my-metric": 2, "mfu": float("inf")})
    file.update(METRICS, 20, {"loss": 5.5})
    found = read(tmp_path)
    assert found.pop("i3dist_time_seconds") > 1.7e9
    assert found == {
        **{"i3dist_running": 1, "i3dist_validation_step": 0, "i3dist_validation_loss": 6.5},
        **{"i3dist_step": 20, "i3dist_loss": 5.5, "i3dist_my_metric": 2, "i3dist_starts": 1},
        "i3dist_mfu": float("inf"),
    }
    file = (tmp_path / FILE).stat()
    mark_stopped(tmp_path)
    assert read(tmp_path)["i3dist_running"] == 0 and read(tmp_path)["i3dist_loss"] == 5.5
    after = (tmp_path / FILE).stat()
    assert (after.st_ino, after.st_size) == (file.st_ino, file.st_size), "a full disk takes this"


@pytest.mark.parametrize(
    "name", ["a b", 'quo"te', "back\\slash", "new\nline", "a\rb", "x\udcff", "é"]
)
def test_a_folder_of_any_name_is_a_label(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    PrometheusFile(tmp_path / name).update(METRICS, 1, {})
    assert read(tmp_path / name)["i3dist_step"] == 1
    mark_stopped(tmp_path / name)
    assert read(tmp_path / name)["i3dist_running"] == 0


@given(value=st.floats())
def test_numbers_are_kept(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    folder = tmp_path_factory.getbasetemp()
    write(folder, {"i3dist_loss": value})
    found = read(folder)["i3dist_loss"]
    assert found == value or (found != found and value != value)


def test_a_reader_never_finds_half_a_file_nor_another_with_its_ending(tmp_path: Path) -> None:
    file, done = PrometheusFile(tmp_path), threading.Event()
    figures = {f"figure_{number}": number for number in range(200)}
    file.update(METRICS, 0, figures)

    def rewrite() -> None:
        while not done.is_set():
            file.update(METRICS, 1, figures)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(100):
            assert len(read(tmp_path)) == 204
            assert [path.name for path in tmp_path.glob("*.prom")] == [FILE]
    finally:
        done.set()
        thread.join()


def test_what_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    PrometheusFile(tmp_path / "absent").update(METRICS, 1, {"loss": 1.0})
    mark_stopped(tmp_path / "absent")
