"""Counters and what is printed of them, against values worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i3dist.config import ModelSettings, Settings
from i3dist.data.lanes import Batch, StepCounts
from i3dist.distributed import collectives
from i3dist.inference.evaluate import ChunkLoss, Evaluation
from i3dist.ops.cross_entropy import slice_rows
from i3dist.tracking import history, interval, report
from i3dist.tracking.interval import Figures, Interval
from i3dist.tracking.metrics import measure, perplexity
from i3dist.tracking.mfu import H100
from i3dist.training import summary
from i3dist.training.counts import count_step
from i3dist.training.estimate import fixed_memory, memory_estimate
from i3dist.training.startup import decide
from i3dist.training.summary import count_parameters, tokens_per_step

PAD, NONE = 1, -100
CARD = decide(Settings(), 1, 32_000)
SMALL = Settings().with_values(
    **{
        "model.vocab_size": 50,
        "model.d_model": 24,
        "model.layers": "3xrwkv,1xattention",
        "model.heads": 4,
        "model.ff_mult": 3,
        "model.chunk_length": 16,
        "model.latents": 4,
        "model.sub_latents": 2,
        "model.history_chunks": 5,
        "train.lanes": 12,
        "train.accumulation": 5,
        "train.window_chunks": 7,
    }
)
TOTAL = 340_305_690
LITERAL = CARD.with_values(**{"model.compressor": "literal"})


def test_a_steps_counts_are_those_of_its_windows() -> None:
    """Two windows of two lanes of two chunks of three tokens; history reaches 4 chunks back."""
    one = Batch(
        torch.tensor([[[2, 8, 9], [9, PAD, PAD]], [[PAD, PAD, PAD], [7, 7, 7]]]),
        torch.tensor([[[8, 9, 9], [NONE, NONE, NONE]], [[NONE] * 3, [7, 7, 2]]]),
        torch.tensor([[0, 1], [0, 3]]),
    )
    other = Batch(
        torch.tensor([[[7, 7, 7], [7, 7, 3]], [[PAD, PAD, PAD], [PAD, PAD, PAD]]]),
        torch.tensor([[[7, 7, 7], [7, 3, NONE]], [[NONE] * 3, [NONE] * 3]]),
        torch.tensor([[4, 9], [0, 0]]),
    )
    model = ModelSettings(history_chunks=4, latents=5)
    counts = count_step([one, other], PAD, model)
    assert counts.targets == 3 + 0 + 0 + 3 + 3 + 2
    assert counts.tokens == 3 + 1 + 0 + 3 + 3 + 3
    assert counts.chunks == 5
    assert counts.latents == 5 * (0 + 1 + 0 + 3 + 4 + 4)
    assert {count.dtype for count in counts} == {torch.float64}


def test_a_steps_counts_are_summed_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many on two other ranks; counted to the last one above what fp32 holds."""
    batch = Batch(torch.full((1, 1, 3), 7), torch.full((1, 1, 3), 7), torch.tensor([[2]]))
    monkeypatch.setattr(collectives, "all_sum", lambda part: part + 2**26 + 2 * part)
    counts = count_step([batch], PAD, ModelSettings(history_chunks=4, latents=5))
    assert [int(count) - 2**26 for count in counts] == [9, 9, 3, 30]


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def perf_counter(self) -> float:
        return self.now


def counts(targets: int, tokens: int, chunks: int, latents: int) -> StepCounts:
    return StepCounts(*(torch.tensor(float(n)) for n in (targets, tokens, chunks, latents)))


def test_an_intervals_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed, without pauses, and mean loss are over all its steps; the rest is of its last step."""
    half = half_open()
    clock = Clock()
    monkeypatch.setattr(interval, "time", clock)
    counted = Interval()
    for step in (1, 2, 3):
        with counted.waiting():
            clock.now += 0.5
        clock.now += 1.5
        counted.add(10.0 * step, counts(5, 100 * step, 4, 30 * step), 0.25 * step)
        with counted.stopped_clock():
            clock.now += 1000.0
    assert measure(counted.figures(3, half, 7, 1)) == {
        "loss": pytest.approx(30 / 5),
        "mean_loss": pytest.approx((10 + 20 + 30) / 15),
        "perplexity": pytest.approx(math.exp(6)),
        "gradient_norm": 0.75,
        "tokens_per_second": pytest.approx(600 / 6.0),
        "step_time": pytest.approx(2.0),
        "data_wait": pytest.approx(1.5 / 6.0),
        "active_latents": pytest.approx(90 / 4),
        "gate": 0.5,
        "joined": 0.0,
        "learning_rate": half.optimizer.lr_at(2),
        "tokens_seen": 7,
        "skipped_steps": 1,
        "elapsed": pytest.approx(3006.0),
    }
    assert counted.figures(3, half, 7, 1).eta == pytest.approx(3006.0 / 3 * 17)

    closed = measure(counted.figures(1, half, 7, 1))
    assert closed["gate"] == closed["active_latents"] == 0, "nobody sees them behind a closed gate"
    barely = half.with_values(**{"compression.ramp_steps": 10**9})
    assert measure(counted.figures(3, barely, 7, 1))["active_latents"] == pytest.approx(90 / 4)


def test_an_interval_begins_where_the_last_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the run's own clock, and with it the pace, goes on."""
    clock = Clock()
    monkeypatch.setattr(interval, "time", clock)
    counted = Interval()
    for step in (1, 2):
        clock.now += 10.0 * step
        counted.add(8.0 * step, counts(4, 6, 1, 0), 1.0)
        counted.restart()
        clock.now += 5.0
    clock.now += 3.0
    counted.add(12.0, counts(4, 6, 1, 0), 1.0)
    figures = counted.figures(3, half_open(), 18, 0)
    assert (figures.mean_loss, figures.tokens, figures.steps_taken) == (3.0, 6, 1)
    assert (figures.seconds, figures.elapsed) == (8.0, 43.0)
    assert figures.eta == pytest.approx(43.0 / 3 * 17)


