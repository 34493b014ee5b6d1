"""Former names and defaults of settings, in saved runs, files and words."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from i3dist.cli.layer_pattern import MOST, read_layers, write_layers
from i3dist.errors import UserError

FORMER_LAYERS = "12xrwkv,2xattention"
# Settings that are newer than some saved runs, or had another default, and what such runs did.
BEFORE = {
    "train.schedule": 1,
    "model.layers": FORMER_LAYERS,
    "compression.join_after": "never",
    "compression.join_steps": 1000,
}

RENAMED = {"records": "sub_latents"}
# Each was the number of layers of a kind; `model.layers` is now the whole stack.
COUNTS = {"rwkv_layers": "rwkv", "attention_layers": "attention"}
TODAY = RENAMED | dict.fromkeys(COUNTS, "layers")


def translate(values: Any, places: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """Settings under today's names; the arguments stay as they are.

    Whoever uses a former name, and does not give `model.layers`, means the default of that time.

    Args:
        values: nested plain values, not yet validated.
        places: of the settings that come from a file; the others were typed, or are all of a saved
            run. A typed setting wins over the file's, whichever of the names each uses.

    Raises:
        UserError: one source gives both names, or a former count is out of range.
    """
    places, in_file = dict(places), set(places)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        return values, places
    given, model = set(model), dict(model)
    formers = [name for name in TODAY if name in given]
    if formers:  # said when this was the default
        model.setdefault("layers", FORMER_LAYERS)
    for former in formers:
        key = TODAY[former]
        name, today = f"model.{former}", f"model.{key}"
        value, place = model.pop(former), places.pop(name, "")
        if key in given:
            if (name in in_file) == (today in in_file):
                raise UserError(
                    f"{place}{today} and its former name {name} are both given: keep {today}"
                )
            if name in in_file:
                continue
        if former in COUNTS:
            value = _replaced(model[key], former, value, place)
        model[key] = value
        places.pop(today, None)
        if place:
            places[today] = place
    return {**values, "model": model}, places


def _replaced(layers: Any, former: str, count: Any, place: str) -> Any:
    """The stack `layers` with another count of the kind that a former setting counts."""
    if not isinstance(count, int) or not 1 <= count <= MOST:
        raise UserError(
            f"{place}setting model.{former}={count!r} should be a whole number from 1 to {MOST}; "
            f"or say it as model.layers={FORMER_LAYERS}"
        )
    kind = COUNTS[former]
    with suppress(ValueError, AttributeError):  # what is no stack is refused as model.layers
        groups = write_layers(read_layers(layers)).split(",")
        ours = [i for i, group in enumerate(groups) if group.partition("x")[2] == kind]
        if len(ours) != 1:
            raise UserError(
                f"{place}model.{former} cannot change model.layers={layers}, which has "
                f"{len(ours)} groups of {kind}: give model.layers itself"
            )
        groups[ours[0]] = f"{count}x{kind}"
        return ",".join(groups)
    return layers
