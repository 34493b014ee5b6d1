"""What history gains in a validation."""

from typing import Any

from i3dist.inference.evaluate import Evaluation

# Nats per token that history must gain to count as used.
USED_GAIN = 0.001
# A gain of which another document's history keeps more than this share is not memory.
KEPT_BY_OTHER = 0.5


def history_gain(result: Evaluation) -> float | None:
    """Nats per token by which history lowers the loss; None if no chunk may have history."""
    return _mean_gain(result, "loss")


def other_history_gain(result: Evaluation) -> float | None:
    """What is left of `history_gain` with another document's history; None if not measured."""
    return _mean_gain(result, "loss_other_history")


def validation_metrics(result: Evaluation) -> dict[str, Any]:
    """A line of validation.jsonl."""
    return {
        **result.to_dict(),
        "history_gain": history_gain(result),
        "other_history_gain": other_history_gain(result),
    }


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


def _mean_gain(result: Evaluation, loss: str) -> float | None:
    """Mean over tokens of the loss without history minus another, of chunks that may have history.

    None if there are no such chunks, or one whose loss is not known.
    """
    later = [chunk for chunk in result.by_chunk if chunk.index > 0]
    losses = [getattr(chunk, loss) for chunk in later]
    if not later or None in losses:
        return None
    pairs = zip(later, losses, strict=True)
    gained = sum((chunk.loss_without_history - x) * chunk.tokens for chunk, x in pairs)
    return float(gained / sum(chunk.tokens for chunk in later))
