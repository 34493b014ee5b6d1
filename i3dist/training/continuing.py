"""Which settings may change when a run continues, and what its "auto" settings then are."""

from collections.abc import Mapping

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
    "validate.samples",
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

# Settings that are newer than some saved runs, and what such runs did.
BEFORE = {"train.schedule": 1}


def fill(settings: Settings, values: Mapping[str, object]) -> Settings:
    """Replace each "auto" for which there is a value, by setting."""
    flat = settings.flat()
    return settings.with_values(**{k: v for k, v in values.items() if flat[k] == "auto"})


def of_saved_run(settings: Settings) -> Settings:
    """Settings read from a saved run: newer ones get the value by which the run was trained."""
    return fill(settings, BEFORE)


def inherit_decided(settings: Settings, saved: Settings) -> Settings:
    """Fill each "auto" with what the saved run decided when it started (`startup.decide`)."""
    return fill(settings, {k: v for k, v in saved.flat().items() if k not in FREE_TO_CHANGE})


def first_conflict(settings: Settings, saved: Settings) -> str | None:
    """Name the first setting that a continued run may not change, or None."""
    before = saved.flat()
    for key, value in settings.flat().items():
        if key not in FREE_TO_CHANGE and before[key] != value:
            return f"{key} is {value} but the saved run has {before[key]}"
    return None
