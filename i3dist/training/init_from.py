"""Beginning a run with trained weights: `train.init_from`."""

import logging
from typing import Any, Literal

from i3dist.checkpoint.weights import SavedModel
from i3dist.cli.layer_pattern import write_layers
from i3dist.config import ModelSettings, Settings
from i3dist.data.corpus import Corpus
from i3dist.errors import UserError
from i3dist.model.layers import adjust_heads
from i3dist.model.lm import I3LM, Unfilled
from i3dist.training.continuing import fill

# Weights fit models with any value of these.
FREE = ("chunk_length", "state_carry")

log = logging.getLogger(__name__)


def initial_weights(settings: Settings, corpus: Corpus | None) -> SavedModel | None:
    """The model that a new run takes its weights from, if it takes any.

    Args:
        settings: the run's.
        corpus: the run's data; None if there are none, as a dry run allows: then a line says what
            is not checked.

    Raises:
        UserError: there is no such model, it has another tokenizer or other shapes, or it lies in
            the run's folder.
    """
    path, run = settings.train.init_from, settings.run.path
    if path is None:
        return None
    if path.resolve().is_relative_to(run.resolve()):
        raise UserError(
            f"train.init_from={path} lies in run.path={run}, which a new run sets aside: choose "
            "another run.path"
        )
    try:
        saved = SavedModel.find(path)
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from None
    if corpus is None:
        log.info("train.init_from=%s: whether the data have its tokenizer is not known", path)
    elif not saved.tokenizer.encodes_like(corpus.tokenizer):
        raise UserError(
            f"train.init_from={path} was trained with another tokenizer than that of "
            f"data.path={settings.data.path}: prepare the data with data_prep/shard.py "
            f"--tokenizer {saved.tokenizer.path}"
        )
    filled = fill(settings, {"model.vocab_size": saved.tokenizer.vocab_size})
    if fault := _unlike(saved.settings.model, filled.model):
        raise UserError(f"train.init_from={path} does not fit: {fault}")
    return saved


def join_after(weights: SavedModel, steps: int) -> int | Literal["never"]:
    """The `compression.join_after` with which the first step has the share j of its weights.

    Args:
        weights: that the run begins with.
        steps: over which j rises from 0 to 1.
    """
    return 1 - max(1, round(weights.joined * steps)) if weights.joined else "never"


def history_is_off(settings: Settings) -> str | None:
    """A note for a run that begins with trained weights but without history; else None."""
    if settings.compression.gate_at(0) > 0.0:
        return None
    return (
        f"note: history is off for {settings.compression.off_steps} steps; weights that have "
        "learned to read it need no such beginning: compression.off_steps=0 "
        "compression.ramp_steps=0"
    )


def joined_otherwise(settings: Settings, saved: SavedModel) -> str | None:
    """A note for a run that begins with weights whose softmaxes were one to another share j."""
    ours, steps = settings.compression.joined_at(0), settings.compression.join_steps
    assert steps != "auto", "compression.join_steps is not resolved"
    goes_on = abs(ours - saved.joined) <= (1 / steps if steps > 1 else 0)  # or a step beyond
    if goes_on or "dual-attention" not in settings.model.layer_kinds:
        return None
    return (
        f"note: the weights' two softmaxes were one to a share of {saved.joined:.3g}, and in this "
        f"run begin with {ours:.3g}; compression.join_after=auto compression.join_steps=auto "
        "begins as they ended"
    )


def _unlike(saved: ModelSettings, ours: ModelSettings) -> str:
    """What is wrong with weights of `saved` for a model of `ours`, and what to do; else ""."""
    theirs, wanted = _structure(saved), _structure(ours)
    if theirs == wanted:
        return ""
    name = next(name for name in theirs | wanted if theirs.get(name) != wanted.get(name))
    values = ours.model_dump(exclude=set(FREE))
    settings = [
        f"model.{key}={value}"
        for key, value in saved.model_dump(exclude=set(FREE)).items()
        if value != values[key]
    ]
    return (
        f"{name} is {theirs.get(name, 'missing')} there and {wanted.get(name, 'missing')} here; "
        f"set {' '.join(settings)}"
    )


def _structure(model: ModelSettings) -> dict[str, Any]:
    """What weights are made for: the order of layers, heads, and the shape of every parameter.

    The first two are not always in the shapes: logits of ages are a row for each head and age.
    """
    with Unfilled(meta=True):
        parameters = I3LM(model, bos_id=0).named_parameters()
    shapes = {name: list(parameter.shape) for name, parameter in parameters}
    layers, heads = write_layers(model.layer_kinds), adjust_heads(model.d_model, model.heads)
    return {"the stack of layers": layers, "the number of heads": heads, **shapes}