def test_a_mean_loss_leaves_out_steps_that_are_not_finite() -> None:
    counted = Interval()
    for loss_sum in (4.0, math.nan, math.inf, 8.0):
        counted.add(loss_sum, counts(4, 6, 1, 0), 1.0)
    assert counted.figures(4, half_open(), 18, 2).mean_loss == pytest.approx(1.5)


def half_open() -> Settings:
    """20 steps; history off for 2, then the gate is 1/2."""
    changes = {"train.steps": 20, "compression.off_steps": 2, "compression.ramp_steps": 2}
    return CARD.with_values(**changes, **{"optimizer.decay_steps": 200})


def test_a_step_of_padding_alone_has_a_loss_of_0() -> None:
    counted = Interval()
    counted.add(0.0, counts(0, 0, 0, 0), 0.0)
    figures = measure(counted.figures(3, half_open(), 0, 0))
    assert (figures["loss"], figures["perplexity"], figures["active_latents"]) == (0, 1, 0)
    assert figures["mean_loss"] == 0


def some_figures(**changes: float) -> Figures:
    """Of an interval on a GPU of 10 PFLOP/s."""
    counted = Interval()
    counted.add(0.0, counts(1, 1, 1, 1), 0.0)
    usual = {"flops_per_token": 2e9, "peak_flops": 1e16, "tokens": 1e6, "seconds": 0.5}
    return replace(counted.figures(1, half_open(), 0, 0), **{**usual, **changes})


@given(loss=st.floats(-50, 699))
def test_perplexity_is_e_to_the_loss(loss: float) -> None:
    assert perplexity(some_figures(loss=loss)) == pytest.approx(math.e**loss, rel=1e-9)


def test_perplexity_does_not_overflow() -> None:
    most = perplexity(some_figures(loss=1e9))
    assert math.isfinite(most) and perplexity(some_figures(loss=701.0)) == most
    assert math.isnan(perplexity(some_figures(loss=math.nan)))


def test_a_report_says_what_was_measured() -> None:
    figures = some_figures(
        step=7,
        steps=1000,
        mean_loss=3.14159,
        loss=9.0,
        learning_rate=0.00012345,
        gradient_norm=0.987,
        tokens=12345.6,
        seconds=1.0,
        elapsed=725.0,
        eta=3900.0,
        flops_per_token=3e11,
    )
    before = "step    7/1000  loss 3.1416  lr 1.2e-04  norm 0.99  12.3k tok/s  "
    after = "time 12m05s  ETA  1h05m"
    assert report.report_line(figures) == f"{before}MFU 37%  {after}"
    assert report.report_line(replace(figures, peak_flops=None)) == before + after
    longest = replace(figures, step=20_000, steps=20_000, tokens=263_300.0, flops_per_token=2e10)
    assert len(report.report_line(longest)) <= 100


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.9, "    0s"),
        (59.9, "   59s"),
        (60, " 1m00s"),
        (3599, "59m59s"),
        (3600, " 1h00m"),
        (86_399, "23h59m"),
        (86_400, " 1d00h"),
        (99 * 86_400 + 7200, "99d02h"),
    ],
)
def test_a_duration_takes_six_columns(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "    0"), (999.4, "  999"), (1e3, " 1.0k"), (263_300.0, " 263k"), (12.34e6, "12.3M")],
)
def test_a_speed_takes_five_columns(number: float, text: str) -> None:
    line = report.report_line(some_figures(tokens=number, seconds=1.0))
    assert f"  {text} tok/s  " in line


def test_the_printed_gain_is_the_mean_over_tokens_that_may_have_history() -> None:
    """(30 x 0.5 + 10 x 0.1) / 40; of the other document's (30 x -0.3 + 10 x 0.02) / 40."""
    chunks = [
        ChunkLoss(0, 1000, 4.0, 9.0, 7.0, 1.0),
        ChunkLoss(1, 30, 3.0, 3.5, 3.8, 1.0),
        ChunkLoss(7, 10, 2.9, 3.0, 2.98, 1.0),
    ]
    result = Evaluation(3.5, 33.125, 1.25, 1040, chunks)
    assert history.history_gain(result) == pytest.approx(0.4)
    assert report.validation_line(300, 20_000, result) == (
        "eval   300/20000  loss 3.5000  bits/byte 1.2500  "
        "history gain +0.4000 (another document's -0.2200)"
    )


