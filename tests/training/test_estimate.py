"""What is said of a run before it runs: sizes in configs/, memory, speed."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i3dist.config import Settings
from i3dist.data.lanes import Batch
from i3dist.engine.interface import MEMORY_SHARE
from i3dist.model.layers import Channels
from i3dist.model.lm import I3LM
from i3dist.tracking.mfu import H100, Gpu, seen_in, seen_in_a_long_document
from i3dist.training import summary
from i3dist.training.estimate import (
    Memory,
    flops_per_token,
    memory_estimate,
    meta_model,
    share_of_peak,
    tokens_per_second,
)
from i3dist.training.summary import tokens_per_step
from tests.conftest import ROOT

SIZES = {"35M": 35e6, "125M": 125e6, "i3-4096ctx": 340e6, "1B": 1e9}  # parameters, by config
GIB = 2**30
each_size = pytest.mark.parametrize("name", SIZES)
REDUCED = "reduced gradients, fp32, 1/ranks"
TINY = Settings().with_values(
    **{"model.d_model": 16, "model.layers": "1xrwkv,1xattention", "train.lanes": 12}
)


def config(name: str) -> tuple[Path, Settings]:
    """A config, with lanes decided for one GPU."""
    path = ROOT / "configs" / f"{name}.yaml"
    settings = Settings.load(path)
    return path, settings.with_values(**{"train.lanes": 4}) if name == "i3-4096ctx" else settings


def parameters(model: I3LM) -> int:
    return sum(p.numel() for p in model.parameters())


@each_size
def test_a_config_has_the_size_of_its_name(name: str) -> None:
    _, settings = config(name)
    assert parameters(meta_model(settings)) == pytest.approx(SIZES[name], rel=0.05)


def test_every_config_is_in_this_test() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == {*SIZES, "tiny"}


@pytest.mark.parametrize("name", [name for name in SIZES if name != "i3-4096ctx"])
def test_a_config_is_aligned_and_divides_on_8_gpus(name: str) -> None:
    _, settings = config(name)
    width, train = settings.model.d_model, settings.train
    assert Channels(width).computed == width
    assert width % 64 == 0 and width % settings.model.heads == 0
    lanes = train.lane_count // 8
    assert lanes * 8 == train.lane_count
    assert train.micro_batch == "auto" or lanes % train.micro_batch == 0
    assert settings.optimizer.warmup_steps < train.steps / 20


@each_size
def test_a_config_says_what_is_computed_of_it(name: str) -> None:
    """In its comment, but for the card, whose file is made of defaults; and in docs/scaling.md."""
    path, settings = config(name)
    model = meta_model(settings)
    count = parameters(model)
    memory = memory_estimate(settings, count, 1, H100.memory)
    rate = tokens_per_second(settings, model, H100)
    assert rate is not None
    hours = settings.train.steps * tokens_per_step(settings) / rate / 3600
    share = f"{share_of_peak(settings.model.d_model):.0%}"
    said = {
        "size": f"{count / 1e6:,.1f}M",
        "lanes": f"{memory.lanes} lanes at once",
        "memory": f"{memory.total / GIB:.1f} GiB",
        "speed": f"{round(rate, -3):,.0f} tokens/s",
        "share": f"{share} of the data sheet's peak",
        "time": f"{settings.train.steps:,} steps in {hours:.1f} hours",
    }
    if name != "i3-4096ctx":
        comment = " ".join(re.findall(r"^# *(.*)", path.read_text(), re.MULTILINE))
        for figure in said.values():
            assert figure in comment
    text = (ROOT / "docs" / "scaling.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| [{name}]"))
    cells = [cell.strip() for cell in row.split("|")]
    assert f"{count / 1e6:,.1f}M" in cells
    assert [f"{memory.lanes}", f"{memory.total / GIB:.1f}", share] == cells[6:9]
    assert [f"{round(rate, -3):,.0f}", f"{hours:.1f}"] == cells[9:11]


def test_memory_is_what_an_h200_took() -> None:
    """Steps of the card with layers of `attention`: what the allocator had reserved, when the loss
    still held the logits of all tokens, and their gradients."""
    file = ROOT / "docs" / "results" / "train_throughput_wide_gpt.json"
    rows = [r for r in json.loads(file.read_text())["rows"] if r["contestant"] == "engine"]
    assert len(rows) == 3
    for row in rows:
        lanes = int(row["shape"].split()[0])
        values = {"model.layers": "12xrwkv,2xattention", "train.lanes": lanes}
        settings = Settings().with_values(**values)
        memory = memory_estimate(settings, row["parameters"], 1, 140 * GIB)
        assert memory.lanes == lanes
        of_loss = sum(memory.fixed[what] for what in list(memory.fixed)[-2:])
        logits = 4 * lanes * 8 * 512 * 32_000
        total = memory.total - of_loss + logits
        assert total / GIB == pytest.approx(row["memory_gib"], rel=0.01)


@given(st.integers(1, 64), st.integers(1, 8), st.floats(0, 100), st.integers(1, 10**9))
def test_as_many_lanes_as_fit(lanes: int, ranks: int, capacity: float, count: int) -> None:
    settings = TINY.with_values(**{"train.lanes": lanes * ranks})
    memory = memory_estimate(settings, count, ranks, capacity * GIB)
    parts = [*memory.fixed.values(), *(memory.lanes * size for size in memory.lane.values())]
    assert memory.total == pytest.approx(sum(parts))
    assert lanes % memory.lanes == 0
    most = MEMORY_SHARE * capacity * GIB
    assert memory.lanes == 1 or memory.total <= most
    larger = [n for n in range(memory.lanes + 1, lanes + 1) if lanes % n == 0]
    assert all(memory._replace(lanes=n).total > most for n in larger)


def test_more_ranks_share_the_optimizer_only() -> None:
    one, many = (memory_estimate(TINY, 10**6, ranks, H100.memory) for ranks in (1, 4))
    shared = {name for name, size in one.fixed.items() if size and many.fixed[name] == size / 4}
    assert shared == {"weights, fp32, 1/ranks", "optimizer, fp32, 1/ranks"}
    others = one.fixed.keys() - shared - {REDUCED}
    assert all(many.fixed[name] == one.fixed[name] for name in others)
    assert many.lane == one.lane


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "accumulation", "tensors"),
    [(1, 12, 1, 0), (1, 6, 1, 1), (1, 12, 2, 1), (4, 3, 1, 1), (4, 1, 1, 2), (4, 3, 2, 2)],
)
def test_several_micro_batches_need_the_sum_of_the_earlier_ones(
    ranks: int, micro_batch: int, accumulation: int, tensors: int
) -> None:
    """And several ranks their part of each, which on one rank is the whole one."""
    values = {"train.micro_batch": micro_batch, "train.accumulation": accumulation}
    memory = memory_estimate(TINY.with_values(**values), 10**6, ranks, H100.memory)
    assert memory.fixed[REDUCED] == tensors * 4e6 / ranks


def test_a_long_document_is_a_batch_without_beginnings() -> None:
    """In which every chunk has all of its history."""
    model = TINY.with_values(**{"model.chunk_length": 40, "model.history_chunks": 3}).model
    tokens = torch.full((2, 4, model.chunk_length), 5)
    batch = Batch(tokens, tokens, torch.full((2, 4), 9))
    assert seen_in(batch, 2, model.history_chunks) == seen_in_a_long_document(model)
    tokens[0, 1, 7] = 2
    some, most = seen_in(batch, 2, model.history_chunks), seen_in_a_long_document(model)
    assert all(a < b for a, b in zip(some, most, strict=True))


@given(st.integers(8, 4096), st.integers(8, 4096))
def test_a_wider_model_reaches_no_smaller_share(a: int, b: int) -> None:
    assert 0 < share_of_peak(min(a, b)) <= share_of_peak(max(a, b)) <= 0.45


def test_speed_is_the_share_of_the_peak() -> None:
    model = meta_model(TINY)
    rate = tokens_per_second(TINY, model, H100)
    assert rate is not None
    assert rate * flops_per_token(TINY, model) == pytest.approx(0.45 * 0.016 * 989.4e12)
    assert tokens_per_second(TINY, model, Gpu("new", None, 1.0)) is None


@pytest.mark.parametrize(
    ("gpu", "names"),
    [
        (None, ["2 x NVIDIA H100 80GB"]),
        (Gpu("NVIDIA H100 PCIe", 756.5e12, 8e10), ["2 x NVIDIA H100 PCIe", "2 x NVIDIA H100 80GB"]),
        (Gpu("Tesla T4", None, GIB / 2), ["Tesla T4, of unknown peak", "2 x NVIDIA H100 80GB"]),
    ],
)
def test_speed_is_said_of_the_gpu_present_and_of_an_h100(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpu: Gpu | None,
    names: list[str],
) -> None:
    monkeypatch.setattr(summary, "present_gpu", lambda: gpu)
    settings = TINY.with_values(**{"train.steps": 50, "train.lanes": 12})
    total = 50 * tokens_per_step(settings)
    summary.print_tables(settings, 2, data_tokens=total // 4)
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    speeds = [row for row in rows if len(row) == 5]
    assert [row[0] for row in speeds] == names
    rate = tokens_per_second(settings, meta_model(settings), H100)
    assert rate is not None
    hours = f"{total / (2 * rate) / 3600:,.2f}"
    assert speeds[-1][1:] == ["989.4", f"{0.45 * 0.016:.0%}", f"{2 * rate:,.0f}", hours]
    assert f"tokens_total={total} (4.00 epochs of the data)\n" in said
    full = gpu is not None and gpu.memory < GIB
    assert ("That is more than the 0.5 GiB of one Tesla T4." in said) == full


def test_memory_is_a_sum() -> None:
    assert Memory({"a": 1.0, "b": 2.0}, {"c": 10.0, "d": 20.0}, 3).total == 93.0
