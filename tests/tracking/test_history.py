"""What a validation says about history."""

import sys
from pathlib import Path

import pytest

from i3dist.inference.evaluate import ChunkLoss, Evaluation
from i3dist.tracking.history import (
    history_gain,
    history_warning,
    other_history_gain,
    validation_metrics,
)
from i3dist.tracking.report import progress_bar, validation_line


def evaluation(*chunks: tuple[float, float, float | None]) -> Evaluation:
    """Losses with history, without and with another's of chunk 0, 1, ...; more tokens the later."""
    by_chunk = [ChunkLoss(i, 10 * (i + 1), *losses, 1.0) for i, losses in enumerate(chunks)]
    return Evaluation(3.0, 20.0, 1.0, sum(c.tokens for c in by_chunk), by_chunk)


def test_gains_are_means_over_tokens_of_later_chunks() -> None:
    result = evaluation((3.0, 9.0, 9.0), (2.0, 2.5, 2.4), (2.0, 3.0, 2.5))
    assert history_gain(result) == pytest.approx((20 * 0.5 + 30 * 1.0) / 50)
    assert other_history_gain(result) == pytest.approx((20 * 0.1 + 30 * 0.5) / 50)


@pytest.mark.parametrize(
    ("with_history", "other", "says"),
    [
        (2.9995, 3.0, "not used (yet): it gains +0.0005 nats"),
        (3.2, 3.0, "not used (yet): it gains -0.2000 nats"),
        (2.9, 2.94, "not memory: with another document's history +0.0600 of +0.1000 nats"),
        (2.9, 2.96, None),
        (2.9, 3.1, None),
        (2.9, None, None),
        (3.0, None, "not used"),
    ],
)
def test_a_history_that_is_no_memory_is_named(
    with_history: float, other: float | None, says: str | None
) -> None:
    line = history_warning(evaluation((3.0, 3.0, 3.0), (with_history, 3.0, other)))
    assert (line is None) if says is None else (says in line and "\n" not in line)


def test_documents_of_one_chunk_say_nothing_about_history() -> None:
    result = evaluation((3.0, 3.0, 3.0))
    assert history_warning(result) is None
    assert history_gain(result) is None
    assert other_history_gain(result) is None


def test_a_logged_validation_has_both_gains_and_all_that_it_had() -> None:
    result = evaluation((3.0, 3.0, 3.0), (2.9, 3.0, 2.97))
    logged = validation_metrics(result)
    assert logged == {
        **result.to_dict(),
        "history_gain": pytest.approx(0.1),
        "other_history_gain": pytest.approx(0.03),
    }
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "by_chunk"} < set(logged)
    without = validation_metrics(evaluation((3.0, 3.0, None), (2.9, 3.0, None)))
    assert without["history_gain"] == pytest.approx(0.1) and without["other_history_gain"] is None


def test_the_line_of_a_validation_has_both_gains() -> None:
    both = validation_line(7, 10, evaluation((3.0, 3.0, 3.0), (2.9, 3.0, 2.97)))
    assert both.endswith("history gain +0.1000 (another document's +0.0300)")
    one = validation_line(7, 10, evaluation((3.0, 3.0, None), (2.9, 3.0, None)))
    assert one.endswith("history gain +0.1000")
    none = validation_line(7, 10, evaluation((3.0, 3.0, None)))
    assert none == "eval  7/10  loss 3.0000  bits/byte 1.0000"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_a_terminal_only(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "err").open("w+") as stream:
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress_bar(iter([1, 2, 3]), 3)) == [1, 2, 3]  # type: ignore[list-item]
        stream.seek(0)
        assert ("evaluating" in stream.read()) == terminal