def by_hand(model: ModelSettings, heads: int, records: int) -> dict[str, int]:
    """Parameters by part, from the formulas of the paper and of docs, with all small vectors.

    With 0 records: of the literal compressor.
    """
    d, vocab, mult = model.d_model, model.vocab, model.ff_mult
    norm = 2 * d  # weight and bias
    time_mix = 4 * d * d + 3 * d + 2 * d  # projections; three mixes; decay and bonus
    channel_mix = (2 * mult + 1) * d * d + 2 * d
    keys, part = model.latents * max(1, records), d // max(1, records)
    literal = (4 + 2 * mult) * d * d + model.latents * d + 3 * norm
    ages = heads * model.history_chunks
    kind = model.layer_kinds[-1]
    upper = model.layer_kinds.count(kind)
    dual = kind == "dual-attention"
    views, reserve = (2 * upper, heads * d + heads) if dual else (1, 0)
    return {
        "embedding": vocab * d,
        "rwkv": model.layer_kinds.count("rwkv") * (time_mix + channel_mix + 2 * norm),
        "compressor": literal
        if not records
        else 2 * mult * d * d
        + (3 + views) * d * part  # query, key, record, and back for each view
        + model.latents * d
        + d  # router
        + 2 * norm
        + 2 * part,
        "slots": keys * d,
        kind: upper * ((4 + 2 * mult) * d * d + ages * d + ages + 2 * norm + reserve),
        "head": vocab * d,
        "norms": 2 * norm,
    }


@pytest.mark.parametrize(
    ("settings", "heads", "records"), [(CARD, 10, 4), (SMALL, 4, 2), (LITERAL, 10, 0)]
)
def test_parameters_are_those_of_the_formulas(settings: Settings, heads: int, records: int) -> None:
    assert count_parameters(settings) == by_hand(settings.model, heads, records)


def test_the_card_has_so_many_parameters() -> None:
    assert sum(count_parameters(CARD).values()) == TOTAL


def test_tokens_of_a_step() -> None:
    assert tokens_per_step(CARD) == 16_384
    assert tokens_per_step(SMALL) == 12 * 5 * 7 * 16


def test_memory_of_a_rank_by_hand() -> None:
    """Of the card on one GPU."""
    memory = memory_estimate(CARD, TOTAL, 1, H100.memory)
    tokens = 8 * 512
    weights = [2 * TOTAL, 2 * TOTAL, 4 * TOTAL, 0, 4 * TOTAL, 8 * TOTAL]
    assert list(memory.fixed.values()) == [*weights, 2 * 2**14 * 32_000, 4 * 32_000 * 1180]
    assert list(memory.lane.values()) == [2 * tokens * 1180 * (12 * 22 + 2 * 23 + 7)]
    assert memory.lanes == 4


@pytest.mark.parametrize(("micro_batch", "lanes"), [("auto", 3), (1, 1)])
def test_memory_on_several_ranks(micro_batch: int | str, lanes: int) -> None:
    """12 lanes on 4 ranks: what ZeRO shares out is a fourth, and a rank computes 3 lanes or 1."""
    settings = SMALL.with_values(**{"train.micro_batch": micro_batch})
    memory = memory_estimate(settings, 1000, 4, H100.memory)
    tokens = 7 * 16
    activations = 2 * tokens * 24 * (3 * 22 + 1 * 20 + 7)
    slice_ = 2 * slice_rows(50, on_gpu=True) * 50
    held = [2000, 2000, 4000, 2 * 1000, 1000, 2000]  # five windows a step: sums are kept
    assert list(memory.fixed.values()) == [*held, slice_, 4 * 50 * 24]
    assert list(memory.lane.values()) == [activations]
    assert memory.lanes == lanes
    lion = settings.with_values(**{"optimizer.kind": "lion"})
    assert fixed_memory(lion, 1000, 4, 3)["optimizer, fp32, 1/ranks"] == 1000


def test_the_summary_prints_what_was_computed(capsys: pytest.CaptureFixture[str]) -> None:
    summary.print_tables(SMALL, 4)
    said = capsys.readouterr().out
    parts = by_hand(SMALL.model, 4, 2)
    total = sum(parts.values())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    for part, count in parts.items():
        assert [part, f"{count:,}", f"{count / total:.1%}"] in rows
    assert ["total", f"{total:,}", ""] in rows
    memory = memory_estimate(SMALL, total, 4, H100.memory)
    for what, size in [*memory.fixed.items(), ("total", memory.total)]:
        assert [what, "", f"{size / 2**30:.2f}"] in rows
    for what, size in memory.lane.items():
        one, all_three = f"{size / 2**30:.2f}", f"{3 * size / 2**30:.2f}"
        assert [f"{what}, 3 lanes at once", one, all_three] in rows
    for name, value in SMALL.flat().items():
        assert [name, str(value)] in rows
    assert "tokens_per_step=6720 (12 lanes x 5 windows x 7 chunks x 16 tokens, 4 ranks)" in said
    assert said.endswith(f"parameters_total={total}\n")
