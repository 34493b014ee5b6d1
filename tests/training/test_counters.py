"""Counters and what is printed of them, against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i3dist.config import ModelSettings, Settings
from i3dist.data.lanes import Batch
from i3dist.inference.evaluate import ChunkLoss, Evaluation
from i3dist.tracking import metrics
from i3dist.tracking.metrics import Interval, StepCounts, count_step, perplexity, report_line
from i3dist.training import summary
from i3dist.training.summary import count_parameters, memory_estimate, tokens_per_step

PAD, NONE = 1, -100
CARD = Settings().with_values(**{"train.lanes": 4})
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
TOTAL = 339_237_770


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
    monkeypatch.setattr(metrics.collectives, "all_sum", lambda part: part + 2**26 + 2 * part)
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
    """Speed over all its steps, pauses left out and waiting not; the rest of its last step."""
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    interval = Interval()
    for step in (1, 2, 3):
        with interval.waiting():
            clock.now += 0.5
        clock.now += 1.5
        interval.add(10.0 * step, counts(5, 100 * step, 4, 30 * step), 0.25 * step)
        with interval.stopped_clock():
            clock.now += 1000.0
    assert interval.metrics(0.5) == {
        "loss": pytest.approx(30 / 5),
        "perplexity": pytest.approx(math.exp(6)),
        "gradient_norm": 0.75,
        "tokens_per_second": pytest.approx(600 / 6.0),
        "step_time": pytest.approx(2.0),
        "data_wait": pytest.approx(1.5 / 6.0),
        "active_latents": pytest.approx(90 / 4),
        "gate": 0.5,
    }
    assert interval.metrics(0.0)["active_latents"] == 0, "nobody sees them behind a closed gate"
    assert interval.metrics(1e-9)["active_latents"] == pytest.approx(90 / 4)


def test_a_step_of_padding_alone_has_a_loss_of_0() -> None:
    interval = Interval()
    interval.add(0.0, counts(0, 0, 0, 0), 0.0)
    figures = interval.metrics(1.0)
    assert (figures["loss"], figures["perplexity"], figures["active_latents"]) == (0, 1, 0)


@given(loss=st.floats(-50, 699))
def test_perplexity_is_e_to_the_loss(loss: float) -> None:
    assert perplexity(loss) == pytest.approx(math.e**loss, rel=1e-9)


def test_perplexity_does_not_overflow() -> None:
    assert math.isfinite(perplexity(1e9)) and perplexity(701.0) == perplexity(1e9)
    assert math.isnan(perplexity(math.nan))


def test_a_report_says_what_was_measured() -> None:
    figures = {
        "loss": 3.14159,
        "learning_rate": 0.00012345,
        "gradient_norm": 0.987,
        "gate": 0.254,
        "active_latents": 127.6,
        "tokens_per_second": 12345.6,
        "step_time": 0.0123,
    }
    assert report_line(7, 1000, figures) == (
        "step    7/1000  loss 3.1416  lr 1.23e-04  norm 0.99  gate 0.25  latents 128  "
        "12,346 tok/s  12 ms/step"
    )


def test_the_printed_gain_is_the_mean_over_tokens_that_may_have_history() -> None:
    """(30 x 0.5 + 10 x 0.1) / 40; of the other document's (30 x -0.3 + 10 x 0.02) / 40."""
    chunks = [
        ChunkLoss(0, 1000, 4.0, 9.0, 7.0),
        ChunkLoss(1, 30, 3.0, 3.5, 3.8),
        ChunkLoss(7, 10, 2.9, 3.0, 2.98),
    ]
    result = Evaluation(3.5, 33.125, 1.25, 1040, chunks)
    assert metrics.history_gain(result) == pytest.approx(0.4)
    assert metrics.validation_line(300, result) == (
        "validation at step 300: loss 3.5000  perplexity 33.12  bits/byte 1.2500  "
        "history gain +0.4000 nats, another document's -0.2200"
    )


