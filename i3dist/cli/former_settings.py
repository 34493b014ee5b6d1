"""Former names of settings, in saved runs, files and words, as the settings of today."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from i3dist.cli.layer_pattern import CARD_LAYERS, MOST, read_layers, write_layers
from i3dist.errors import UserError

RENAMED = {"model.records": "model.sub_latents"}
# Each was the number of layers of a kind; `model.layers` is now the whole stack.
COUNTS = {"model.rwkv_layers": "rwkv", "model.attention_layers": "attention"}
TODAY = RENAMED | dict.fromkeys(COUNTS, "model.layers")


def translate(values: Any, places: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """Settings under today's names; the arguments stay as they are.

    Args:
        values: nested plain values, not yet validated.
        places: of the settings that come from a file; the others were typed, or are all of a saved
            run. A typed setting wins over the file's, whichever of the names each uses.

    Raises:
        UserError: one source gives both names, or a former count is out of range.
    """
    places, in_file = dict(places), set(places)
    sections = values if isinstance(values, dict) else {}
    found = {
        f"{section}.{key}": (section, key)
        for section, settings in sections.items()
        if isinstance(settings, dict)
        for key in settings
    }
    former = [name for name in TODAY if name in found]
    if not former:
        return values, places
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    given_today = {name for name in TODAY.values() if name in found}
    for name in former:
        today = TODAY[name]
        section, key = found[name]
        value, place = values[section].pop(key), places.pop(name, "")
        if today in given_today:
            if (name in in_file) == (today in in_file):
                raise UserError(
                    f"{place}{today} and its former name {name} are both given: keep {today}"
                )
            if name in in_file:
                continue
        new = today.partition(".")[2]
        if name in COUNTS:
            value = _replaced(values[section].get(new, CARD_LAYERS), name, value, place)
        values[section][new] = value
        places.pop(today, None)
        if place:
            places[today] = place
    return values, places


def _replaced(layers: Any, name: str, count: Any, place: str) -> Any:
    """The stack `layers` with another count of the kind that a former setting counts."""
    if not isinstance(count, int) or not 1 <= count <= MOST:
        raise UserError(
            f"{place}setting {name}={count!r} should be a whole number from 1 to {MOST}; or say it "
            f"as model.layers={CARD_LAYERS}"
        )
    kind = COUNTS[name]
    with suppress(ValueError, AttributeError):  # what is no stack is refused as model.layers
        groups = write_layers(read_layers(layers)).split(",")
        ours = [i for i, group in enumerate(groups) if group.partition("x")[2] == kind]
        if len(ours) != 1:
            raise UserError(
                f"{place}{name} cannot change model.layers={layers}, which has {len(ours)} groups "
                f"of {kind}: give model.layers itself"
            )
        groups[ours[0]] = f"{count}x{kind}"
        return ",".join(groups)
    return layers
