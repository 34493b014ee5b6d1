"""What history gains in a validation."""

from typing import Any

from i3dist.inference.evaluate import ChunkLoss, Evaluation

# Nats per token that history must gain to count as used.
USED_GAIN = 0.001
# A gain of which another document's history keeps more than this share is not memory.
KEPT_BY_OTHER = 0.5


def history_gain(result: Evaluation) -> float | None:
    """Nats per token by which history lowers the loss; None if no chunk may have history."""
    later = _later_chunks(result)
    return _mean_gain(later, [chunk.loss for chunk in later])


def other_history_gain(result: Evaluation) -> float | None:
    """What is left of `history_gain` with another document's history; None if not measured."""
    later = _later_chunks(result)
    losses = [c.loss_other_history for c in later if c.loss_other_history is not None]
    return _mean_gain(later, losses) if len(losses) == len(later) else None


def validation_metrics(result: Evaluation) -> dict[str, Any]:
    """A line of validation.jsonl."""
    gains = {
        "history_gain": history_gain(result),
        "other_history_gain": other_history_gain(result),
    }
    return {**result.to_dict(), **gains}


def history_warning(result: Evaluation) -> str | None:
    """One line if a model that is trained with history makes no use of it, else None."""
    gain, other = history_gain(result), other_history_gain(result)
    if gain is None:
        return None
    if gain < USED_GAIN:
        return f"history is not used (yet): it gains {gain:+.4f} nats per token"
    if other is not None and other > KEPT_BY_OTHER * gain:
        return (
            f"the gain from history is not memory: with another document's history {other:+.4f} "
            f"of {gain:+.4f} nats per token remain"
        )
    return None


def _later_chunks(result: Evaluation) -> list[ChunkLoss]:
    """Those that may have history."""
    return [chunk for chunk in result.by_chunk if chunk.index > 0]


def _mean_gain(chunks: list[ChunkLoss], losses: list[float]) -> float | None:
    """Mean over tokens of the loss without history minus `losses`, one per chunk."""
    if not chunks:
        return None
    pairs = zip(chunks, losses, strict=True)
    gained = sum((chunk.loss_without_history - loss) * chunk.tokens for chunk, loss in pairs)
    return gained / sum(chunk.tokens for chunk in chunks)
