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
    "train.compile_cache",
    "log.every",
    "log.diagnose_every",
    "validate.every",
    "validate.samples",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "guard.bad_steps",
    "guard.hang_seconds",
    "guard.requeues",
    "slurm.successor",
    "tracking.enabled",
    "tracking.experiment",
    "tracking.run_name",
    "tracking.system_metrics",
    "tracking.log_model",
    "tracking.registered_model",
    "tracking.notify",
)

# May change where a run has ended and is trained further.
FREE_AFTER_THE_END = ("optimizer.decay_steps",)


def fill(settings: Settings, values: Mapping[str, object]) -> Settings:
    """Replace each "auto" for which there is a value, by setting."""
    flat = settings.flat()
    return settings.with_values(**{k: v for k, v in values.items() if flat[k] == "auto"})


def inherit_decided(settings: Settings, saved: Settings) -> Settings:
    """Fill each "auto" with what the saved run decided when it started (`startup.decide`).

    A setting that nobody gave a value keeps a former default of the saved run, and where no
    `train.init_from` is given, it is the saved run's too.
    """
    before, given = saved.flat(), settings.given()
    kept = {k: v for k, v in BEFORE.items() if k not in given and before[k] == v}
    if settings.train.init_from is None:
        kept["train.init_from"] = saved.train.init_from
    decided = {k: v for k, v in before.items() if k not in FREE_TO_CHANGE}
    return fill(settings, decided).with_values(**kept)


def first_conflict(settings: Settings, saved: Settings, ended: bool = False) -> str | None:
    """Name the first setting that a continued run may not change, and its saved value, or None.

    Args:
        settings: of the run as it is continued.
        saved: of the run so far.
        ended: whether the run so far has taken its last step.
    """
    before = saved.flat()
    free = FREE_TO_CHANGE + FREE_AFTER_THE_END * ended
    for key, value in settings.flat().items():
        if key not in free and before[key] != value:
            way = f"leave {key} out" if before[key] is None else f"type {key}={before[key]}"
            return f"{key} is {value} but the saved run has {before[key]}; {way} to continue it"
    return None


def further(settings: Settings, saved: Settings, step: int) -> str | None:
    """A note for a run that has ended and is trained further: what the learning rate will do.

    Args:
        settings: of the run as it is continued.
        saved: of the run that has ended.
        step: its last step.

    Returns:
        The note; None for a run that has not ended, or is not to go on.
    """
    curve, steps = settings.optimizer, settings.train.steps
    if not saved.train.steps <= step < steps:
        return None
    end, now = curve.lr_at(steps - 1), curve.lr_at(step)
    assert curve.decay_steps != "auto", "optimizer.decay_steps is not resolved"
    if curve.decay_steps <= step:
        other = curve.model_copy(update={"decay_steps": steps})
        return (
            f"note: the learning rate stays at {end:.3g}, where its curve has ended; with "
            f"optimizer.decay_steps={steps} it goes on from {other.lr_at(step):.3g} and falls to "
            f"{other.lr_at(steps - 1):.3g}"
        )
    return (
        f"note: the learning rate was {saved.optimizer.lr_at(step - 1):.3g}; it goes on from "
        f"{now:.3g} and is {end:.3g} in the last step (optimizer.decay_steps={curve.decay_steps})"
    )