def by_hand(model: ModelSettings, heads: int, records: int) -> dict[str, int]:
    """Parameters by part, from the formulas of the paper and of docs, with all small vectors."""
    d, vocab, mult = model.d_model, model.vocab, model.ff_mult
    norm = 2 * d  # weight and bias
    time_mix = 4 * d * d + 3 * d + 2 * d  # projections; three mixes; decay and bonus
    channel_mix = (2 * mult + 1) * d * d + 2 * d
    keys, part = model.latents * records, d // records
    ages = heads * model.history_chunks
    return {
        "embedding": vocab * d,
        "rwkv": model.layer_kinds.count("rwkv") * (time_mix + channel_mix + 2 * norm),
        "compressor": 2 * mult * d * d
        + 4 * d * part  # query, key, record and back
        + model.latents * d
        + d  # router
        + 2 * norm
        + 2 * part,
        "slots": keys * d,
        "attention": model.layer_kinds.count("attention")
        * ((4 + 2 * mult) * d * d + ages * d + ages + 2 * norm),
        "head": vocab * d,
        "norms": 2 * norm,
    }


@pytest.mark.parametrize(("settings", "heads", "records"), [(CARD, 10, 4), (SMALL, 4, 2)])
def test_parameters_are_those_of_the_formulas(settings: Settings, heads: int, records: int) -> None:
    assert count_parameters(settings) == by_hand(settings.model, heads, records)


def test_the_card_has_so_many_parameters() -> None:
    assert sum(count_parameters(CARD).values()) == TOTAL


def test_tokens_of_a_step() -> None:
    assert tokens_per_step(CARD) == 16_384
    assert tokens_per_step(SMALL) == 12 * 5 * 7 * 16


def test_memory_of_a_rank_by_hand() -> None:
    """The card on one GPU: 19.5 GiB, as was measured on an H200."""
    sizes = list(memory_estimate(CARD, TOTAL, 1).values())
    tokens = 4 * 8 * 512
    assert sizes == [
        4 * TOTAL,  # weights and gradients of 2 bytes
        4 * TOTAL,
        12 * TOTAL,  # three tensors of 4 bytes
        2 * tokens * 1180 * (12 * 22 + 2 * 20 + 7),
        4 * tokens * 32_000,  # logits and their gradient, of 2 bytes
    ]
    assert sum(sizes) / 2**30 == pytest.approx(19.47, abs=0.01)


@pytest.mark.parametrize(("micro_batch", "rows"), [("auto", 3), (1, 1)])
def test_memory_on_several_ranks(micro_batch: int | str, rows: int) -> None:
    """12 lanes on 4 ranks: what ZeRO shares out is a fourth, and a rank computes 3 lanes or 1."""
    settings = SMALL.with_values(**{"train.micro_batch": micro_batch})
    sizes = list(memory_estimate(settings, 1000, 4).values())
    tokens = rows * 7 * 16
    activations = 2 * tokens * 24 * (3 * 22 + 1 * 20 + 7)
    assert sizes == [4000, 4000, 3000, activations, 4 * tokens * 50]


def test_the_summary_prints_what_was_computed(capsys: pytest.CaptureFixture[str]) -> None:
    summary.print_summary(SMALL, 4)
    said = capsys.readouterr().out
    parts = by_hand(SMALL.model, 4, 2)
    total = sum(parts.values())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    for part, count in parts.items():
        assert [part, f"{count:,}", f"{count / total:.1%}"] in rows
    assert ["total", f"{total:,}", ""] in rows
    sizes = memory_estimate(SMALL, total, 4)
    for what, size in [*sizes.items(), ("total", sum(sizes.values()))]:
        assert [what, f"{size / 2**30:.2f}"] in rows
    for name, value in SMALL.flat().items():
        assert [name, str(value)] in rows
    assert "tokens_per_step=6720 (12 lanes x 5 windows x 7 chunks x 16 tokens, 4 ranks)" in said
    assert said.endswith(f"parameters_total={total}\n")


@pytest.mark.parametrize(
    ("off_steps", "steps", "warned"),
    [(1220, 6104, True), (1221, 6104, False), (1220, 6103, False), (0, 10**6, True)],
)
def test_an_early_history_is_one_before_20m_tokens_of_100m(
    off_steps: int, steps: int, warned: bool
) -> None:
    """At 16,384 tokens a step 1,221 steps are 20M tokens, and 6,104 are 100M."""
    settings = CARD.with_values(**{"compression.off_steps": off_steps, "train.steps": steps})
    note = summary.early_history(settings)
    assert (note is not None) == warned
    if note is not None:
        assert f"after {off_steps} steps, {off_steps * 16384 / 1e6:.1f}M tokens" in note
        assert "compression.off_steps=2002" in note
