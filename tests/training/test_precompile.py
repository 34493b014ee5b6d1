"""Processes that compile a first step: what they compile is what the run calls."""

import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import flex_attention

from i3dist.aside import start_module
from i3dist.config import Settings
from i3dist.distributed.job import Job
from i3dist.engine import setup
from i3dist.engine.config_file import read_engine_file
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.ops import compiled, cross_entropy
from i3dist.training import precompile, run
from i3dist.training.micro_batch import dummy_batch
from i3dist.training.precompile import Step, compile_aside, functions
from tests.conftest import one_rank
from tests.engine.steps import ZERO2
from tests.model.conftest import SMALL

PAD, BOS, LANES, WINDOW = 0, 2, 2, 3


@pytest.fixture(scope="module", autouse=True)
def job() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    compiled.keep_in(tmp_path / "functions")
    yield tmp_path / "functions"
    compiled.keep_in(None)
    compiled.prepared.clear()


def settings_with(kind: str = "adamw", **model: object) -> Settings:
    values = {"model": SMALL | model, "train": {"window_chunks": WINDOW, "lanes": LANES}}
    return Settings.build(values | {"optimizer": {"kind": kind, "decay_steps": 9}})


def step_of(settings: Settings, joins: bool = False, dtype: str = "bfloat16") -> Step:
    model, optimizer = (settings.to_dict()[section] for section in ("model", "optimizer"))
    return Step(model, optimizer, 1, WINDOW, LANES, joins, dtype, "cpu", BOS, PAD)


