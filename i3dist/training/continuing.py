"""Which settings may change when a run continues, and what its "auto" settings then are."""

from collections.abc import Mapping

from i3dist.cli.former_settings import BEFORE
from i3dist.config import Settings

# These change how or how long a run trains, never what it computes.
FREE_TO_CHANGE = (
    "run.path",
    "data.path",  # the data itself is compared by its fingerprint
    "data.cache",
    "data.cache_gb",
    "data.workers",
    "data.on_damage",  # changes only what is read in place of damaged shards
    "train.steps",
    "train.micro_batch",
    "train.device",
    "train.engine",
    "train.compile",
    "log.every",
    "log.diagnose_every",
    "validate.every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "guard.bad_steps",
    "guard.hang_seconds",
    "tracking.enabled",
    "tracking.experiment",
    "tracking.run_name",
    "tracking.system_metrics",
)


def fill(settings: Settings, values: Mapping[str, object]) -> Settings:
    """Replace each "auto" for which there is a value, by setting."""
    flat = settings.flat()
    return settings.with_values(**{k: v for k, v in values.items() if flat[k] == "auto"})


def inherit_decided(settings: Settings, saved: Settings) -> Settings:
    """Fill each "auto" with what the saved run decided when it started (`startup.decide`).

    A setting that nobody gave a value keeps a former default of the saved run.
    """
    before, given = saved.flat(), settings.given()
    kept = {k: v for k, v in BEFORE.items() if k not in given and before[k] == v}
    decided = {k: v for k, v in before.items() if k not in FREE_TO_CHANGE}
    return fill(settings, decided).with_values(**kept)


def first_conflict(settings: Settings, saved: Settings) -> str | None:
    """Name the first setting that a continued run may not change, and its saved value, or None."""
    before = saved.flat()
    for key, value in settings.flat().items():
        if key not in FREE_TO_CHANGE and before[key] != value:
            return (
                f"{key} is {value} but the saved run has {before[key]}; type {key}={before[key]} "
                "to continue it"
            )
    return None