def called_by_a_run(settings: Settings, joins: bool, dtype: str) -> set[Path]:
    """What the engine and its model call in one step."""
    config = read_engine_file(ZERO2)
    if dtype == "float32":
        config["bf16"] = {"enabled": False}
        del config["data_types"]
    model = I3LM(settings.model, BOS)
    model.compile_blocks()
    engine = setup.build(model, config, settings.optimizer, settings.train)
    if joins:
        engine.model.join_softmaxes(0.0)
    state = LaneState.empty(LANES, settings.model, engine.device, engine.dtype)
    tokens, *others = dummy_batch(settings, state, PAD)
    head = engine.model.head
    with compiled.noting() as noted:
        losses, _ = engine(tokens, tokens, *others)
        engine.backward(losses.sum(), torch.tensor(tokens.numel()))
        engine.step(1e-3)
        with torch.no_grad():  # what the losses call when they are compiled
            hidden = torch.zeros(tokens.numel(), model.width.computed, dtype=engine.dtype)
            weight, ones = head.computed(head.weight), torch.ones(tokens.numel())
            cross_entropy._in_slices(hidden, weight, tokens.flatten(), ones, fused=True)
    return set(noted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "changes, joins",
    [
        ({}, False),
        ({"layers": "2xrwkv,2xdual-attention"}, False),
        ({"layers": "2xrwkv,2xdual-attention"}, True),
        ({"layers": "1xrwkv,1xattention,1xdual-attention"}, True),
        ({"state_carry": True}, False),
        ({"compressor": "literal"}, False),
        ({"d_model": 36, "vocab_size": 97}, False),
        ({"kind": "lion"}, False),
    ],
    ids=lambda x: str(x) if isinstance(x, bool) else "-".join(map(str, x.values())),
)
def test_they_compile_what_a_run_calls(
    changes: dict[str, Any], joins: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever differs would be compiled twice. The last slice of the loss is a shorter one."""
    monkeypatch.setattr(cross_entropy, "SLICE_ELEMENTS", 7 * 40)
    settings = settings_with(**changes)
    assert set(functions(step_of(settings, joins, dtype))) == called_by_a_run(
        settings, joins, dtype
    )


def test_two_processes_share_the_functions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None is compiled by both. A second start of the same step begins no process."""
    taken = tmp_path / "taken"

    def start(_: str, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        return start_module("tests.training.without_kernels", *words, str(taken), **options)

    monkeypatch.setattr(precompile, "start_module", start)
    step = step_of(settings_with(layers="1xrwkv,1xattention"))
    count = len(functions(step))
    compile_aside(step, folder, 2 * precompile.CORES)
    kept = [path for path in folder.iterdir() if not path.name.startswith("step-")]
    # Not by their names, which have the compiler's settings in them: those differ here.
    assert len(kept) == count and not caplog.records
    assert len(taken.read_text().splitlines()) == count
    begun = mock.Mock(side_effect=OSError("no more processes"))
    monkeypatch.setattr(precompile, "_start", begun)
    compile_aside(step, folder, 2 * precompile.CORES)
    assert not begun.called
    compile_aside(replace(step, lanes=LANES + 1), folder, 2 * precompile.CORES)
    assert begun.called, "other shapes are another step"


def test_a_rank_with_few_cores_compiles_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = mock.Mock()
    monkeypatch.setattr(precompile, "_start", start)
    compile_aside(step_of(settings_with()), folder, 2 * precompile.CORES - 1)
    assert not start.called


def test_the_log_says_what_went_wrong(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = replace(step_of(settings_with()), device="nowhere")
    with caplog.at_level(logging.INFO):
        compile_aside(step, folder, 2 * precompile.CORES)
    (line,) = caplog.messages
    assert "exit statuses [1, 1]: RuntimeError: " in line and "nowhere" in line


@pytest.mark.parametrize("chosen, each", [(None, 4), ("7", 3), ("1", 1)])
def test_they_share_the_threads_that_the_user_chose(
    chosen: str | None, each: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = mock.Mock(return_value=mock.Mock(**{"wait.return_value": 0}))
    monkeypatch.setattr(precompile, "_start", start)
    monkeypatch.delenv(precompile.THREADS, raising=False)
    if chosen is not None:
        monkeypatch.setenv(precompile.THREADS, chosen)
    monkeypatch.setattr(precompile, "CORES", 4)
    compile_aside(step_of(settings_with()), folder, 8)
    assert [call.args[-1] for call in start.mock_calls if call.args] == [each, each]


@pytest.mark.parametrize(
    "command", ["raise SystemExit(3)", "import time; time.sleep(60)"], ids=["fails", "hangs"]
)
def test_the_run_goes_on_without_them(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does the next start try again what would fail again."""

    def start(*_: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", command])

    begun = mock.Mock(side_effect=start)
    monkeypatch.setattr(precompile, "_start", begun)
    monkeypatch.setattr(precompile, "MOST_SECONDS", 2)
    for _ in range(2):
        with caplog.at_level(logging.INFO):
            compile_aside(step_of(settings_with()), folder, 2 * precompile.CORES)
    assert "exit statuses" in caplog.text and begun.call_count == 2


def test_they_compile_for_the_gpu_of_their_rank(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which torch must know as the present one: the name of a function's file has its name."""
    step, told = replace(step_of(settings_with()), device="cuda:3"), mock.Mock()
    monkeypatch.setattr(sys, "argv", ["precompile", str(folder), str(tmp_path)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asdict(step))))
    monkeypatch.setattr(precompile.threading, "Thread", mock.Mock())
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    monkeypatch.setattr(torch.cuda, "set_device", told.set_device)
    monkeypatch.setattr(precompile, "share_kernels", told.share_kernels)
    monkeypatch.setattr(precompile, "functions", mock.Mock(return_value={}))
    precompile.main()
    assert told.mock_calls == [
        mock.call.set_device(torch.device("cuda:3")),
        mock.call.share_kernels(step, tmp_path),
    ]


def test_they_end_when_the_run_does(folder: Path, tmp_path: Path) -> None:
    """Before they have compiled anything, after which they would end with 0."""
    step = json.dumps(asdict(step_of(settings_with())))
    process = precompile._start(step, folder, str(tmp_path), 1)
    assert process.stdin is not None
    process.stdin.close()
    began = time.monotonic()
    assert process.wait(60) == 1 and time.monotonic() - began < 60


@pytest.mark.parametrize("archive", [False, True])
def test_they_begin_at_once_unless_an_archive_is_unpacked_first(
    archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = mock.Mock()
    monkeypatch.setattr(run, "compile_aside", begun)
    monkeypatch.setattr(run, "aside", lambda work, name: work() or (lambda: None))
    cache = SimpleNamespace(archive=tmp_path / "archive", functions=tmp_path / "functions")
    if archive:
        cache.archive.touch()
    corpus = mock.Mock(**{"tokenizer.bos_id": BOS, "train.manifest.pad_id": PAD})
    settings = settings_with().with_values(
        **{"compression.join_after": 7, "compression.join_steps": 2}
    )
    given = (SimpleNamespace(settings=settings), read_engine_file(ZERO2), Job.detect({}))
    wait = run.precompile(cache, *given, corpus)  # type: ignore[arg-type]
    assert begun.called != archive
    wait()
    begun.assert_called_once()
    step, kept_in, _ = begun.call_args.args
    assert step == step_of(settings, True) and kept_in == cache.functions


@pytest.mark.parametrize("why", ["no folder", "an extension", "stock"])
def test_nothing_is_compiled_ahead_that_could_not_be_kept(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "compile_aside", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(run, "LOADED", [Path("mine.py")] if why == "an extension" else [])
    settings = settings_with().with_values(
        **{"train.engine": "stock" if why == "stock" else "zero2"}
    )
    cache = None if why == "no folder" else mock.Mock(**{"archive.exists.return_value": True})
    run.precompile(cache, mock.Mock(settings=settings), {}, Job.detect({}), mock.Mock())()
